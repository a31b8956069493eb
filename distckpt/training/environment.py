"""What a run was made with, as JSON values, and how two such records differ. Decides what of a difference matters.

Recording looks at the machine; comparing is pure. No secret is recorded on purpose: values under names that look like
one, and what looks like one inside other text, are replaced by "<hidden>".
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import platform
import re
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from distckpt.coordinator import Coordinator, agree
from distckpt.utf8_text import utf8_text

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Severity: TypeAlias = Literal["ignore", "warn", "block", "overridden"]

HIDDEN = "<hidden>"
ABSENT = "<absent>"
PACKAGES = ("torch", "numpy", "transformers", "peft", "distckpt")
# The last pattern that matches a name counts.
DEFAULT_POLICY: Mapping[str, Severity] = {
    "*": "warn",
    "environment.hosts": "ignore",  # A job that starts again is given other nodes.
    "*fingerprint*": "block",
    "assets*": "block",
    "model*class*": "block",
    "schedulers.*class": "block",
    "scaler.class": "block",
    "*vocab*": "block",
    "arguments*": "warn",
}

_GIT_TIMEOUT_S = 5.0
_MAX_CHARS = 1_000_000  # of a whole record
_VALUE_CHARS = 20  # what a value counts for beside its text
_MAX_TEXT_CHARS = 4096
_MAX_DEPTH = 16
_SHOWN_CHARS = 60
_SECRET_WORDS = frozenset(
    ["password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey"]
)
_KEY_WORDS = frozenset(["api", "access", "private", "secret", "auth"])  # before "key"
_WORD_TOKENS = frozenset(f"{word}_token" for word in ("pad", "eos", "bos", "unk", "sep", "cls", "mask"))
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_IN_TEXT = re.compile(r"""(?i)((?:token|passw(?:or)?d|secret|api_?key)['"]?\s*[=:]\s*)('[^']*'|"[^"]*"|[^\s,;)}\]]+)""")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class _Place(msgspec.Struct, frozen=True):
    """From every rank: its host; from rank 0 also its record, as JSON."""

    host: str
    record: str


def record_environment(*, coordinator: Coordinator | None = None, timeout_s: float = 600.0) -> dict[str, Json]:
    """Versions, devices, git commit, hosts and world size of this run.

    Collective if a coordinator is given: then all ranks get one record, rank 0's with the hosts of all. Without one
    it is of this process alone.
    """
    host = socket.gethostname()
    if coordinator is None or coordinator.world_size == 1:
        return {**_record_here(), "hosts": [host], "world_size": 1}

    def local() -> _Place:
        record = _record_here() if coordinator.rank == 0 else {}
        return _Place(host, msgspec.json.encode(record).decode())

    def decide(places: Sequence[_Place]) -> list[str]:
        record: dict[str, Json] = msgspec.json.decode(places[0].record)
        hosts: list[Json] = [*sorted({place.host for place in places})]
        whole = {**record, "hosts": hosts, "world_size": len(places)}
        return [msgspec.json.encode(whole).decode()] * len(places)

    agreed = agree(coordinator, "environment", local, decide, message=_Place, decision=str, timeout_s=timeout_s)
    joined: dict[str, Json] = msgspec.json.decode(agreed)
    return joined


def _record_here() -> dict[str, Json]:
    return {
        "versions": _versions(),
        "devices": _devices(),
        "git": _git_state(_script_directory()),
    }


def _versions() -> dict[str, Json]:
    found: dict[str, Json] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    version = getattr(torch, "version", None)
    cuda, hip = getattr(version, "cuda", None), getattr(version, "hip", None)
    if cuda or hip:
        found["cuda" if cuda else "hip"] = str(cuda or hip)
    return found


def _devices() -> list[Json]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [*sorted({str(torch.cuda.get_device_name(index)) for index in range(torch.cuda.device_count())})]


def _script_directory() -> Path | None:
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return None if script is None else Path(script).resolve().parent


def _git_state(directory: Path | None) -> dict[str, Json] | None:
    """None where there is no git, no repository, or no answer in time."""
    if directory is None:
        return None
    commit = _git(directory, "rev-parse", "HEAD")
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit.strip(), "is_dirty": bool(changes.strip())}


def _git(directory: Path, *arguments: str) -> str | None:
    # Without optional locks: looking must not get into the way of somebody who commits.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), "-c", "core.fsmonitor=false", *arguments],
            env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def json_of(value: object) -> Json:
    """Anything as bounded JSON values, without secrets.

    Mappings, Namespaces and dataclasses are objects, sequences and sets lists, paths text; what else is no JSON is its
    repr, without memory addresses. Cut off: text after 4096 characters, the whole after about a million, depth at 16.
    """
    return _Converter().convert(value, 0)


