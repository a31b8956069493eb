"""Labels: tags, notes, pins and later metrics, changed by several processes, beside removal, and in crashes."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from distckpt import CheckpointError, CheckpointNotFoundError, CorruptionError, catalog, label, labels, prune
from distckpt.checked_json import encode_record
from distckpt.commit import Commit, Writer, list_commits
from distckpt.labelling import MAX_NOTE_LENGTH
from distckpt.labels import Labels, change_labels, label_numbers, read_labels
from distckpt.removing import RETIRING_S, retire, sweep
from distckpt.retention import Retention
from distckpt.shard_file import FORMAT, FORMAT_VERSION
from distckpt.storage import PosixStorage, Storage
from distckpt.storage.memory import MemoryReadFile
from distckpt.testing import Crash, CrashingStorage, MemoryStorage
from tests.unit.damage import change, flip
from tests.unit.protocol import Clock, save, tree


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storage(clock: Clock) -> MemoryStorage:
    return three_checkpoints(MemoryStorage(clock=clock))


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here gives up a removal that it is waited for, but where a test says so."""
    monkeypatch.setattr(labels, "_WAIT_S", 0.0)


def three_checkpoints(storage: MemoryStorage) -> MemoryStorage:
    writer = Writer.claim(storage)
    for iteration in (10, 20, 30):
        save(writer, iteration, metrics={"loss": 1.0 / iteration})
    sweep(storage, grace_s=0)
    return storage


def tags(storage: Storage) -> dict[int, tuple[str, ...]]:
    return {entry.iteration: entry.tags for entry in catalog(storage) if entry.tags}


def label_files(storage: Storage, iteration: int) -> list[str]:
    return [name for name in storage.list(f"iter_{iteration:07d}") if name.startswith("labels-")]


# What can be said


def test_labels_are_what_was_said_last_of_each_kind(storage: MemoryStorage) -> None:
    before = label(storage, 10)
    assert (before.tags, before.note, before.pinned, before.metrics) == ((), "", False, {"loss": 0.1})
    label(
        storage, 10, add_tags=["b", "a"], note="first\nsecond", pinned=True, metrics={"loss": 0.5, "acc": float("nan")}
    )
    after = label(storage, 10, remove_tags=["b", "unknown"])
    assert (after.tags, after.note, after.pinned) == (("a",), "first\nsecond", True)
    assert after.metrics == {"loss": 0.5, "acc": None}
    after = label(storage, 10, note="", pinned=False)
    assert (after.tags, after.note, after.pinned) == (("a",), "", False)
    assert after == next(entry for entry in catalog(storage) if entry.iteration == 10) or after.age_s


def test_labelling_changes_no_other_file_and_nothing_that_is_said_already(storage: MemoryStorage) -> None:
    before = tree(storage)
    label(storage, 10, add_tags=["a"])
    after = tree(storage)
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1
    label(storage, 10, add_tags=["a"], pinned=False)
    assert tree(storage) == after


def test_labels_by_a_selector_and_by_the_directory_of_an_iteration(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    writer = Writer.claim(storage)
    for iteration in (10, 20):
        save(writer, iteration)
    assert label(tmp_path, add_tags=["new"]).iteration == 20
    assert label(tmp_path / "iter_0000010", add_tags=["old"]).iteration == 10
    assert label(tmp_path, "tag:old", note="x").iteration == 10
    with pytest.raises(CheckpointError, match="is the directory of iteration 10, and 20 is asked for"):
        label(tmp_path / "iter_0000010", 20, add_tags=["old"])
    assert tags(storage) == {20: ("new",), 10: ("old",)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"add_tags": ["a\n"]},
        {"add_tags": [""]},
        {"add_tags": ["x" * 201]},
        {"add_tags": ["a"], "remove_tags": ["a"]},
        {"note": "x" * (MAX_NOTE_LENGTH + 1)},
        {"note": "bell\a"},
        {"metrics": {"": 1.0}},
    ],
)
def test_labels_that_could_not_be_shown_are_refused(storage: MemoryStorage, wrong: dict[str, object]) -> None:
    before = tree(storage)
    with pytest.raises(ValueError, match=r"tag|note|metric"):
        label(storage, **wrong)  # type: ignore[arg-type]
    assert tree(storage) == before


