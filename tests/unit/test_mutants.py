"""The tables of mutants are up to date: what a mutant changes stands once in its file, and its tests are there."""

from __future__ import annotations

from collections import Counter

from tests.mutants.__main__ import MUTANTS, ROOT
from tests.mutants.mutant import Mutant


def is_up_to_date(mutant: Mutant) -> bool:
    return (
        (ROOT / mutant.file).read_text().count(mutant.text) == 1
        and mutant.replacement + mutant.appended != mutant.text
        and all((ROOT / test.partition("::")[0]).is_file() for test in mutant.tests)
    )


def test_every_mutant_can_be_made() -> None:
    assert [mutant.name for mutant in MUTANTS if not is_up_to_date(mutant)] == []


def test_names_are_given_once() -> None:
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []
