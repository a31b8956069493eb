"""What a run was made with is recorded without secrets, and every difference is named with what it means."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from argparse import Namespace
from enum import Enum
from pathlib import Path, PurePosixPath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt.coordinator import Coordinator
from distckpt.testing import run_ranks
from distckpt.training import environment
from distckpt.training.environment import HIDDEN, compare_records, json_of, record_environment


class Color(Enum):
    RED = 1


@dataclasses.dataclass
class Options:
    lr: float
    path: Path
    dtype: torch.dtype = torch.bfloat16


class Nameless:
    pass


class Mute:
    def __repr__(self) -> str:
        raise RuntimeError("no name")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Namespace(lr=1e-3, layers=(1, 2)), {"lr": 1e-3, "layers": [1, 2]}),
        (Options(0.1, Path("a/b")), {"lr": 0.1, "path": "a/b", "dtype": "torch.bfloat16"}),
        ({1: {"x"}, "p": PurePosixPath("/data")}, {"1": ["x"], "p": "/data"}),
        ([math.nan, -math.inf, 2**70, True, None, b"x"], ["nan", "-inf", str(2**70), True, None, "b'x'"]),
        ([Color.RED, Options, torch.float16], ["<Color.RED: 1>", f"<class '{__name__}.Options'>", "torch.float16"]),
        (Nameless(), f"<{__name__}.Nameless object>"),
        (Mute(), "<Mute>"),
        ("\ud800", "\\ud800"),
    ],
)
def test_arguments_of_any_kind_become_json(value: object, expected: object) -> None:
    assert json_of(value) == expected
    json.dumps(json_of(value), allow_nan=False)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
        max_leaves=30,
    )
)
def test_whatever_is_recorded_is_plain_json(value: object) -> None:
    json.dumps(json_of(value), allow_nan=False).encode()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hf_token", "hf_abc"),
        ("TOKEN", "abc"),
        ("accessToken", "abc"),
        ("wandb-api-key", "abc"),
        ("OPENAI_API_KEY", "abc"),
        ("db.password", 1234),
        ("aws_secret", {"id": "abc"}),
        ("credentials", ["abc"]),
        ("private_key", b"abc"),
    ],
)
def test_secrets_are_hidden(name: str, value: object) -> None:
    assert json_of({name: value}) == {name: HIDDEN}
    assert json_of({"deep": [{name: value}]}) == {"deep": [{name: HIDDEN}]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer", "gpt2"),
        ("max_tokens", 8),
        ("eos_token", "</s>"),
        ("eos_token_id", 2),
        ("use_auth_token", True),
        ("token", None),
        ("monkey", "key"),
        ("key", "value"),
    ],
)
def test_what_only_sounds_like_a_secret_is_shown(name: str, value: object) -> None:
    assert json_of({name: value}) == {name: value}


def test_secrets_inside_text_are_hidden() -> None:
    shown = json.dumps(
        json_of(
            {
                "command": ["train.py", "--hf-token", "abc123", "--lr", "0.1", "--password=abc123"],
                "store": "s3://user:abc123@host/path",
                "config": Options(0.1, Path("x?token=abc123&y=1")),
                "call": "Client(api_key='abc123', retries=3)",
            }
        )
    )
    assert "abc123" not in shown
    assert all(part in shown for part in ("--lr", "0.1", "host/path", "retries=3"))


def test_size_is_bounded() -> None:
    endless: list[object] = [1]
    endless.append(endless)
    for value in (endless, ["x" * 9000] * 20_000, {str(i): {str(i): i} for i in range(20_000)}, "y" * 10**6):
        text = json.dumps(json_of(value))
        assert len(text) < 1_100_000
    assert json_of(list(range(60_000)))[-1] == "... 10000 more"  # type: ignore[index]
    assert json_of("y" * 5000) == "y" * 4096 + "... (5000 characters)"


def test_record_names_what_the_run_was_made_with() -> None:
    record = record_environment()
    versions = record["versions"]
    assert isinstance(versions, dict)
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "numpy", "distckpt"} <= versions.keys()
    assert "peft" not in versions or versions["peft"]
    assert record["world_size"] == 1
    json.dumps(record, allow_nan=False)


def test_all_ranks_get_the_record_of_rank_0_with_the_hosts_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = iter(["b", "a", "b"])
    monkeypatch.setattr(environment.socket, "gethostname", lambda: next(hosts))

    def record(coordinator: Coordinator) -> dict[str, object]:
        return {**record_environment(coordinator=coordinator)}

    records = run_ranks(3, record)
    assert all(one == records[0] for one in records)
    assert records[0]["hosts"] == ["a", "b"]
    assert records[0]["world_size"] == 3


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_git_commit_and_changes_of_the_script_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    assert record_environment()["git"] is None
    git(tmp_path, "init", "-q")
    script.write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    commit = git(tmp_path, "--git-dir", str(tmp_path / ".git"), "rev-parse", "HEAD").strip()
    assert record_environment()["git"] == {"commit": commit, "is_dirty": False}
    script.write_text("2")
    assert record_environment()["git"] == {"commit": commit, "is_dirty": True}


def test_run_without_git_or_a_script_records_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "x.py"), raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record_environment()["git"] is None
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    assert record_environment()["git"] is None


STORED: dict[str, object] = {
    "versions": {"torch": "2.6", "numpy": "2.0"},
    "hosts": ["a"],
    "dataset": {"fingerprint": "x", "length": 10},
    "assets": {"tokenizer": {"vocab.json": {"sha256": "1"}, "token": {"sha256": "1"}}},
    "model": {"class": "GPT"},
    "arguments": {"lr": 0.1, "flag": True, "gone": 1, "layers": [1, 2], "vocab_size": 5},
}
NOW: dict[str, object] = {
    "versions": {"torch": "2.7", "numpy": "2.0"},
    "hosts": ["b"],
    "dataset": {"fingerprint": "y", "length": 10},
    "assets": {"tokenizer": {"vocab.json": {"sha256": "2"}, "token": {"sha256": "2"}}},
    "model": {"class": "BERT"},
    "arguments": {"lr": 0.2, "flag": 1, "new": {"a": None}, "layers": (1, 2), "vocab_size": 6},
}


def test_every_difference_is_named_with_both_values_and_what_it_means() -> None:
    found = [(one.name, one.stored, one.now, one.severity) for one in compare_records(STORED, NOW).entries]
    assert found == [
        ("arguments.flag", True, 1, "warn"),
        ("arguments.gone", 1, "<absent>", "warn"),
        ("arguments.lr", 0.1, 0.2, "warn"),
        ("arguments.new.a", "<absent>", None, "warn"),
        ("arguments.vocab_size", 5, 6, "warn"),
        ("assets.tokenizer.token.sha256", "1", "2", "block"),
        ("assets.tokenizer.vocab.json.sha256", "1", "2", "block"),
        ("dataset.fingerprint", "x", "y", "block"),
        ("hosts", ["a"], ["b"], "warn"),
        ("model.class", "GPT", "BERT", "block"),
        ("versions.torch", "2.6", "2.7", "warn"),
    ]


def test_a_rule_that_comes_later_counts() -> None:
    policy = {**environment.DEFAULT_POLICY, "arguments.l?": "block", "*torch": "ignore"}
    found = {one.name: one.severity for one in compare_records(STORED, NOW, policy=policy).entries}
    assert found["arguments.lr"] == "block"
    assert found["versions.torch"] == "ignore"
    assert {one.severity for one in compare_records(STORED, NOW, policy={}).entries} == {"warn"}
    with pytest.raises(ValueError, match="expected 'ignore', 'warn' or 'block'"):
        compare_records(STORED, NOW, policy={"*": "stop"})  # type: ignore[dict-item]


def test_what_was_changed_on_purpose_is_listed_and_blocks_nothing() -> None:
    differences = compare_records(STORED, NOW, overrides=["dataset.*", "assets.*", "model.class", "arguments.rl"])
    assert not differences.must_block
    assert {one.name for one in differences.of("overridden")} == {
        "dataset.fingerprint",
        "assets.tokenizer.vocab.json.sha256",
        "assets.tokenizer.token.sha256",
        "model.class",
    }
    assert differences.unmatched_overrides == ("arguments.rl",)
    assert compare_records(STORED, NOW).must_block


def test_text_shows_the_worst_first() -> None:
    differences = compare_records(
        {"a": "[red]x[/red]", "b_fingerprint": 1, "c": 1},
        {"a": "y" * 100, "b_fingerprint": 2, "c": 2},
        policy={"c": "ignore", "b*": "block"},
    )
    assert differences.text() == '  block: b_fingerprint: 1 -> 2\n  warn: a: "[red]x[/red]" -> "' + "y" * 56 + "..."


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab.", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.", max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text("ab.", max_size=3), NESTED), st.dictionaries(st.text("ab.", max_size=3), NESTED))
def test_records_differ_if_and_only_if_their_values_do(stored: dict[str, object], now: dict[str, object]) -> None:
    def without_empty(value: object) -> object:
        """An object without values is none: nothing in it can differ."""
        if isinstance(value, dict):
            kept = {key: without_empty(one) for key, one in value.items()}
            return {key: one for key, one in kept.items() if one != {}}
        return value

    assert not compare_records(stored, stored).entries
    if json.dumps(without_empty(stored), sort_keys=True) == json.dumps(without_empty(now), sort_keys=True):
        assert not compare_records(stored, now).entries
    mirrored = {(one.name, str(one.now), str(one.stored)) for one in compare_records(now, stored).entries}
    assert {(one.name, str(one.stored), str(one.now)) for one in compare_records(stored, now).entries} == mirrored