def test_one_text_for_tags_is_no_list_of_its_letters(storage: MemoryStorage) -> None:
    with pytest.raises(TypeError):
        label(storage, add_tags="best")


def test_checkpoint_with_a_damaged_index_is_not_labelled(storage: MemoryStorage) -> None:
    change(storage, list_commits(storage)[0].name, flip(30))
    with pytest.raises(CorruptionError):
        label(storage, 30, pinned=True)


# Tags name one checkpoint


def test_tag_moves_to_the_checkpoint_that_gets_it(storage: MemoryStorage) -> None:
    for iteration in (10, 30, 20, 20):
        label(storage, iteration, add_tags=["best"])
        assert tags(storage) == {iteration: ("best",)}
    label(storage, 20, remove_tags=["best"])
    assert tags(storage) == {}


def test_crash_at_any_call_of_moving_a_tag_leaves_it_on_one_checkpoint(clock: Clock) -> None:
    def prepare() -> MemoryStorage:
        storage = three_checkpoints(MemoryStorage(clock=clock))
        label(storage, 30, add_tags=["best"], note="kept")
        return storage

    counting = CrashingStorage(prepare())
    label(counting, 10, add_tags=["best"])
    moved = 0
    for call in range(1, len(counting.calls) + 1):
        for seed in (None, 1, 2):
            storage = prepare()
            with pytest.raises(Crash):
                label(CrashingStorage(storage, fail_at=call, error=Crash()), 10, add_tags=["best"])
            for after in (storage, storage.power_cut(seed)):
                assert tags(after) in ({30: ("best",)}, {10: ("best",)})
                assert label(after, 30).note == "kept"
                moved += 10 in tags(after)
                label(after, 20, add_tags=["best"])  # Whatever lies there is overruled, and stays so when it is taken.
                label(after, 20, remove_tags=["best"])
                assert tags(after) == {}
    assert moved > 5


def test_tag_that_a_move_left_behind_does_not_name_its_checkpoint_again(clock: Clock) -> None:
    """The process died between putting it on the new one and taking it from the old; then the tag is removed."""

    def prepare() -> MemoryStorage:
        storage = three_checkpoints(MemoryStorage(clock=clock))
        label(storage, 10, add_tags=["best"])
        left = read_labels(storage, "iter_0000010", catalog(storage)[2].save_id).labels
        label(storage, 30, add_tags=["best"])
        commit = list_commits(storage)[2]
        change_labels(storage, commit, left.save_id, lambda _: left)
        assert tags(storage) == {30: ("best",)}
        return storage

    counting = CrashingStorage(prepare())
    label(counting, "tag:best", remove_tags=["best"])
    calls = len(counting.calls)
    assert tags(counting) == {}
    for call in range(1, calls + 1):
        storage = prepare()
        with pytest.raises(Crash):
            label(CrashingStorage(storage, fail_at=call, error=Crash()), "tag:best", remove_tags=["best"])
        assert tags(storage) in ({30: ("best",)}, {})


# Several processes


def test_labels_of_threads_that_change_one_checkpoint_are_all_there(storage: MemoryStorage) -> None:
    def work(number: int) -> None:
        for i in range(8):
            label(storage, 10, add_tags=[f"{number}-{i}"], metrics={f"m{number}-{i}": i})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    entry = label(storage, 10)
    assert set(entry.tags) == {f"{number}-{i}" for number in range(4) for i in range(8)}
    assert len(entry.metrics) == 1 + 32
    assert len(label_files(storage, 10)) <= 3


