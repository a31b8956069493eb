"""One safeguard that is taken away, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass

# What is left of an agreement when nobody is asked: a rank decides on its own data alone.
ALONE = """

def _alone(coordinator, phase, local, decide, *types, **options):
    return decide([local()])[0]
"""
SILENTLY = """

def _silently(function, *arguments):
    try:
        function(*arguments)
    except Exception:
        pass
"""


@dataclass(frozen=True)
class Mutant:
    """`text`, which stands once in `file`, becomes `replacement`; `appended` goes to the end of the file."""

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]
    appended: str = ""