class _Converter:
    """Counts what it has made."""

    def __init__(self) -> None:
        self._left = _MAX_CHARS

    def convert(self, value: object, depth: int) -> Json:
        converted = self._convert(value, depth)
        self._left -= _VALUE_CHARS + (len(converted) if isinstance(converted, str) else 0)
        return converted

    def _convert(self, value: object, depth: int) -> Json:
        if value is None or isinstance(value, bool) or (type(value) is int and abs(value) < 2**63):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else repr(value)
        if isinstance(value, str):
            return _visible(str(value))
        if isinstance(value, os.PathLike):
            return _visible(os.fsdecode(value))
        if isinstance(value, Namespace):
            value = vars(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
        if depth < _MAX_DEPTH and isinstance(value, Mapping):
            return self._convert_mapping(value, depth)
        if depth < _MAX_DEPTH and isinstance(value, list | tuple | Set):
            return self._convert_items(sorted(value, key=repr) if isinstance(value, Set) else value, depth)
        return _visible(_repr(value))

    def _convert_mapping(self, value: Mapping[object, object], depth: int) -> dict[str, Json]:
        found: dict[str, Json] = {}
        for key, one in value.items():
            if self._left <= 0:
                found["..."] = f"{len(value) - len(found)} more"
                break
            name = _visible(key if isinstance(key, str) else _repr(key))
            self._left -= len(name)
            found[name] = HIDDEN if _is_secret(name, one) else self.convert(one, depth + 1)
        return found

    def _convert_items(self, value: Sequence[object], depth: int) -> list[Json]:
        found: list[Json] = []
        for one in value:
            if self._left <= 0:
                found.append(f"... {len(value) - len(found)} more")
                break
            before = found[-1] if found else None
            is_secret = isinstance(before, str) and before.startswith("-") and _is_secret(before, one)
            found.append(HIDDEN if is_secret else self.convert(one, depth + 1))
        return found


def _repr(value: object) -> str:
    try:
        return _ADDRESS.sub("", repr(value))
    except Exception:
        return f"<{type(value).__qualname__}>"


def _visible(text: str) -> str:
    """Bounded, storable, and without what looks like a secret in a URL or after a name and an equals sign."""
    cut = text if len(text) <= _MAX_TEXT_CHARS else f"{text[:_MAX_TEXT_CHARS]}... ({len(text)} characters)"
    cut = utf8_text(cut)
    return _IN_TEXT.sub(rf"\1{HIDDEN}", _IN_URL.sub(HIDDEN, cut))


def _is_secret(name: str, value: object) -> bool:
    """hf_token, apiKey, DB_PASSWORD; but not tokenizer, max_tokens, eos_token, nor a token that is a number."""
    if value is None or isinstance(value, bool):
        return False
    words = [word.lower() for word in _WORD.findall(name)]
    if _SECRET_WORDS & {*words} or any(
        before in _KEY_WORDS and after in ("key", "keys") for before, after in itertools.pairwise(words)
    ):
        return True
    return "token" in words and not isinstance(value, int | float) and "_".join(words) not in _WORD_TOKENS


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that changed; ABSENT where a record has none."""

    name: str
    stored: Json
    now: Json
    severity: Severity


@dataclass(frozen=True, slots=True)
class Differences:
    """What differs between a stored record and the present one, by name. unmatched_overrides changed nothing."""

    entries: tuple[Difference, ...]
    unmatched_overrides: tuple[str, ...] = ()

    def of(self, *severities: Severity) -> tuple[Difference, ...]:
        return tuple(entry for entry in self.entries if entry.severity in severities)

    @property
    def must_block(self) -> bool:
        return bool(self.of("block"))

    def text(self) -> str:
        """One line for each that is not ignored, the blocking ones first; for errors and logs of one colour."""
        lines = [
            f"  {entry.severity}: {entry.name}: {_shown(entry.stored)} -> {_shown(entry.now)}"
            for entry in self._by_severity()
        ]
        return "\n".join(lines)

    def _by_severity(self) -> list[Difference]:
        order = ("block", "warn", "overridden")
        shown = [entry for entry in self.entries if entry.severity in order]
        return sorted(shown, key=lambda entry: (order.index(entry.severity), entry.name))


def compare_records(
    stored: Mapping[str, object],
    now: Mapping[str, object],
    *,
    policy: Mapping[str, Severity] = DEFAULT_POLICY,
    overrides: Collection[str] = (),
) -> Differences:
    """All values that differ, under dotted names ("arguments.optimizer.lr"). Pure. The records are JSON values.

    policy: name pattern (as of a shell: * ? []) -> "ignore", "warn" or "block"; the last that matches a name counts,
    so {**DEFAULT_POLICY, "arguments.seed": "block"} adds a rule; what none matches is warned of. overrides: names, or
    patterns, that were changed on purpose: their severity is "overridden".
    """
    for pattern, severity in policy.items():
        if severity not in ("ignore", "warn", "block"):
            raise ValueError(f"policy {pattern!r}: {severity!r}; expected 'ignore', 'warn' or 'block'")
    old, new = (dict(_flatten(_as_decoded(record))) for record in (stored, now))
    entries, matched = [], set()
    for path in sorted({*old, *new}):
        was, is_ = old.get(path, ABSENT), new.get(path, ABSENT)
        if was == is_ and isinstance(was, bool) == isinstance(is_, bool):
            continue
        name = ".".join(path)
        matching = [pattern for pattern in overrides if fnmatchcase(name, pattern)]
        matched.update(matching)
        rules = [severity for pattern, severity in policy.items() if fnmatchcase(name, pattern)]
        entries.append(Difference(name, was, is_, "overridden" if matching else rules[-1] if rules else "warn"))
    return Differences(tuple(entries), tuple(pattern for pattern in overrides if pattern not in matched))


def value_names(record: object) -> list[str]:
    """The dotted names of all values in a JSON object, as they are compared; none in what is no object."""
    return [".".join(path) for path, _ in _flatten(_as_decoded(record))] if isinstance(record, dict) else []


def _as_decoded(record: Mapping[str, object]) -> Json:
    """As it comes back from a checkpoint: a tuple is a list. Nothing is cut off or hidden here."""
    decoded: Json = msgspec.json.decode(msgspec.json.encode(record))
    return decoded


def _flatten(value: Json, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Json]]:
    """Lists are compared as a whole, unless they hold objects."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _flatten(one, (*path, key))
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        for place, one in enumerate(value):
            yield from _flatten(one, (*path, str(place)))
    else:
        yield path, value


def _shown(value: Json) -> str:
    text = value if value == ABSENT else msgspec.json.encode(value).decode()
    assert isinstance(text, str)
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."