def test_threads_that_move_one_tag_leave_it_on_one_checkpoint(storage: MemoryStorage) -> None:
    def work(iteration: int) -> None:
        for _ in range(5):
            label(storage, iteration, add_tags=["best"])

    threads = [threading.Thread(target=work, args=(iteration,)) for iteration in (10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert list(tags(storage).values()) == [("best",)]


class Interrupted(MemoryStorage):
    """Something happens in the middle of the next call of `method` for a name that has `part` in it."""

    method = ""
    part = ""
    moment = "before"
    meanwhile: Callable[[], object] | None = None

    def at(self, method: str, part: str, meanwhile: Callable[[], object], moment: str = "before") -> None:
        self.method, self.part, self.meanwhile, self.moment = method, part, meanwhile, moment

    def _happens(self, method: str, name: str, moment: str) -> None:
        if self.meanwhile is not None and (method, moment) == (self.method, self.moment) and self.part in name:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()

    def put_if_absent(self, name: str, data: bytes) -> bool:
        self._happens("put_if_absent", name, "before")
        done = super().put_if_absent(name, data)
        self._happens("put_if_absent", name, "after")
        return done

    def remove(self, name: str) -> None:
        self._happens("remove", name, "before")
        super().remove(name)

    def list(self, directory: str) -> Sequence[str]:
        self._happens("list", directory, "before")
        return super().list(directory)


@pytest.mark.parametrize("others", [1, 2, 3, 4])
def test_change_is_not_lost_to_changes_that_come_between_its_reading_and_its_writing(clock: Clock, others: int) -> None:
    """With several of them the number that it was to have is free again, as older files are removed."""
    storage = Interrupted(clock=clock)
    three_checkpoints(storage)
    label(storage, 10, metrics={"first": 1})

    def meanwhile() -> None:
        for i in range(others):
            label(storage, 10, metrics={f"other{i}": i})

    storage.at("put_if_absent", "/labels-", meanwhile)
    entry = label(storage, 10, metrics={"own": 1})
    assert set(entry.metrics) == {"loss", "first", "own", *(f"other{i}" for i in range(others))}


def test_one_earlier_record_stays_and_older_ones_go(storage: MemoryStorage) -> None:
    for i in range(5):
        label(storage, 10, note=str(i))
    save_id = catalog(storage)[2].save_id
    assert label_numbers(storage.list("iter_0000010"), save_id) == [4, 5]


# Damage


def test_highest_record_that_can_be_read_counts(storage: MemoryStorage) -> None:
    label(storage, 10, note="older", pinned=True)
    label(storage, 10, note="newer", pinned=False)
    change(storage, f"iter_0000010/{label_files(storage, 10)[-1]}", flip(5))
    entry = catalog(storage)[2]
    assert (entry.note, entry.pinned) == ("older", True)
    assert "crc32c" in (entry.labels_damage or "")
    assert label(storage, 10, add_tags=["a"]).labels_damage is None
    entry = catalog(storage)[2]
    assert (entry.note, entry.tags, entry.labels_damage) == ("older", ("a",), None)


@pytest.mark.parametrize("content", [b"", b"{}\n", b'{"format":"distckpt"}\n{"crc32c":"00000000"}\n'])
def test_labels_that_cannot_be_read_may_have_been_a_pin(storage: MemoryStorage, content: bytes) -> None:
    label(storage, 10, note="x")
    storage.replace(f"iter_0000010/{label_files(storage, 10)[0]}", content)
    report = prune(storage, Retention(keep_last=1))
    assert [one.iteration for one in report.removed] == [20]


def test_labels_of_another_checkpoint_or_number_do_not_count(storage: MemoryStorage) -> None:
    label(storage, 10, pinned=True)
    (name,) = label_files(storage, 10)
    data = tree(storage)[f"iter_0000010/{name}"]
    other = catalog(storage)[1].save_id
    storage.put_if_absent(f"iter_0000020/labels-000001-{other}.json", data)
    storage.put_if_absent(f"iter_0000010/{name.replace('000001', '000007')}", data)
    entries = {entry.iteration: entry for entry in catalog(storage)}
    assert "it is of" in (entries[20].labels_damage or "")
    assert "number 1" in (entries[10].labels_damage or "")


def test_tag_with_the_highest_number_is_an_error_and_nothing_is_written(storage: MemoryStorage) -> None:
    save_id = catalog(storage)[2].save_id
    said = Labels(format=FORMAT, version=FORMAT_VERSION, save_id=save_id, number=1, tags={"a": 2**63 - 1})
    storage.put_if_absent(f"iter_0000010/labels-000001-{save_id}.json", encode_record(said))
    with pytest.raises(
        CorruptionError, match="iter_0000010: its labels give the tag 'a' the number 9223372036854775807"
    ):
        label(storage, 20, add_tags=["a"])
    assert label_files(storage, 20) == []
    label(storage, 10, remove_tags=["a"])
    assert label(storage, 20, add_tags=["a"]).tags == ("a",)


def test_labels_with_the_highest_number_are_an_error_and_nothing_is_written(storage: MemoryStorage) -> None:
    save_id, number = catalog(storage)[2].save_id, 10**18 - 1
    said = Labels(format=FORMAT, version=FORMAT_VERSION, save_id=save_id, number=number)
    storage.put_if_absent(f"iter_0000010/labels-{number}-{save_id}.json", encode_record(said))
    with pytest.raises(CorruptionError, match="leave no higher one"):
        label(storage, 10, note="x")
    assert label_files(storage, 10) == [f"labels-{number}-{save_id}.json"]


class OfAnother(MemoryStorage):
    """In which nobody but their author may read the labels of 10."""

    def open(self, name: str) -> MemoryReadFile:
        if name.startswith("iter_0000010/labels-"):
            raise PermissionError(errno.EACCES, "Permission denied", name)
        return super().open(name)


def test_labels_that_may_not_be_read_stop_nobody_and_may_have_been_a_pin(clock: Clock) -> None:
    storage = OfAnother(clock=clock)
    three_checkpoints(storage)
    label(storage, 20, note="x")
    commit = list_commits(storage)[2]
    data = encode_record(Labels(format=FORMAT, version=FORMAT_VERSION, save_id=catalog(storage)[2].save_id, number=1))
    storage.put_if_absent(f"{commit.directory}/labels-000001-{catalog(storage)[2].save_id}.json", data)
    assert ["Permission denied" in (entry.labels_damage or "") for entry in catalog(storage)] == [False, False, True]
    assert [one.iteration for one in prune(storage, Retention(keep_last=1)).removed] == [20]
    assert retire(storage, [commit]) == []
    assert label(storage, 30, note="y").note == "y"


def test_labels_that_may_not_be_read_are_not_written_over(clock: Clock) -> None:
    """Nor is a tag moved, that may be among them with any number."""
    storage = OfAnother(clock=clock)
    three_checkpoints(storage)
    save_id = catalog(storage)[2].save_id
    data = encode_record(Labels(format=FORMAT, version=FORMAT_VERSION, save_id=save_id, number=1, tags={"a": 7}))
    storage.put_if_absent(f"iter_0000010/labels-000001-{save_id}.json", data)
    with pytest.raises(PermissionError):
        label(storage, 10, note="z")
    with pytest.raises(PermissionError):
        label(storage, 30, add_tags=["a"])
    assert label_files(storage, 10) == [f"labels-000001-{save_id}.json"]
    assert label_files(storage, 30) == []


# Removal


def test_checkpoint_that_is_labelled_when_its_removal_has_begun_is_spared(clock: Clock) -> None:
    """The label comes after the marker was put and before labels are looked at."""
    storage = Interrupted(clock=clock)
    three_checkpoints(storage)
    commit = list_commits(storage)[2]
    save_id = catalog(storage)[2].save_id

    def pin() -> None:
        change_labels(storage, commit, save_id, lambda said: Labels(pinned=True, save_id=said.save_id))

    def pin_and_be_told() -> None:
        with pytest.raises(CheckpointNotFoundError, match="removal had begun"):
            pin()

    storage.at("put_if_absent", "/retired-", pin_and_be_told, "after")
    assert retire(storage, [commit]) == []
    assert [entry.pinned for entry in catalog(storage)] == [False, False, True]
    assert not any(name.startswith("retired-") for name in tree(storage.power_cut()))


def test_who_labels_waits_for_a_removal_that_is_given_up(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "_WAIT_S", 60.0)
    storage = Interrupted(clock=clock)
    three_checkpoints(storage)
    entry = catalog(storage)[2]
    marker = f"iter_0000010/retired-{entry.save_id}"
    storage.put_if_absent(marker, b"")
    threading.Timer(0.1, lambda: storage.remove(marker)).start()
    assert label(storage, 10, pinned=True).pinned


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("grace_s", [0.0, 60.0])
def test_who_labels_a_checkpoint_that_is_removed_meanwhile_is_told(clock: Clock, moment: str, grace_s: float) -> None:
    storage = Interrupted(clock=clock)
    three_checkpoints(storage)
    commit = list_commits(storage)[2]

    def remove() -> None:
        numbers = {commit: read_labels(storage, commit.directory, catalog(storage)[2].save_id).number}
        assert retire(storage, [commit], numbers) == [commit]
        sweep(storage, grace_s=grace_s)

    storage.at("put_if_absent", "/labels-", remove, moment)
    with pytest.raises(CheckpointNotFoundError, match="removed"):
        label(storage, 10, pinned=True)
    clock.now_s += 100
    sweep(storage, grace_s=grace_s)
    assert "iter_0000010" not in storage.list("")


@pytest.mark.parametrize("calls_between", range(1, 8))
def test_of_a_label_and_a_removal_one_sees_the_other(clock: Clock, calls_between: int) -> None:
    """A removal is stopped before each of its calls, and the checkpoint is pinned then."""
    storage = three_checkpoints(MemoryStorage(clock=clock))
    commit = list_commits(storage)[2]
    is_told = []

    class Stopped(CrashingStorage):
        def run(self, method, name, call, half=None):  # type: ignore[no-untyped-def]
            if len(self.calls) + 1 == calls_between:
                try:
                    is_told.append(not label(storage, 10, pinned=True).pinned)
                except CheckpointNotFoundError:
                    is_told.append(True)
            return super().run(method, name, call, half)

    counting = Stopped(storage)
    retired = retire(counting, [commit])
    if len(counting.calls) < calls_between:
        assert not is_told
        return
    assert is_told == [True] or retired == []
    if retired == []:
        assert catalog(storage)[-1].pinned


def test_marker_of_another_removal_is_left_to_it(storage: MemoryStorage, clock: Clock) -> None:
    """Else who labels meanwhile would not see that removal."""
    commit, save_id = list_commits(storage)[2], catalog(storage)[2].save_id
    label(storage, 10, pinned=True)
    marker = f"retired-{save_id}"
    storage.put_if_absent(f"iter_0000010/{marker}", b"")
    assert retire(storage, [commit]) == []
    sweep(storage, grace_s=0)
    assert marker in storage.list("iter_0000010")
    clock.now_s += RETIRING_S
    sweep(storage, grace_s=0)
    assert marker not in storage.list("iter_0000010")
    assert catalog(storage)[2].pinned


def test_labels_go_with_their_checkpoint_and_only_with_it(storage: MemoryStorage) -> None:
    label(storage, 10, note="x")
    label(storage, 20, note="x")
    sweep(storage, grace_s=0)
    assert label_files(storage, 10)
    commit = Commit(1, 1, 10)
    assert retire(storage, [commit], {commit: 1}) == [commit]
    sweep(storage, grace_s=0)
    assert not any("iter_0000010" in name for name in tree(storage))
    assert label_files(storage, 20)
