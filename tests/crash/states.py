"""Small training states by version, and the checks that a root must pass whatever has happened to it.

What is loaded must be one version as a whole: each value of a state tells which version it is of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from distckpt import Checkpointer, LoadReport, PerRank, ShardedTensor
from distckpt.commit import Commit, list_commits, read_index
from distckpt.coordinator import Coordinator
from distckpt.storage import Storage
from distckpt.testing import run_ranks

ROWS, COLUMNS = 8, 5


def make_state(version: int, coordinator: Coordinator | None = None, columns: int = COLUMNS) -> dict[str, object]:
    """A rank's part of a version: a tensor cut by rows, one that all hold, a value, one that differs by rank."""
    rank, world_size = (0, 1) if coordinator is None else (coordinator.rank, coordinator.world_size)
    rows = ROWS // world_size
    weight = torch.arange(ROWS * columns, dtype=torch.float32).reshape(ROWS, columns) + 1000 * version
    return {
        "weight": ShardedTensor.from_rank_offsets(
            "weight", weight[rank * rows : (rank + 1) * rows].clone(), (0, rank, world_size)
        ),
        "optimizer": {"bias": torch.full((3,), version, dtype=torch.int64), "step": version},
        "random": PerRank(f"version {version} of rank {rank}"),
    }


def flat(state: Mapping[str, object]) -> tuple[list[object], ...]:
    """The values of such a state, to be compared."""
    weight, optimizer, random = state["weight"], state["optimizer"], state["random"]
    assert isinstance(weight, ShardedTensor)
    assert isinstance(optimizer, dict)
    assert isinstance(random, PerRank)
    return weight.data.flatten().tolist(), optimizer["bias"].tolist(), [optimizer["step"], random.value]


def load_whole(
    checkpointer: Checkpointer,
    iteration: int | None = None,
    coordinator: Coordinator | None = None,
    columns: int = COLUMNS,
) -> tuple[LoadReport, int]:
    """(report, version) of a load. Fails unless what was loaded is that version bit by bit."""
    state = make_state(0, coordinator, columns)
    report = checkpointer.load(state, iteration)
    optimizer = state["optimizer"]
    assert isinstance(optimizer, dict)
    version = optimizer["step"]
    assert version > 0
    assert flat(state) == flat(make_state(version, coordinator, columns)), "a mix of versions"
    assert not report.missing
    assert not report.unexpected
    return report, version


def load_version(
    storage: Storage, iteration: int | None, coordinator: Coordinator | None = None, columns: int = COLUMNS
) -> tuple[int, int]:
    """(iteration, version) that a new Checkpointer loads. Fails unless it is that version bit by bit."""
    with Checkpointer(storage, coordinator=coordinator) as checkpointer:
        report, version = load_whole(checkpointer, iteration, coordinator, columns)
    return report.iteration, version


def save_as_next_job(
    storage: Storage,
    world_size: int,
    saves: Sequence[tuple[int, int]],
    *,
    resume_from: int | None = None,
    keep_last: int | None = None,
) -> None:
    """A job of threads: it loads `resume_from`, or the newest there is, and saves (iteration, version) pairs."""

    def run(coordinator: Coordinator) -> None:
        with Checkpointer(storage, coordinator=coordinator, keep_last=keep_last, removal_grace_s=0) as checkpointer:
            if checkpointer.latest_iteration() is not None:
                load_whole(checkpointer, resume_from, coordinator)
            for iteration, version in saves:
                checkpointer.save(make_state(version, coordinator), iteration=iteration)

    run_ranks(world_size, run)


def loaded(storage: Storage, world_size: int = 1, columns: int = COLUMNS) -> dict[int | None, int]:
    """What every committed iteration loads as: iteration -> version; None -> the *iteration* that load() takes.

    Fails if what load() takes, or the newest by latest_iteration(), is not the newest commit, or not whole.
    """

    def load_all(coordinator: Coordinator) -> dict[int | None, int]:
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            iterations, latest = checkpointer.iterations(), checkpointer.latest_iteration()
        versions: dict[int | None, int] = {}
        for iteration in iterations:
            found, version = load_version(storage, iteration, coordinator, columns)
            assert found == iteration
            versions[iteration] = version
        if iterations:
            newest, version = load_version(storage, None, coordinator, columns)
            assert (newest, versions[newest]) == (latest, version)
            versions[None] = newest
        else:
            assert latest is None
        return versions

    versions, *others = run_ranks(world_size, load_all)
    assert all(other == versions for other in others)
    commits = list_commits(storage)
    assert versions.get(None) == (commits[0].iteration if commits else None), "the newest commit is not whole"
    return versions


def unexplained(storage: Storage) -> set[str]:
    """Files, and directories, of a root that belong to none of its checkpoints."""
    commits = list_commits(storage)
    expected = {
        "latest_checkpointed_iteration.txt",
        "history.jsonl",
        max((n for n in storage.list("") if n[:7] == "writer-"), default=""),
    }
    found = set(storage.list("")) - expected
    for directory in {name for name in found if name.startswith("iter_")}:
        names = storage.list(directory)
        found |= {f"{directory}/{name}" for name in names}
        if not names:  # One without files is nothing: the next save of that iteration takes it.
            found.discard(directory)
    for commit in commits:
        found -= {commit.directory, commit.name} | _files_of(storage, commit)
    return found


def _files_of(storage: Storage, commit: Commit) -> set[str]:
    index = read_index(storage, commit)[0]
    names = [index.chunk_table.name, *(file.name for file in index.files)]
    # Parity that a crash has left unfinished goes with its checkpoint; the mark of one who was about to remove it stays
    # for a while, as whoever labels it looks for that.
    own = ("verified-", "parity-", "retired-")
    extras = (name for name in storage.list(commit.directory) if name.startswith(own))
    names += [name for name in extras if index.save_id in name]
    return {f"{commit.directory}/{name}" for name in names}
