"""Takes one safeguard away at a time and looks whether a test turns red.

    python tools/mutants.py [--only NAME] [--list]

One mutant stands below for every fsync, every comparison of checksums, every agreement and every check of fence or
path in the Python sources. Each is applied to a scratch copy of the tree, the tests named with it are run there, and
a mutant that they do not notice has SURVIVED: a test is missing, or the safeguard does nothing. Two more results mean
that this file is out of date: "text not found" (or found twice), and "broken" (the tests could not be run, or fail
without the mutant too).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("distckpt", "tests", "examples", "tools", "docs", "pyproject.toml", "README.md")
TIMEOUT_S = 300.0
KILLED = "killed"

POWER_CUT = ("tests/crash/test_posix_power_cut.py",)
STORAGE = ("tests/unit/test_storage.py",)
COMMIT = ("tests/unit/test_commit.py",)
REMOVAL = ("tests/unit/test_removal.py",)
DAMAGE = ("tests/unit/test_damage.py",)
SHARED_READING = ("tests/unit/test_shared_reading.py",)
ALL_RANKS = ("tests/unit/test_all_ranks.py",)
AGREEMENT = ("tests/unit/test_agreement.py",)
INDEX = ("tests/unit/test_index.py",)
CHUNK_TABLE = ("tests/unit/test_chunk_table.py",)
PLANNER = ("tests/unit/test_planner.py",)
PLAN_REUSE = ("tests/unit/test_plan_reuse.py",)
TIED = ("tests/unit/test_tied_memory.py",)
INTERRUPTED = ("tests/unit/test_interrupted_saves.py",)
LAZY = ("tests/unit/test_lazy_snapshot.py",)
TRANSPORT = ("tests/unit/test_transport_cuda.py",)
RING = ("tests/unit/test_ring.py",)
VERIFYING = ("tests/unit/test_verifying.py",)
REPAIRING = ("tests/unit/test_repairing.py",)
PARITY = ("tests/unit/test_parity.py",)
LINK_NAMES = ("tests/unit/test_link_names.py",)
ACCESS = ("tests/unit/test_access.py",)
COPYING = ("tests/unit/test_copying.py",)
COPIER = ("tests/unit/test_copier.py",)
HISTORY = ("tests/unit/test_history.py",)
AFTER_COMMIT = ("tests/unit/test_after_commit.py",)
READ_BACK = ("tests/unit/test_read_back.py",)
RETENTION = ("tests/unit/test_retention.py",)
LABELS = ("tests/unit/test_labels.py",)
SELECTING = ("tests/unit/test_selecting.py",)
SURROUNDINGS = ("tests/unit/test_surroundings.py",)
METRICS = ("tests/unit/test_metrics.py",)
PRUNING = ("tests/unit/test_pruning.py",)
CLI_LIFE = ("tests/unit/test_cli_life.py",)
CLI_PROGRESS = ("tests/unit/test_cli_progress.py",)
CLI_ENDINGS = ("tests/unit/test_cli_endings.py",)
LAUNCHED = ("tests/distributed/test_launched.py",)
WHOLE_FILE = ("tests/unit/test_whole_file.py",)
IN_TRAINING = ("tests/unit/test_failures_in_training.py",)
TERMINATION = ("tests/unit/test_termination.py",)
FINGERPRINT = ("tests/unit/test_fingerprint.py",)
RESUME_CHECK = ("tests/unit/test_resume_check.py",)
ENVIRONMENT = ("tests/unit/test_environment.py",)
SCHEDULE = ("tests/unit/test_schedule.py",)
ASSETS = ("tests/unit/test_assets.py",)
SAMPLER = ("tests/unit/test_sampler.py",)
OPTIMIZER = ("tests/unit/test_optimizer_state.py",)
LEARNING_RATE = ("tests/unit/test_learning_rate.py",)
DIFFERENCES = ("tests/unit/test_resume_differences.py",)
RESUMABLE = ("tests/unit/test_resumable.py",)
SECTIONS = ("tests/unit/test_sections.py",)
ZARR_EXPORT = ("tests/unit/test_zarr_export.py",)
ZARR_HOSTILE = ("tests/unit/test_zarr_hostile.py",)
SAFETENSORS = ("tests/unit/test_safetensors_export.py",)
DIFFERENCES_OF_NUMBERS = ("tests/unit/test_number_differences.py",)
COMPARING = ("tests/unit/test_comparing.py",)
VALUES_OF_TENSORS = ("tests/unit/test_tensor_values.py",)
CLI_VALUES = ("tests/unit/test_cli_values.py",)
INSPECTING = ("tests/unit/test_inspecting.py",)
CLI_INSPECT = ("tests/unit/test_cli_inspect.py",)
INSPECT_PAGE = ("tests/unit/test_inspect_page.py",)
SAVE_POWER_CUT = ("tests/crash/test_save_power_cut.py",)
IO_FAULTS = ("tests/crash/test_io_faults.py",)
RESHARDING = ("tests/unit/test_resharding_layouts.py",)
RESHARDING_CASES = ("tests/unit/test_resharding_cases.py",)
RESHARDING_PLANS = ("tests/unit/test_resharding_plans.py",)
RESHARDING_LIMITS = ("tests/unit/test_resharding_limits.py",)
RESHARDING_FAULTS = ("tests/crash/test_reshard_faults.py",)
ROLL_BACK = ("tests/crash/test_roll_back.py",)
READER = ("tests/crash/test_reader_beside_writer.py",)

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


POSIX = "distckpt/storage/posix.py"
CUDA = "distckpt/transport/cuda.py"
NUMBERS = "distckpt/number_differences.py"
PAIRS = "distckpt/paired_reading.py"
TENSOR_VALUES = "distckpt/tensor_values.py"
MUTANTS = (
    # Files and directories of the file system
    Mutant("no fsync of small files", POSIX, "            os.fsync(descriptor)\n", "", POWER_CUT),
    Mutant("no fsync of shard files", POSIX, "            file.sync()\n", "", POWER_CUT),
    Mutant("no fsync of any directory", POSIX, "        _C.sync_directory(path)\n", "        pass\n", POWER_CUT),
    Mutant(
        "no fsync of the parent of a new directory",
        POSIX,
        "            self._make_one_directory(path)\n            _sync_directory(parent)\n",
        "            self._make_one_directory(path)\n",
        POWER_CUT,
    ),
    Mutant(
        "no fsync in sync_directory",
        POSIX,
        "        _sync_directory(self._directory_path(directory))\n",
        "        pass\n",
        POWER_CUT,
    ),
    Mutant(
        "no fsync of the directory after put_if_absent",
        POSIX,
        "        if linked:\n            _sync_directory(os.path.dirname(path))\n",
        "",
        POWER_CUT,
    ),
    Mutant(
        "no fsync of the directory after replace",
        POSIX,
        "            raise\n        _sync_directory(os.path.dirname(path))\n",
        "            raise\n",
        POWER_CUT,
    ),
    Mutant(
        "no fsync of the parent of a root that is there",
        POSIX,
        "        with suppress(PermissionError):\n            _sync_directory(os.path.dirname(path))\n",
        "",
        POWER_CUT + STORAGE,
    ),
    Mutant(
        "no fsync of the parent of a new root",
        POSIX,
        "            self._make_one_directory(path)\n            _sync_directory(os.path.dirname(path))\n",
        "            self._make_one_directory(path)\n",
        POWER_CUT + STORAGE,
    ),
    Mutant(
        "path is not compared with the open file",
        POSIX,
        "            if not file.is_named(file.path):\n",
        "            if False:\n",
        STORAGE,
    ),
    Mutant(
        "lost reply of link() is not recognised",
        POSIX,
        "            if os.path.samestat(written, os.lstat(path)):\n",
        "            if False:\n",
        STORAGE,
    ),
    Mutant(
        "a failed fsync of a shard file is tried again",
        POSIX,
        "            file.sync()\n",
        "            with suppress(OSError):\n                file.sync()\n            file.sync()\n",
        IO_FAULTS,
    ),
    Mutant(
        "a failed close of a shard file is no failure",
        POSIX,
        "            self._file = None\n            file.close()\n",
        "            self._file = None\n            with suppress(OSError):\n                file.close()\n",
        IO_FAULTS,
    ),
    Mutant(
        "a failed fsync of a small file is tried again",
        POSIX,
        "            os.fsync(descriptor)\n",
        "            with suppress(OSError):\n                os.fsync(descriptor)\n            os.fsync(descriptor)\n",
        IO_FAULTS,
    ),
    Mutant(
        "a failed fsync of a directory is no failure",
        POSIX,
        "        if error.errno != errno.EINVAL:\n            raise\n",
        "        pass\n",
        IO_FAULTS,
    ),
    Mutant(
        "names may lead outside the root",
        "distckpt/storage/names.py",
        'segment in ("", ".", "..")',
        'segment in ("", ".")',
        STORAGE,
    ),
    # The commit protocol
    Mutant(
        "no fence before a save is announced",
        "distckpt/commit.py",
        "        self.check_fence()\n        directory = iteration_directory(iteration)\n",
        "        directory = iteration_directory(iteration)\n",
        COMMIT,
    ),
    Mutant(
        "no fence before the commit",
        "distckpt/commit.py",
        "            self.storage.sync_directory(commit.directory)\n            self.check_fence()\n",
        "            self.storage.sync_directory(commit.directory)\n",
        COMMIT,
    ),
    Mutant(
        "fence is looked at before the files are durable",
        "distckpt/commit.py",
        "            self.storage.sync_directory(commit.directory)\n            self.check_fence()\n",
        "            self.check_fence()\n            self.storage.sync_directory(commit.directory)\n",
        COMMIT,
    ),
    Mutant(
        "no fence after the commit",
        "distckpt/commit.py",
        "        try:\n            self.check_fence()\n        except (FencedError, OSError) as error:\n",
        "        try:\n            pass\n        except (FencedError, OSError) as error:\n",
        COMMIT,
    ),
    Mutant(
        "nobody looks after the commit whether its files were swept",
        "distckpt/commit.py",
        "        self._check_files(commit, index)\n",
        "",
        COMMIT,
    ),
    Mutant(
        "the index of files that were swept goes until a power cut",
        "distckpt/commit.py",
        "remove(commit.name)\n                self.storage.sync_directory(commit.directory)\n",
        "remove(commit.name)\n",
        COMMIT,
    ),
    Mutant(
        "a file that is not listed counts as gone",
        "distckpt/commit.py",
        "if name not in listed and _is_gone(",
        "if name not in listed and bool(",
        COMMIT,
    ),
    Mutant(
        "no fence before cleaning up",
        "distckpt/after_commit.py",
        "            writer.check_fence()\n            free =",
        "            free =",
        REMOVAL,
    ),
    Mutant(
        "no sync of the files before the commit",
        "distckpt/commit.py",
        "            self.storage.sync_directory(commit.directory)\n            self.check_fence()\n",
        "            self.check_fence()\n",
        COMMIT,
    ),
    Mutant(
        "no sync of the files before the commit, by power cuts",
        "distckpt/commit.py",
        "            self.storage.sync_directory(commit.directory)\n            self.check_fence()\n",
        "            self.check_fence()\n",
        SAVE_POWER_CUT,
    ),
    Mutant(
        "an index that can be seen counts as durable",
        "distckpt/commit.py",
        "            self.storage.sync_directory(commit.directory)  # What can be seen can still be lost.\n",
        "",
        COMMIT,
    ),
    Mutant(
        "another's index under our name counts as ours",
        "distckpt/commit.py",
        "            if read_head(self.storage, commit).save_id != save_id:\n",
        "            if False:\n",
        COMMIT,
    ),
    Mutant(
        "number of a failed commit is used again",
        "distckpt/commit.py",
        "        self.commit_seq += 1\n        try:\n            self._put_index(",
        "        try:\n            self.commit_seq += None is self._put_index(",
        COMMIT,
    ),
    Mutant(
        "an index counts under any name",
        "distckpt/commit.py",
        "    if found != commit:\n",
        "    if False:\n",
        COMMIT,
    ),
    Mutant(
        "a committed save is discarded",
        "distckpt/removing.py",
        "    if committed is None or save_id in committed:\n",
        "    if committed is None:\n",
        REMOVAL,
    ),
    Mutant(
        "a save that may be committed is discarded",
        "distckpt/removing.py",
        "    if committed is None or save_id in committed:\n",
        "    if committed is not None and save_id in committed:\n",
        REMOVAL,
    ),
    Mutant(
        "no sync after an index is removed, nor before its files go",
        "distckpt/removing.py",
        "        storage.remove(commit.name)\n        storage.sync_directory(commit.directory)\n",
        "        storage.remove(commit.name)\n",
        REMOVAL,
    ),
    Mutant(
        "no sync before files of a removed index go",
        "distckpt/removing.py",
        "        storage.sync_directory(directory)\n    for name in garbage:\n",
        "    for name in garbage:\n",
        REMOVAL,
    ),
    Mutant(
        "no sync after a sweep",
        "distckpt/removing.py",
        "        storage.sync_directory(directory)\n        storage.remove_directory(directory)\n",
        "        storage.remove_directory(directory)\n",
        REMOVAL,
    ),
    Mutant(
        "no sync after a sweep of temporaries beside the tracker",
        "distckpt/removing.py",
        '        storage.sync_directory("")\n',
        "        pass\n",
        REMOVAL,
    ),
    Mutant(
        "a sweep lists a directory once",
        "distckpt/removing.py",
        "        confirmed = set(_garbage(storage, iteration, grace_s))\n",
        "        confirmed = set(garbage)\n",
        REMOVAL,
    ),
    Mutant(
        "a checkpoint that is replaced while it is listed counts as absent",
        "distckpt/commit.py",
        "        if names == earlier or (commits and not is_retired):\n",
        "        if True:\n",
        READER,
    ),
    Mutant(
        "a checkpoint that is replaced while it is listed gives way to an older one",
        "distckpt/commit.py",
        "        if names == earlier or (commits and not is_retired):\n",
        "        if names == earlier or commits:\n",
        READER,
    ),
    Mutant(
        "a load falls back to an abandoned branch first",
        "distckpt/candidates.py",
        "(by_lineage(storages[0], commits) if by_branch else commits)",
        "commits",
        ROLL_BACK,
    ),
    Mutant(
        "retention keeps an abandoned branch first",
        "distckpt/pruning.py",
        "order_by_lineage([record.commit for record in records], heads)",
        "()",
        ROLL_BACK,
    ),
    Mutant(
        "retention lets sound ones go for an unsound one",
        "distckpt/pruning.py",
        "not record.is_unsound and not record.missing and record.commit not in unsound",
        "not record.missing",
        READ_BACK,
    ),
    # Readable names
    Mutant(
        "links: those of other people are removed",
        "distckpt/link_names.py",
        "                    if target.startswith(_OURS):\n",
        "                    if True:\n",
        LINK_NAMES,
    ),
    Mutant(
        "links: one may look like a file of ours",
        "distckpt/link_names.py",
        "if not name or _RESERVED.match(name) else name",
        "if not name else name",
        LINK_NAMES,
    ),
    Mutant(
        "links: two checkpoints of one name have one link",
        "distckpt/link_names.py",
        "if count[name] > 1 or name in taken:",
        "if name in taken:",
        LINK_NAMES,
    ),
    # Permission bits and group
    Mutant(
        "access: shard files have what the umask leaves",
        POSIX,
        "                file.set_access(self._access.file_mode, self._access.group)\n",
        "                pass\n",
        ACCESS,
    ),
    Mutant(
        "access: small files have what the umask leaves", POSIX, "            access.apply(descriptor)\n", "", ACCESS
    ),
    Mutant(
        "access: the history has what the umask leaves",
        POSIX,
        "            if is_new:\n                self._access.apply(descriptor)\n",
        "",
        ACCESS,
    ),
    Mutant(
        "access: directories have what the umask leaves",
        POSIX,
        "                self._access.apply(descriptor, is_directory=True)\n",
        "                pass\n",
        ACCESS,
    ),
    # Copies in a second root
    Mutant(
        "copy: the index goes before the directory is synced",
        "distckpt/copying.py",
        "            target.sync_directory(commit.directory)\n            may_publish()\n            if not",
        "            may_publish()\n            if not",
        COPYING,
    ),
    Mutant(
        "copy: a job that was replaced publishes",
        "distckpt/copying.py",
        "            may_publish()\n            if not",
        "            if not",
        COPIER,
    ),
    Mutant(
        "copy: one that is published as a newer job comes counts",
        "distckpt/copying.py",
        "            may_publish()  # Again",
        "            #",
        COPIER,
    ),
    Mutant(
        "copy: what retention takes at once is copied",
        "distckpt/copier.py",
        "        if self._is_outlived(commit):\n",
        "        if False:\n",
        COPIER,
    ),
    Mutant(
        "copy: the fence of the second root is not looked at",
        "distckpt/commit.py",
        "        if self.second is not None:\n            self._check_fence_of(self.second)\n",
        "",
        COPIER,
    ),
    Mutant(
        "copy: a file has its name before it is whole",
        "distckpt/copying.py",
        'temporary = f"{directory}/.tmp-{secrets.token_hex(16)}"',
        'temporary = f"{directory}/{name}"',
        COPYING,
    ),
    Mutant(
        "copy: what was retired there once stays garbage",
        "distckpt/copying.py",
        '        target.remove(f"{commit.directory}/retired-{index.save_id}")\n',
        "",
        COPYING,
    ),
    Mutant(
        "copy: one whose files were swept away counts",
        "distckpt/copying.py",
        "            copy.check_names()\n",
        "",
        COPYING,
    ),
    Mutant(
        "copy: retention takes what is protected in the source",
        "distckpt/copier.py",
        "        spared = _protected(records)\n",
        "        spared: set[Commit] = set()\n",
        COPIER,
    ),
    Mutant(
        "copy: a protected checkpoint is taken for outlived",
        "distckpt/copier.py",
        " and commit not in _protected(_labelled(self.source))",
        "",
        COPIER,
    ),
    Mutant(
        "copy: labels that cannot be read protect no copy",
        "distckpt/copying.py",
        " or found.damage is not None",
        "",
        COPYING,
    ),
    Mutant(
        "copy: what is being retired is begun to be copied",
        "distckpt/copier.py",
        " - tried - self._retiring",
        " - tried",
        COPIER,
    ),
    Mutant(
        "copy: what is older than the newest copy is not looked back for",
        "distckpt/copier.py",
        "            earlier = missing - unsound_commits(self.source, missing)\n",
        "            earlier = {c for c in missing if list_commits(self.target)[:1] < [c]}\n",
        COPIER,
    ),
    Mutant(
        "copy: what was saved again is copied, and removed",
        "distckpt/copier.py",
        "(has_enough or commit.iteration in newer)",
        "has_enough",
        COPIER,
    ),
    Mutant(
        "copy: a root of another run is a target",
        "distckpt/copying.py",
        "    if _saves_and_parents(source, list_commits(source)).isdisjoint(",
        "    if False and _saves_and_parents(source, list_commits(source)).isdisjoint(",
        COPYING,
    ),
    Mutant(
        "copy: an iteration's directory is a target",
        "distckpt/copying.py",
        "    check_place(target)\n",
        "",
        COPYING,
    ),
    Mutant(
        "tensor source: a block between two extents is not kept",
        "distckpt/tensor_source.py",
        "for extent in reads.extents for end in extent",
        "for extent in reads.ranges for end in (extent[0] + 1, extent[1] - 1)",
        ("tests/unit/test_tensor_source.py",),
    ),
    Mutant(
        "decoding: two threads may find out what a type is",
        "distckpt/decoding.py",
        "        with _finding_out:\n",
        "        if _finding_out:\n",
        ("tests/unit/test_decoding.py",),
    ),
    Mutant(
        "claim: a number that was given and whose file has gone is given again",
        "distckpt/commit.py",
        " and not any(other > epoch for root in roots for other in writer_epochs(root))",
        "",
        COMMIT,
    ),
    Mutant(
        "copy: a second root that cannot be claimed does not count in the order",
        "distckpt/roots.py",
        "        above = highest_epoch(second)\n",
        "        above = 0\n",
        COPIER,
    ),
    Mutant(
        "copy: it goes on to a root that was not claimed",
        "distckpt/after_commit.py",
        " and writer.second is not None",
        "",
        COPIER,
    ),
    Mutant(
        "load: later work in the first root is not told of",
        "distckpt/candidates.py",
        "    if head.created_unix_s <= created_unix_s:\n",
        "    if True:\n",
        COPIER,
    ),
    Mutant(
        "load: later work in the first root is removed",
        "distckpt/checkpointer.py",
        "self._has_resumed = not load.leaves_newer",
        "self._has_resumed = True",
        COPIER,
    ),
    Mutant(
        "copy: what is there is taken for whole",
        "distckpt/copying.py",
        "if name in there and self._is_whole(open_file):",
        "if name in there:",
        COPYING,
    ),
    Mutant(
        "copy: what is there is copied again",
        "distckpt/copying.py",
        "if name in there and self._is_whole(open_file):",
        "if False:",
        COPYING,
    ),
    Mutant(
        "copy: another checkpoint in its place is taken for it",
        "distckpt/copying.py",
        "        if found != data:\n",
        "        if False:\n",
        COPYING,
    ),
    Mutant(
        "copy: the chunk table is not checked",
        "distckpt/copying.py",
        "    check_pages(data[: table.records_bytes], 0, trailer, where=name)\n",
        "",
        COPYING,
    ),
    Mutant(
        "copy: an older one takes the tracker",
        "distckpt/copying.py",
        "if list_commits(target)[0] == commit and",
        "if",
        COPYING,
    ),
    Mutant(
        "copy: retention takes what is being copied",
        "distckpt/pruning.py",
        "if verdict.stays or may_retire(verdict.commit)",
        "",
        COPIER,
    ),
    Mutant(
        "copy: what waits to be gone on with is swept",
        "distckpt/copier.py",
        "                    self.target.replace(marker, str(writer.epoch).encode())\n",
        "                    pass\n",
        COPIER,
    ),
    Mutant(
        "copy: what an earlier job did not get to is forgotten",
        "distckpt/copier.py",
        "            self._look_back()\n",
        "            pass\n",
        COPIER,
    ),
    Mutant(
        "load: over two roots it falls back to an abandoned branch first",
        "distckpt/candidates.py",
        "        ordered = order_by_lineage(ordered, _heads(storages, found))\n",
        "        pass\n",
        COPIER,
    ),
    Mutant(
        "copy: the oldest goes first",
        "distckpt/copier.py",
        "max(left, default=None)",
        "min(left, default=None)",
        COPIER,
    ),
    Mutant(
        "copy: epochs go by the first root alone",
        "distckpt/commit.py",
        "roots = [storage] if second is None else [storage, second]",
        "roots = [storage]",
        COPIER,
    ),
    Mutant(
        "load: what the second root has is not looked for",
        "distckpt/candidates.py",
        "for root, commits in enumerate(found) if commit in commits]",
        "for root, commits in enumerate(found[:1]) if commit in commits]",
        COPIER,
    ),
    Mutant(
        "load: a root that cannot be looked at is taken for empty",
        "distckpt/candidates.py",
        "        except CheckpointNotFoundError as error:\n            found",
        "        except (OSError, CheckpointNotFoundError) as error:\n            found",
        COPIER,
    ),
    Mutant(
        "every rank copies to a root of its own",
        "distckpt/opening.py",
        "if place.copied_to != ranks[0].copied_to:",
        "if False:",
        COPIER,
    ),
    Mutant(
        "hooks: one that fails stops the others",
        "distckpt/after_commit.py",
        "        except Exception as error:\n",
        "        except ZeroDivisionError as error:\n",
        AFTER_COMMIT,
    ),
    Mutant(
        "history: a torn line takes the next one with it",
        POSIX,
        'line = b"\\n" + data if is_torn else data',
        "line = data",
        STORAGE,
    ),
    Mutant("history: a cut line counts as written", POSIX, "if written != len(line):", "if False:", STORAGE),
    Mutant(
        "history: it grows without end",
        "distckpt/history_log.py",
        "if size_bytes + len(data) > MAX_FILE_BYTES:",
        "if False:",
        HISTORY,
    ),
    Mutant(
        "history: lines have any length",
        "distckpt/history_log.py",
        "if len(data) <= MAX_LINE_BYTES or line.report is None:",
        "if True:",
        HISTORY,
    ),
    Mutant(
        "history: a job that was fenced writes on",
        "distckpt/after_commit.py",
        "            if writer is not None:\n                writer.check_fence()\n",
        "",
        HISTORY,
    ),
    Mutant(
        "history: who only reads begins one",
        "distckpt/after_commit.py",
        "line, make=False)",
        "line)",
        HISTORY,
    ),
    Mutant(
        "history: what is no line ends the reading",
        "distckpt/history_log.py",
        "except (msgspec.DecodeError, RecursionError, ValueError):",
        "except ZeroDivisionError:",
        HISTORY,
    ),
    # What follows a commit
    Mutant(
        "a save judges room while the one before is still cleaned up after",
        "distckpt/saving.py",
        "        context.after_commit.wait(context.timeout_s / 2)\n",
        "",
        AFTER_COMMIT,
    ),
    Mutant(
        "room that cleaning up gave is not counted for other hosts",
        "distckpt/offer.py",
        "if free_before is None else",
        "if True else",
        AFTER_COMMIT,
    ),
    Mutant(
        "what there is, is looked at while it is cleaned up",
        "distckpt/checkpointer.py",
        "        self._after_commit.wait(self._save_context.timeout_s / 2)\n",
        "        pass\n",
        AFTER_COMMIT,
    ),
    Mutant(
        "closing does not wait for what follows a commit",
        "distckpt/after_commit.py",
        "        is_idle = self.wait(timeout_s)\n",
        "        is_idle = True\n",
        AFTER_COMMIT,
    ),
    Mutant(
        "a load goes by a list that is outdated",
        "distckpt/loading.py",
        "                candidates = self._candidates()  # Listed anew",
        "                #",
        READER,
    ),
    Mutant(
        "a sweep fails where another job removes a directory",
        "distckpt/removing.py",
        "        except FileNotFoundError:\n            continue  # It went since it was listed",
        "        except ZeroDivisionError:\n            continue  #",
        REMOVAL,
    ),
    Mutant(
        "a save fails whose empty directory another job removes",
        "distckpt/commit.py",
        "        except FileNotFoundError:  # A job that was fenced has removed the directory",
        "        except ZeroDivisionError:  #",
        COMMIT,
    ),
    Mutant(
        "a sweep takes a save under way for dead",
        "distckpt/removing.py",
        "        is_under_way = save_id in groups.pending and not _is_dead(storage, pending)\n",
        "        is_under_way = False\n",
        REMOVAL,
    ),
    Mutant(
        "a sweep takes the save of a fenced job for alive",
        "distckpt/removing.py",
        "    return is_fenced or _is_older(storage, marker, STALE_AFTER_S)\n",
        "    return _is_older(storage, marker, STALE_AFTER_S)\n",
        COMMIT,
    ),
    Mutant(
        "no grace for readers",
        "distckpt/removing.py",
        "        has_grace = save_id in groups.retired and not _is_older(storage, retired, grace_s)\n",
        "        has_grace = False\n",
        REMOVAL,
    ),
    Mutant(
        "retention forgets the tracker",
        "distckpt/retention.py",
        "        elif commit == of_tracker:\n",
        "        elif False:\n",
        REMOVAL,
    ),
    # The life of checkpoints
    Mutant(
        "retention: the newest goes too",
        "distckpt/retention.py",
        "        if commit == newest:\n",
        "        if False:\n",
        RETENTION,
    ),
    Mutant(
        "retention: the last good one goes too",
        "distckpt/retention.py",
        "        elif wanted and commit == wanted[0].commit:\n",
        "        elif False:\n",
        RETENTION,
    ),
    Mutant(
        "retention: pins and tags protect nothing",
        "distckpt/retention.py",
        "        elif fact.is_protected:\n",
        "        elif False:\n",
        RETENTION,
    ),
    Mutant(
        "retention: a bad checkpoint takes a place",
        "distckpt/retention.py",
        "        return self.is_readable and self.is_sound\n",
        "        return True\n",
        RETENTION,
    ),
    Mutant(
        "retention: an unsound one goes for an older one",
        "distckpt/retention.py",
        "            if rival is None or rival < fact.commit:\n",
        "            if rival is None:\n",
        RETENTION,
    ),
    Mutant(
        "retention: bytes are counted from the wrong end",
        "distckpt/retention.py",
        "for fact in reversed(ordered) if fact.commit in kept and",
        "for fact in ordered if fact.commit in kept and",
        RETENTION,
    ),
    Mutant(
        "labels that may not be read stop everybody",
        "distckpt/labels.py",
        "lacks_rights = may_lack_rights and isinstance",
        "lacks_rights = False and isinstance",
        LABELS,
    ),
    Mutant(
        "labels that may not be read are written over",
        "distckpt/labels.py",
        "lacks_rights = may_lack_rights and isinstance",
        "lacks_rights = isinstance",
        LABELS,
    ),
    Mutant(
        "the umask says who may read labels",
        "distckpt/labelling.py",
        "            storage = _with_access_of(storage, commit)\n",
        "            pass\n",
        ACCESS,
    ),
    Mutant(
        "retention: labels that cannot be read protect nothing",
        "distckpt/pruning.py",
        " or labels.damage is not None",
        "",
        LABELS,
    ),
    Mutant(
        "removing: labels that came meanwhile are not looked at",
        "distckpt/removing.py",
        "may_lack_rights=True).number != labels.get(commit, 0):\n",
        "may_lack_rights=True).number < 0:\n",
        LABELS,
    ),
    Mutant(
        "removing: the marker of another removal is taken away",
        "distckpt/removing.py",
        "            if is_own:  #",
        "            if True:  #",
        LABELS,
    ),
    Mutant(
        "removing: a sweep takes the marker of a removal under way",
        "distckpt/removing.py",
        'if not (is_being_retired and f.startswith("retired-"))]',
        "]",
        LABELS,
    ),
    Mutant(
        "labels: whether the checkpoint is still there is not looked at",
        "distckpt/labels.py",
        "        _check_is_there(storage, commit, save_id)\n",
        "",
        LABELS,
    ),
    Mutant(
        "labels: the marker of a removal is not looked at",
        "distckpt/labels.py",
        '        if f"retired-{save_id}" not in names:\n',
        "        if True:\n",
        LABELS,
    ),
    Mutant(
        "labels: a change under an old number counts as made",
        "distckpt/labels.py",
        "        if numbers and numbers[-1] > number:\n",
        "        if False:\n",
        LABELS,
    ),
    Mutant(
        "labels: of whom they are is not looked at",
        "distckpt/labels.py",
        "    if (labels.format, labels.save_id, labels.number) != (FORMAT, save_id, number):\n",
        "    if False:\n",
        LABELS,
    ),
    Mutant(
        "labels: a tag that is removed comes back from where it was before",
        "distckpt/labelling.py",
        "    _take_from_others(storage, removed, commit)\n",
        "",
        LABELS,
    ),
    Mutant(
        "selectors: a damaged one gives way to another",
        "distckpt/selecting.py",
        "    if not isinstance(wanted, str):\n        return _of_iteration(storage, wanted)\n",
        "    if True:\n        return _of_iteration(storage, None)\n",
        SELECTING,
    ),
    Mutant(
        "selectors: each of two roots has a best of its own",
        "distckpt/loading.py",
        "select_one(storages, selector)",
        "select_one(storages[:1], selector)",
        SELECTING,
    ),
    Mutant(
        "selectors: the best may be known to be bad",
        "distckpt/selecting.py",
        "        if record.is_good:\n",
        "        if True:\n",
        SELECTING,
    ),
    Mutant(
        "roots: one begins inside an iteration",
        "distckpt/roots.py",
        "    if found is not None:\n",
        "    if False:\n",
        SURROUNDINGS,
    ),
    Mutant(
        "surroundings: a job that begins beside other runs is taken for lost",
        "distckpt/surroundings.py",
        "        return\n    roots = sorted(",
        "        around.candidates += [root.path for root in roots]\n        return\n    roots = sorted(",
        SURROUNDINGS,
    ),
    Mutant(
        "agreement: other ranks do not learn what was near a wrong path",
        "distckpt/coordinator/agreement.py",
        "candidates=frozen.candidates",
        "candidates=()",
        SURROUNDINGS,
    ),
    Mutant(
        "surroundings: every name of a directory is looked at",
        "distckpt/surroundings.py",
        "islice(entries, MAX_NAMES)",
        "entries",
        SURROUNDINGS,
    ),
    Mutant(
        "metrics: those of the ranks are not compared",
        "distckpt/offer.py",
        "        if offer.metrics != first.metrics:\n",
        "        if False:\n",
        METRICS,
    ),
    Mutant(
        "metrics: an index made again has none",
        "distckpt/rebuilding.py",
        "        metrics=leader.metrics,\n",
        "",
        METRICS,
    ),
    Mutant(
        "a checkpoint that lacks files takes another's place",
        "distckpt/pruning.py",
        "not record.is_unsound and not record.missing and",
        "not record.is_unsound and",
        PRUNING,
    ),
    Mutant(
        "what parity may make again goes",
        "distckpt/retention.py",
        "        elif fact.is_repairable:\n",
        "        elif False:\n",
        PRUNING,
    ),
    Mutant(
        "prune: a dry run removes",
        "distckpt/pruning.py",
        "    if not dry_run:\n",
        "    if True:\n",
        PRUNING,
    ),
    Mutant(
        "commands: text from disk reaches the terminal as it is",
        "distckpt/cli/output.py",
        'character if character.isprintable() else " " for character in text',
        "character for character in text",
        CLI_LIFE,
    ),
    Mutant(
        "commands: a second signal ends nothing",
        "distckpt/cli/interruption.py",
        "            os._exit(128 + number)\n",
        "            pass\n",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: what a launcher passes on counts as a second signal",
        "distckpt/cli/interruption.py",
        "        elif now - first_at > _SAME_S:\n",
        "        else:\n",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: no signal is heard while they are imported",
        "distckpt/cli/__init__.py",
        "        interrupted = interruption_in(error)\n",
        "        interrupted = None\n",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: an empty path is the current directory",
        "distckpt/cli/running.py",
        "        _check_not_empty(arguments)\n",
        "",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: an ignored signal is heard",
        "distckpt/cli/interruption.py",
        " if signal.getsignal(number) is not signal.SIG_IGN]",
        "]",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: a full disk below standard output is no error",
        "distckpt/cli/running.py",
        "        _print_text(_message(error))\n        code = NOT_DONE\n",
        "        code = 0\n",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: a closed stream is taken by the next file",
        "distckpt/cli/running.py",
        "        if getattr(sys, name) is None:\n",
        "        if False:\n",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: a copy may go anywhere",
        "distckpt/cli/copy.py",
        "    check_place(copies)\n",
        "",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: an error writes to the terminal what was read",
        "distckpt/cli/running.py",
        "{harmless_text(message)}",
        "{message}",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: an interrupted import is a failed one",
        "distckpt/cli/interruption.py",
        "    while error is not None and not isinstance(error, Interrupted):\n"
        "        error = error.__cause__ or error.__context__\n    return error\n",
        "    return error if isinstance(error, Interrupted) else None\n",
        CLI_ENDINGS,
    ),
    Mutant(
        "cat: a pipe or device is replaced",
        TENSOR_VALUES,
        "    if os.path.exists(path) and not os.path.isfile(path):\n",
        "    if False:\n",
        VALUES_OF_TENSORS,
    ),
    Mutant(
        "diff: nothing is equal to nothing",
        "distckpt/comparing.py",
        "    for glob in unmatched_globs((*select, *drop), known):\n",
        "    for glob in ():\n",
        COMPARING,
    ),
    Mutant(
        "commands: a file that is not finished takes its place",
        "distckpt/cli/whole_file.py",
        "        yield temporary\n        os.replace(temporary, path)\n    except",
        "        os.rename(path, temporary) if path.exists() else temporary.touch()\n        temporary.rename(path)\n"
        "        yield path\n    except",
        WHOLE_FILE,
    ),
    Mutant(
        "commands: half of a file stays",
        "distckpt/cli/whole_file.py",
        "            temporary.unlink()\n",
        "            pass\n",
        WHOLE_FILE,
    ),
    Mutant(
        "commands: steps of several threads are lost",
        "distckpt/cli/output.py",
        "        with self._lock:\n            self._bytes += step\n",
        "        before = self._bytes\n        time.sleep(0)\n        self._bytes = before + step\n",
        CLI_PROGRESS,
    ),
    # Ranks of a command
    Mutant(
        "launched: ranks that were started again meet those that died",
        "distckpt/coordinator/launched.py",
        "/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        "",
        LAUNCHED,
    ),
    Mutant(
        "launched: nobody waits for the others",
        "distckpt/coordinator/launched.py",
        "    _meet(coordinator, timeout_s)\n    return coordinator\n\n\n@dataclass",
        "    return coordinator\n\n\n@dataclass",
        LAUNCHED,
    ),
    Mutant(
        "launched: the wait for rank 0 has no bound",
        "distckpt/coordinator/launched.py",
        "                if time.monotonic() > deadline:\n                    raise TimeoutError",
        "                if False:\n                    raise TimeoutError",
        LAUNCHED,
    ),
    Mutant(
        "launched: rank 0 ends before the others know who did not come",
        "distckpt/coordinator/launched.py",
        "            coordinator.close()  # It hosts the store from which the others learn who is not there.\n",
        "            pass\n",
        LAUNCHED,
    ),
    # Checksums and what belongs to them
    Mutant("index: no checksum", "distckpt/checked_json.py", "    if found != stated:\n", "    if False:\n", INDEX),
    Mutant(
        "index: file names are not looked at",
        "distckpt/index.py",
        "        if not _FILE_NAME.fullmatch(name) or index.save_id not in name:\n",
        "        if False:\n",
        INDEX,
    ),
    Mutant(
        "index: files of another save are taken",
        "distckpt/index.py",
        "        if not _FILE_NAME.fullmatch(name) or index.save_id not in name:\n",
        "        if not _FILE_NAME.fullmatch(name):\n",
        INDEX,
    ),
    Mutant(
        "shard file: no length",
        "distckpt/checkpoint_files.py",
        "            check_length(self._file, size_bytes, who_says)\n",
        "            pass\n",
        DAMAGE,
    ),
    Mutant(
        "shard file: no checksum of header and table",
        "distckpt/checkpoint_files.py",
        "        if found != crc:\n",
        "        if False:\n",
        DAMAGE,
    ),
    Mutant(
        "shard file: no checksum of the header",
        "distckpt/checkpoint_files.py",
        "        if found != crc:\n",
        '        if found != crc and what != "header":\n',
        DAMAGE,
    ),
    Mutant(
        "shard file: no checksum of the checksum table",
        "distckpt/checkpoint_files.py",
        "        if found != crc:\n",
        '        if found != crc and what == "header":\n',
        DAMAGE,
    ),
    Mutant(
        "shard file: no checksum of blocks",
        "distckpt/checkpoint_files.py",
        "        if bad is None:\n",
        "        if bad is None or bad:\n",
        DAMAGE,
    ),
    Mutant(
        "shard file: only the first block of a run is checked",
        "distckpt/storage/checked.py",
        "            bad = np.flatnonzero(found != expected[first : first + count])\n",
        "            bad = np.flatnonzero(found[:1] != expected[first : first + 1])\n",
        DAMAGE,
    ),
    Mutant(
        "shared reads: a slot is filled while it is being taken from",
        "distckpt/shared_reading.py",
        "        return all(self._board.taken(user) > window for user in users)\n",
        "        return True\n",
        SHARED_READING,
    ),
    Mutant(
        "shared reads: who can make no file in memory is waited for",
        "distckpt/host_group.py",
        "        os.close(os.open(DIRECTORY, os.O_TMPFILE | os.O_RDWR, 0o600))",
        "        os.close(os.dup(2))",
        SHARED_READING,
    ),
    Mutant(
        "reads without a template: memory is taken before the sizes of files are looked at",
        "distckpt/checkpoint_files.py",
        "            check_length(file, expected.size_bytes)\n",
        "            pass\n",
        ("tests/unit/test_hostile_checkpoint.py",),
    ),
    Mutant(
        "chunk records: those of an earlier save, though chunks have moved",
        "distckpt/assembling.py",
        "    if earlier is not None and earlier.plan is plan and earlier.digest == digest:\n",
        "    if earlier is not None and earlier.plan is plan:\n",
        PLAN_REUSE,
    ),
    Mutant(
        "no heartbeat while a save is written in the call",
        "distckpt/saving.py",
        "            with self._heartbeat():\n                self._write()\n            self.staged.set()\n",
        "            self._write()\n            self.staged.set()\n",
        ("tests/unit/test_checkpointer.py",),
    ),
    Mutant(
        "shared reads: a slot is taken from before it is filled",
        "distckpt/shared_reading.py",
        "        return self._board.published(publisher) > window\n",
        "        return True\n",
        SHARED_READING,
    ),
    Mutant(
        "shared reads: who fails does not stop the others",
        "distckpt/host_group.py",
        "            self._memory.exchange(_FAILED, 0, self.position + 1)\n",
        "            pass\n",
        SHARED_READING,
    ),
    Mutant(
        "shared reads: a silent rank is waited for",
        "distckpt/host_group.py",
        "            elif time.monotonic() - changed_s > self._silence_s:\n",
        "            elif False:\n",
        SHARED_READING,
    ),
    Mutant(
        "shared reads: the name stays",
        "distckpt/host_group.py",
        "            os.unlink(self._path)\n",
        "            pass\n",
        SHARED_READING,
    ),
    Mutant(
        "shared reads: some share although one has no room",
        "distckpt/host_group.py",
        "        if any(self._load(_STAGE, p) == _NO_ROOM for p in range(self.size)):\n",
        "        if self._load(_STAGE, self.position) == _NO_ROOM:\n",
        SHARED_READING,
    ),
    Mutant(
        "shared reads: another's failure hides its reason",
        "distckpt/loading.py",
        "sorted((r.is_echo, rank) for",
        "sorted((False, rank) for",
        SHARED_READING,
    ),
    Mutant(
        "shard file: header and index may disagree about a tensor",
        "distckpt/reader.py",
        "        file.check_entries(reads.entries)\n",
        "        pass\n",
        ("tests/unit/test_hostile_checkpoint.py",),
    ),
    Mutant(
        "shard file: header and index may disagree about per-rank values",
        "distckpt/checkpoint_files.py",
        "        if entry is None or (self.header.start_of(PER_RANK_ENTRY), *entry.shape) != expected.per_rank:\n",
        "        if False:\n",
        ("tests/unit/test_hostile_checkpoint.py",),
    ),
    Mutant(
        "chunk table: no length",
        "distckpt/checkpoint_files.py",
        "    check_length(file, table.size_bytes)\n",
        "",
        DAMAGE,
    ),
    Mutant(
        "chunk table: no checksum of the trailer",
        "distckpt/checkpoint_files.py",
        "    if crc32c(trailer) != table.trailer_crc:\n",
        "    if False:\n",
        DAMAGE,
    ),
    Mutant(
        "chunk table: no checksum of pages",
        "distckpt/checkpoint_files.py",
        "        check_pages(pages, begin // PAGE_BYTES, trailer, where=file.name)\n",
        "",
        DAMAGE,
    ),
    Mutant(
        "chunk table: pages are compared with nothing",
        "distckpt/chunk_table.py",
        "    bad = np.flatnonzero(found != expected)\n",
        "    bad = []\n",
        CHUNK_TABLE,
    ),
    Mutant(
        "chunk table: chunks may lie anywhere",
        "distckpt/reader.py",
        "        check_locations(index, keys, of_tensor, copies.hits)\n",
        "",
        ("tests/unit/test_hostile_checkpoint.py",),
    ),
    Mutant(
        "located: chunks may lie anywhere",
        "distckpt/located_chunks.py",
        "            check_locations(index, keys, copies.target, copies.hits)\n",
        "",
        ("tests/unit/test_located_chunks.py",),
    ),
    Mutant(
        "reshard: a source that is gone lost a file",
        "distckpt/resharding/job.py",
        "        if planned.commit not in list_commits(planned.storage):\n",
        "        if False:\n",
        RESHARDING_LIMITS,
    ),
    Mutant(
        "reshard: as many blocks in memory whatever is begun together",
        "distckpt/resharding/part.py",
        "    cache = max(CACHE_BYTES, min(_blocks_bytes(begun_blocks), own // 2))\n",
        "    cache = CACHE_BYTES\n",
        RESHARDING_LIMITS,
    ),
    Mutant(
        "plan: replicas may differ",
        "distckpt/planner.py",
        "    differs = np.flatnonzero(found != found[replicas.first])\n",
        "    differs = np.zeros(0, np.int64)\n",
        ALL_RANKS,
    ),
    Mutant(
        "plan: shared values may differ",
        "distckpt/planner.py",
        "            if known != value:\n",
        "            if False:\n",
        PLANNER,
    ),
    Mutant(
        "plan: per-rank values of the same coordinates may differ",
        "distckpt/planner.py",
        "            if writer >= 0 and ranks[rank].per_rank[key] != ranks[writer].per_rank[key]:\n",
        "            if False:\n",
        PLANNER,
    ),
    Mutant(
        "plan: a shard that has changed is written",
        "distckpt/placement.py",
        "    usable = None if given.available is None else given.available[rows]\n",
        "    usable = None\n",
        PLANNER,
    ),
    Mutant(
        "plan: a box that nobody can write is left out",
        "distckpt/placement.py",
        "    if len(gone):\n",
        "    if False:\n",
        PLANNER,
    ),
    Mutant(
        "plan: a tensor may have holes",
        "distckpt/placement.py",
        "    for t in sorted(unfilled):\n",
        "    for t in ():\n",
        PLANNER,
    ),
    # Agreements in use
    Mutant(
        "save: nobody agrees on the plan",
        "distckpt/saving.py",
        'self._agree("plan", self._offer, self._decide_plan, Offer, _Order)',
        "self._decide_plan([self._offer()])[0]",
        ALL_RANKS,
    ),
    Mutant(
        "save: nobody agrees on a new plan",
        "distckpt/saving.py",
        'self._agree("plan anew", self._show_structure, self._decide_anew, RankShards, _Order)',
        "self._decide_anew([self._show_structure()])[0]",
        PLAN_REUSE,
    ),
    Mutant(
        "save: a plan that some ranks do not have is used again",
        "distckpt/saving.py",
        "        if self._share is None or any(offer.plan_id != self._share.plan_id for offer in offers):\n",
        "        if self._share is None:\n",
        PLAN_REUSE,
    ),
    Mutant(
        "save: what a rank copied by the old plan is not said",
        "distckpt/saving.py",
        "        copied = None if self._snapshot is None else",
        "        copied = None if True else",
        PLAN_REUSE,
    ),
    Mutant(
        "save: a rank goes on copying by a plan that failed",
        "distckpt/saving.py",
        "            self.context.share = None  # All ranks plan in their calls next time",
        "            #",
        PLAN_REUSE,
    ),
    Mutant(
        "save: replicas are not compared",
        "distckpt/saving.py",
        "        check_replicas(plan, [written.samples for written in ranks])\n",
        "",
        PLAN_REUSE,
    ),
    Mutant(
        "lazy: what no guarded step changes is copied later too",
        "distckpt/saving.py",
        "            lambda tensor: bool(guarded) and tensor.untyped_storage().data_ptr() in guarded,\n",
        "            lambda tensor: bool(guarded),\n",
        LAZY,
    ),
    Mutant(
        "lazy: a change before the copy is not noticed by its version",
        "distckpt/staging.py",
        "        if self.tensor._version != self.version:\n",
        "        if False:\n",
        LAZY,
    ),
    Mutant(
        "lazy: a change before the copy is not noticed by its values",
        "distckpt/staging.py",
        "            if sample != item.sample:\n",
        "            if False:\n",
        LAZY,
    ),
    Mutant(
        "lazy: memory that was freed is read",
        "distckpt/staging.py",
        "        if self.tensor.untyped_storage().nbytes() < self.storage_bytes:\n",
        "        if False:\n",
        LAZY,
    ),
    Mutant(
        "lazy: a guarded step does not wait for the copy",
        "distckpt/checkpointer.py",
        "        pending.wait_staged()\n",
        "",
        LAZY,
    ),
    Mutant(
        "staging takes more memory than it may",
        "distckpt/arena.py",
        "        if size_bytes > bound:\n",
        "        if False:\n",
        PLAN_REUSE,
    ),
    Mutant(
        "save: nobody agrees on the commit",
        "distckpt/saving.py",
        'self._agree(f"commit {self.save_id}", self._tell, self._decide_commit, Written, _Outcome)',
        "self._decide_commit([self._tell()])[0]",
        ALL_RANKS,
    ),
    Mutant(
        "save: a failed copy of the state is not reported",
        "distckpt/saving.py",
        "            self._error = error if self._error is None else self._error\n",
        "            pass\n",
        ALL_RANKS,
    ),
    Mutant(
        "save: a commit that may have been made is discarded",
        "distckpt/saving.py",
        '            if getattr(error, "committed", "no") == "no":\n',
        "            if True:\n",
        COMMIT,
    ),
    Mutant(
        "load: every rank resolves for itself",
        "distckpt/loading.py",
        'self._agree("resolve", local, self._decide_commit, _Wanted, _Resolved)',
        "self._decide_commit([local()])[0]",
        ALL_RANKS,
    ),
    Mutant(
        "load: ranks may ask for different iterations",
        "distckpt/loading.py",
        "        if any(w != wanted[0] for w in wanted):\n",
        "        if False:\n",
        ALL_RANKS,
    ),
    Mutant(
        "load: every rank matches for itself",
        "distckpt/loading.py",
        'self._agree("match", local, decide, _Match, _Differences)',
        "decide([local()])[0]",
        ALL_RANKS,
    ),
    Mutant(
        "load: every rank falls back by itself",
        "distckpt/loading.py",
        'self._agree("read", local, decide, _ReadOutcome, _ReadOutcome).why',
        "decide([local()])[0].why",
        DAMAGE,
    ),
    Mutant(
        "load: a rank that cannot apply what it read keeps it to itself",
        "distckpt/loading.py",
        "lambda: self._apply(",
        "lambda: _silently(self._apply, ",
        ALL_RANKS,
        SILENTLY,
    ),
    Mutant(
        "read: every rank selects for itself",
        "distckpt/loading.py",
        'self._agree("select", ',
        '_alone(None, "select", ',
        ALL_RANKS,
        ALONE,
    ),
    Mutant(
        "every rank looks for itself which iterations there are",
        "distckpt/checkpointer.py",
        "        return agree(\n",
        "        return _alone(\n",
        ALL_RANKS,
        ALONE,
    ),
    Mutant(
        "every rank opens the root for itself",
        "distckpt/opening.py",
        '    neighbours = agree(coordinator, "open", ',
        '    neighbours = _alone(coordinator, "open", ',
        ALL_RANKS,
        ALONE,
    ),
    Mutant(
        "a failed save that some ranks have seen is asked about alone",
        "distckpt/checkpointer.py",
        "            if unseen is not None:\n                raise unseen\n\n        return agree(\n",
        "            pass\n\n        if unseen is not None:\n            raise unseen\n        return agree(\n",
        ALL_RANKS,
    ),
    Mutant(
        "a failed save that some ranks have seen is not raised by a load",
        "distckpt/loading.py",
        "            if self.unseen is not None:\n",
        "            if False:\n",
        ALL_RANKS,
    ),
    Mutant(
        "a failed save that some ranks have seen is not raised by a save",
        "distckpt/saving.py",
        "            if self.unseen is not None:\n",
        "            if False:\n",
        ALL_RANKS,
    ),
    # Copies from and to accelerators
    Mutant(
        "cuda: copies do not wait for what computes their sources",
        CUDA,
        "            stream.wait_stream(torch.cuda.current_stream(device))\n",
        "",
        TRANSPORT,
    ),
    Mutant(
        "cuda: the allocator is not told of the side stream",
        CUDA,
        "                        pair[device_side].record_stream(stream)\n",
        "",
        TRANSPORT,
    ),
    Mutant(
        "cuda: tensors and memory are not held", CUDA, "self._held = held\n", "self._held: Copies = ()\n", TRANSPORT
    ),
    Mutant("cuda: an event that nobody keeps holds nothing", CUDA, "        in_flight.add(self)\n", "", TRANSPORT),
    Mutant(
        "cuda: a batch that failed is still under way",
        CUDA,
        "AllOf(list(self._in_flight)).wait(_FAILED_BATCH_TIMEOUT_S)",
        "pass",
        TRANSPORT,
    ),
    Mutant(
        "cuda: copies are captured in a graph",
        CUDA,
        "if torch.cuda.is_current_stream_capturing():",
        "if False:",
        TRANSPORT,
    ),
    Mutant("cuda: a wait has no bound", CUDA, "if time.monotonic() >= deadline:", "if False:", TRANSPORT),
    Mutant(
        "cuda: a refused page lock leaves its error to the next kernel",
        CUDA,
        "                    _clear_error(device)\n                    break\n",
        "                    break\n",
        TRANSPORT,
    ),
    Mutant(
        "cuda: a copy crosses the edge of a page-locked segment",
        CUDA,
        "        if not edges:\n            target.copy_",
        "        if True:\n            target.copy_",
        TRANSPORT,
    ),
    Mutant(
        "transport: the sides of a copy may differ in size",
        "distckpt/transport/port.py",
        "        if source.nbytes != target.nbytes:\n",
        "        if False:\n",
        TRANSPORT,
    ),
    Mutant(
        "ring: a slot is read into while it is copied",
        "distckpt/ring.py",
        "in_flight.popleft().wait(timeout_s)",
        "in_flight.popleft()",
        RING,
    ),
    Mutant(
        "ring: memory is given back while it is copied",
        "distckpt/ring.py",
        "            event.wait(timeout_s)\n        except Exception",
        "            pass\n        except Exception",
        RING,
    ),
    Mutant(
        "load: a lazy conjugate is filled as if it were plain",
        "distckpt/filling.py",
        "is_host and not is_lazy(target.data)",
        "is_host",
        RING,
    ),
    Mutant(
        "memory behind the end of a storage that was freed is read",
        "distckpt/transport/elements.py",
        "    if first + size_bytes > storage.nbytes():\n",
        "    if False:\n",
        LAZY,
    ),
    Mutant(
        "load: two tensors are read into one memory at once",
        "distckpt/tied_memory.py",
        "np.flatnonzero(starts[1:] < reach[:-1]) + 1",
        "np.flatnonzero(starts[1:] < 0) + 1",
        TIED,
    ),
    Mutant(
        "load: tied weights of which different values are stored are taken",
        "distckpt/tied_memory.py",
        "        elif not torch.equal(carrier(stored), carrier(view)):\n",
        "        elif False:\n",
        TIED,
    ),
    Mutant(
        "a save goes on when the wait for it was interrupted, and its memory is given to the next",
        "distckpt/checkpointer.py",
        "        unseen = None if self._pending is None else self._pending.take_unseen_error()\n"
        "        self._pending = self._saving = None",
        "        pending, self._pending, self._saving = self._pending, None, None\n"
        "        unseen = None if pending is None else pending.take_unseen_error()\n"
        "        pass",
        INTERRUPTED,
    ),
    # Agreement itself
    Mutant(
        "agree: ranks may be in different phases",
        "distckpt/coordinator/agreement.py",
        "        self._check_phases(reports)\n",
        "",
        AGREEMENT,
    ),
    Mutant(
        "agree: failures of other ranks are not looked at",
        "distckpt/coordinator/agreement.py",
        "        if failures:\n            raise self._failed(failures, self.before)\n",
        "",
        AGREEMENT,
    ),
    Mutant(
        "agree: a rank acts before all hold their decision",
        "distckpt/coordinator/agreement.py",
        "    second.run(partial(matter.take, body), matter.confirm)\n",
        "    matter.take(body)\n",
        AGREEMENT,
    ),
    Mutant(
        "agree: rank 0 confirms however late",
        "distckpt/coordinator/agreement.py",
        "        if held_up_s > 1.5 * self._timeout_s:\n",
        "        if False:\n",
        AGREEMENT,
    ),
    Mutant(
        "agree: a message of the wrong type leaves its rank",
        "distckpt/coordinator/agreement.py",
        "        _decode(body, self._message)  # here",
        "        # here",
        AGREEMENT,
    ),
    Mutant(
        "agree: decide may forget a rank",
        "distckpt/coordinator/agreement.py",
        "        if len(decisions) != len(bodies):\n",
        "        if False:\n",
        AGREEMENT,
    ),
    Mutant(
        "agree: the answer of a lost rank 0 counts as no",
        "distckpt/coordinator/agreement.py",
        "_failed(lost.failures, self.after)\n            error.__cause__ = lost\n            return",
        '_failed(lost.failures, "no")\n            error.__cause__ = lost\n            return',
        AGREEMENT,
    ),
    Mutant(
        "verify: blocks are not read",
        "distckpt/verifying.py",
        "for problem in file.faults(piece)]",
        "for problem in ()]",
        VERIFYING,
    ),
    Mutant(
        "verify: the chunk table is not read",
        "distckpt/verifying.py",
        "            entries = _entries_by_file(storage, commit.directory, index)\n",
        "            pass\n",
        VERIFYING,
    ),
    Mutant(
        "verify: parity is not read",
        "distckpt/verifying.py",
        "for problem in file.faults([(begin, end)])]",
        "for problem in ()]",
        VERIFYING,
    ),
    Mutant(
        "repair: damaged blocks get a new checksum",
        "distckpt/rebuilding.py",
        "            raise CorruptionError(problem)\n        on_bytes",
        "            pass\n        on_bytes",
        REPAIRING,
    ),
    Mutant(
        "repair: files that are missing are not missed",
        "distckpt/rebuilding.py",
        "        _check_complete(found, leader, directory)\n",
        "        pass\n",
        REPAIRING,
    ),
    Mutant(
        "repair: a save under way is committed by another",
        "distckpt/repairing.py",
        "        elif is_under_way(self._storage, iteration, saves[0]):\n",
        "        elif False:\n",
        REPAIRING,
    ),
    Mutant(
        "repair: what was never committed becomes a checkpoint unasked",
        "distckpt/repairing.py",
        "        elif not force:\n",
        "        elif False:\n",
        REPAIRING,
    ),
    Mutant(
        "parity: what is made is not compared with the index",
        "distckpt/parity.py",
        "                for problem in made.faults([(begin, end)]):\n",
        "                for problem in ():\n",
        PARITY,
    ),
    Mutant(
        "parity: what was made is not durable",
        "distckpt/parity.py",
        "        raise\n    storage.sync_directory(directory)\n",
        "        raise\n",
        PARITY,
    ),
    Mutant(
        "parity: the record is durable before the files that it names",
        "distckpt/parity.py",
        "    storage.sync_directory(directory)\n    record = ",
        "    record = ",
        PARITY,
    ),
    Mutant(
        "parity: a record of another save is taken",
        "distckpt/parity.py",
        '        raise CorruptionError(f"{name}: it is not the parity',
        '        str(f"{name}: it is not the parity',
        PARITY,
    ),
    Mutant(
        "read back: shard files are not read",
        "distckpt/protecting.py",
        "                problems += opened.faults([(0, file.checksum_start)])\n",
        "                pass\n",
        READ_BACK,
    ),
    Mutant(
        "read back: index and chunk table are not read",
        "distckpt/protecting.py",
        "            problems = problems or _read_back_index(storage, saved)\n",
        "",
        READ_BACK,
    ),
    Mutant(
        "read back: what the page cache holds is taken for what the disk holds",
        "distckpt/protecting.py",
        "CheckedFile(storage, directory, file, past_cache=True)",
        "CheckedFile(storage, directory, file)",
        READ_BACK,
    ),
    Mutant(
        "async saves: a job that was replaced trains on",
        "distckpt/checkpointer.py",
        "if self._is_fenced or self._failures",
        "if self._failures",
        IN_TRAINING,
    ),
    Mutant(
        "async saves: failures are tolerated for ever",
        "distckpt/checkpointer.py",
        "if self._is_fenced or self._failures > self._tolerated_failures:",
        "if self._is_fenced:",
        IN_TRAINING,
    ),
    Mutant(
        "writes: a full disk is tried again",
        "distckpt/writing.py",
        "error.errno not in _TRANSIENT or ",
        "",
        IN_TRAINING,
    ),
    Mutant(
        "termination: a rank stops alone",
        "distckpt/termination.py",
        "        told = agree(\n",
        "        told = _alone(\n",
        TERMINATION,
        ALONE,
    ),
    # The parts of a training state
    Mutant(
        "fingerprint: reading items moves the generators",
        "distckpt/training/fingerprint.py",
        "        random.setstate(of_python)\n",
        "",
        FINGERPRINT,
    ),
    Mutant(
        "fingerprint: files are opened by the dataset itself",
        "distckpt/training/fingerprint.py",
        "_shallow_copy(dataset))",
        "dataset)",
        FINGERPRINT,
    ),
    Mutant(
        "fingerprint: items that differ from read to read count",
        "distckpt/training/fingerprint.py",
        "if first == second else",
        "if True else",
        FINGERPRINT,
    ),
    Mutant(
        "sampler: ranks get unequally much of the last batch",
        "distckpt/training/sampler.py",
        "return 0 if self.drop_last or left <= 0 else -(-left // self.world_size)",
        "return 0 if self.drop_last or left <= 0 else min(self.batch_size, max(0, left))",
        SAMPLER,
    ),
    Mutant(
        "sampler: an epoch that ends elsewhere counts as exact",
        "distckpt/training/sampler.py",
        "        reasons += _changed_ends(old, new)\n",
        "        pass\n",
        SAMPLER,
    ),
    Mutant(
        "sampler: another dataset counts as exact",
        "distckpt/training/sampler.py",
        "    if None not in (old.fingerprint, new.fingerprint) and old.fingerprint != new.fingerprint:\n",
        "    if False:\n",
        SAMPLER,
    ),
    Mutant(
        "sampler: what workers have fetched ahead counts as consumed",
        "distckpt/training/sampler.py",
        "        self._consumed = self._sampler._cuts.after(self._consumed)\n        return batch\n",
        "        self._consumed = self._sampler._cuts.after(self._consumed)\n"
        "        self._sampler._move_to(self._epoch, self._consumed)\n        return batch\n",
        SAMPLER,
    ),
    Mutant(
        "resume check: steps need not follow",
        "distckpt/training/resume_check.py",
        "        if after != before + 1\n",
        "        if False\n",
        RESUME_CHECK,
    ),
    Mutant(
        "resume check: any learning rate will do",
        "distckpt/training/resume_check.py",
        "        *_wrong_learning_rate(learning_rates, told[0]),\n",
        "",
        RESUME_CHECK,
    ),
    Mutant(
        "resume check: data may start from the beginning",
        "distckpt/training/resume_check.py",
        "    if first.batch == first_batch:\n",
        "    if False:\n",
        RESUME_CHECK,
    ),
    Mutant(
        "resume check: data may be repeated",
        "distckpt/training/resume_check.py",
        "    if first.batch in last:\n",
        "    if False:\n",
        RESUME_CHECK,
    ),
    Mutant(
        "resume check: a loss may be no number",
        "distckpt/training/resume_check.py",
        "        if not math.isfinite(loss):\n",
        "        if False:\n",
        RESUME_CHECK,
    ),
    Mutant(
        "resume check: a loss may jump",
        "distckpt/training/resume_check.py",
        "    if jump is not None and jump.deviations >= _WARN_FROM:\n        (failures",
        "    if False and jump:\n        (failures",
        RESUME_CHECK,
    ),
    Mutant(
        "resume check: a tensor is held that the loop changes",
        "distckpt/training/resume_check.py",
        ".detach().clone()",
        ".detach()",
        RESUME_CHECK,
    ),
    Mutant(
        "environment: secrets are recorded",
        "distckpt/training/environment.py",
        "HIDDEN if _is_secret(name, one) else self.convert(one, depth + 1)",
        "self.convert(one, depth + 1)",
        ENVIRONMENT,
    ),
    Mutant(
        "environment: secrets in text are recorded",
        "distckpt/training/environment.py",
        'return _IN_TEXT.sub(rf"\\1{HIDDEN}", _IN_URL.sub(HIDDEN, cut))',
        "return cut",
        ENVIRONMENT,
    ),
    Mutant(
        "environment: a record has no bound",
        "distckpt/training/environment.py",
        "        self._left -= _VALUE_CHARS + ",
        "        self._left -= 0 * ",
        ENVIRONMENT,
    ),
    Mutant(
        "environment: each rank has a record of its own",
        "distckpt/training/environment.py",
        "    agreed = agree(",
        "    agreed = _alone(",
        ENVIRONMENT,
        ALONE,
    ),
    Mutant(
        "environment: what was changed on purpose blocks",
        "distckpt/training/environment.py",
        '"overridden" if matching else rules[-1]',
        "rules[-1]",
        ENVIRONMENT,
    ),
    Mutant(
        "environment: another dataset is only warned of",
        "distckpt/training/environment.py",
        '    "*fingerprint*": "block",\n',
        "",
        ENVIRONMENT,
    ),
    Mutant(
        "schedule: each rank goes by what it knows alone",
        "distckpt/training/schedule.py",
        "        return agree(\n",
        "        return _alone(\n",
        SCHEDULE,
        ALONE,
    ),
    Mutant(
        "schedule: ranks agree about another step than they ask about",
        "distckpt/training/schedule.py",
        '            f"schedule, step {step}",\n',
        '            "schedule",\n',
        SCHEDULE,
    ),
    Mutant(
        "schedule: rules of steps wait for other ranks",
        "distckpt/training/schedule.py",
        "coordinator if must_agree else None",
        "coordinator or default_coordinator()",
        SCHEDULE,
    ),
    Mutant(
        "schedule: a deadline is missed by the time until the next agreement",
        "distckpt/training/schedule.py",
        "        if left_s - max(self._rounds_s, default=0.0) > needed_s:\n",
        "        if left_s > needed_s:\n",
        SCHEDULE,
    ),
    Mutant(
        "schedule: what is no number is the best",
        "distckpt/training/schedule.py",
        "metric if metric is not None and math.isfinite(metric) else None",
        "metric",
        SCHEDULE,
    ),
    Mutant(
        "assets: a stored path may lead anywhere",
        "distckpt/training/assets.py",
        "            _refuse_path(path)\n            if content",
        "            if content",
        ASSETS,
    ),
    Mutant(
        "assets: an asset's name may lead anywhere",
        "distckpt/training/assets.py",
        "        _refuse_name(asset, CorruptionError)\n",
        "",
        ASSETS,
    ),
    Mutant(
        "assets: a link in the target directory is followed",
        "distckpt/training/assets.py",
        "        _refuse_links_out(Path(directory), parents, [*files])\n",
        "",
        ASSETS,
    ),
    Mutant(
        "assets: a link is followed out of the directory",
        "distckpt/training/assets.py",
        "            if path.is_symlink() and not any(",
        "            if False and not any(",
        ASSETS,
    ),
    Mutant(
        "assets: no bound on their size",
        "distckpt/training/assets.py",
        "            if total_bytes > max_bytes or total_files > max_files:\n",
        "            if total_files > max_files:\n",
        ASSETS,
    ),
    Mutant(
        "assets: written in place of a whole file",
        "distckpt/training/assets.py",
        "        storage.replace(name, content.cpu().numpy().tobytes())\n",
        "        storage.remove(name)\n        storage.put_if_absent(name, content.cpu().numpy().tobytes())\n",
        ASSETS,
    ),
    Mutant(
        "optimizer: state beside the state is left out",
        "distckpt/training/optimizer_state.py",
        "    if _says_more(optimizer, where):\n",
        "    if False:\n",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: state beside the state begins anew",
        "distckpt/training/optimizer_state.py",
        "    if says_more:\n",
        "    if False:\n",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: its own word is taken though it casts",
        "distckpt/training/optimizer_state.py",
        "            if value.dtype != parameter.dtype:\n",
        "            if False:\n",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: state that lies on other ranks is left out",
        "distckpt/training/optimizer_state.py",
        '    if hasattr(optimizer, "consolidate_state_dict"):',
        "    if False:",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: hooks of state_dict are not asked",
        "distckpt/training/optimizer_state.py",
        "any(getattr(optimizer, name, None) for name in hooks)",
        "any(())",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: another order under a flat state",
        "distckpt/training/optimizer_state.py",
        "        if self.order is not None and self.order != names:\n",
        "        if False:\n",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: no order is stored with a flat state",
        "distckpt/training/optimizer_state.py",
        "    if _is_of_all(optimizer):\n",
        "    if False:\n",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: a key that names no stored group",
        "distckpt/training/optimizer_state.py",
        "            if not isinstance(key, str) or key not in groups:\n",
        "            if False:\n",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: what is stored is no dict",
        "distckpt/training/optimizer_state.py",
        '    if not isinstance(found, dict):\n        raise CorruptionError(f"{where}{',
        '    if False:\n        raise CorruptionError(f"{where}{',
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: another kind of optimizer has stored it",
        "distckpt/training/optimizer_state.py",
        '    if "own" not in stored and "groups" not in stored:',
        "    if False:",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: groups with other options become one",
        "distckpt/training/optimizer_state.py",
        "    if len(found) > 1:\n",
        "    if False:\n",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: a group without parameters takes nothing",
        "distckpt/training/optimizer_state.py",
        "        return stored.empty.get(str(number))\n",
        "        return None\n",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: a count goes where the present options want it",
        "distckpt/training/optimizer_state.py",
        "optimizer.param_groups[number] | (template.groups[number] or {})",
        "optimizer.param_groups[number]",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: arrays come back as tensors",
        "distckpt/training/optimizer_state.py",
        "            if key in self.arrays:\n",
        "            if False:\n",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: groups are known by their names only",
        "distckpt/training/group_options.py",
        "hashlib.sha256(repr(options).encode())",
        "hashlib.sha256(repr(sorted(options)).encode())",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: an option that is not there is taken",
        "distckpt/training/group_options.py",
        "        if name not in group and name not in OF_SCHEDULERS:\n",
        "        if False:\n",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: an option of another kind is taken",
        "distckpt/training/group_options.py",
        "        elif name in group and not _is_alike(value, group[name]):\n",
        "        elif False:\n",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: any options of a group are taken",
        "distckpt/training/group_options.py",
        'not all(isinstance(name, str) for name in stored) or "params" in stored:',
        "False:",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: a rate that is no number",
        "distckpt/training/group_options.py",
        '    if "lr" in options and not _is_rate(options["lr"]):\n',
        "    if False:\n",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: a tensor that groups share is filled",
        "distckpt/training/group_options.py",
        " and owners[id(present)] == 1 and ",
        " and ",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: a tensor of one group is another one after a load",
        "distckpt/training/group_options.py",
        " and owners[id(present)] == 1 and ",
        " and False and ",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: options of any size",
        "distckpt/training/group_options.py",
        "        if size > _MAX_ELEMENTS:\n",
        "        if False:\n",
        OPTIMIZER,
    ),
    Mutant(
        "optimizer: a rate stays on the host in a captured step",
        "distckpt/training/group_options.py",
        '    if options.get("capturable") and',
        "    if False and",
        OPTIMIZER,
    ),
    Mutant(
        "learning rate: anything is one",
        "distckpt/training/learning_rate.py",
        " or not math.isfinite(peak) or peak <= 0:",
        ":",
        LEARNING_RATE,
    ),
    Mutant(
        "learning rate: any scheduler is scaled",
        "distckpt/training/learning_rate.py",
        "            if not isinstance(part, _KNOWN) or _formulas(kind) not in map(_formulas, _KNOWN):\n",
        "            if False:\n",
        LEARNING_RATE,
    ),
    Mutant(
        "learning rate: a formula of its own is scaled",
        "distckpt/training/learning_rate.py",
        " or _formulas(kind) not in map(_formulas, _KNOWN):",
        ":",
        LEARNING_RATE,
    ),
    Mutant(
        "learning rate: a lower end beside other schedulers",
        "distckpt/training/learning_rate.py",
        "            if is_chained and isinstance",
        "            if False and isinstance",
        LEARNING_RATE,
    ),
    Mutant(
        "learning rate: each rank scales by its own groups",
        "distckpt/training/learning_rate.py",
        "(_stored_groups(stored) or own)",
        "own",
        LEARNING_RATE,
    ),
    Mutant(
        "learning rate: shared tensors are scaled twice",
        "distckpt/training/learning_rate.py",
        "                if id(rate) not in scaled:\n",
        "                if True:\n",
        LEARNING_RATE,
    ),
    Mutant(
        "learning rate: the lower end is scaled",
        "distckpt/training/learning_rate.py",
        "    if floor is None:\n",
        "    if True:\n",
        LEARNING_RATE,
    ),
    Mutant(
        "learning rate: schedulers in others are not scaled",
        "distckpt/training/learning_rate.py",
        "    if isinstance(scheduler, _COMPOSED):\n",
        "    if False:\n",
        LEARNING_RATE,
    ),
    Mutant(
        "learning rate: a reduced one counts as the first",
        "distckpt/training/learning_rate.py",
        '                group.setdefault("initial_lr", rate.clone() if isinstance(rate, Tensor) else rate)\n',
        "                pass\n",
        LEARNING_RATE,
    ),
    Mutant(
        "learning rate: nobody has one to scale",
        "distckpt/training/learning_rate.py",
        "    if not own:\n",
        "    if False:\n",
        LEARNING_RATE,
    ),
    Mutant(
        "learning rate: scaled from 0",
        "distckpt/training/learning_rate.py",
        "    if before <= 0:\n",
        "    if False:\n",
        LEARNING_RATE,
    ),
    Mutant(
        "learning rate: checked after the load",
        "distckpt/training/train_state.py",
        "        factor = check_learning_rate(\n            overrides,\n",
        "        factor = check_learning_rate(\n            {},\n",
        DIFFERENCES,
    ),
    Mutant(
        "run record: each rank has its own",
        "distckpt/training/run_record.py",
        "        record: dict[str, Json] = msgspec.json.decode(agreed)\n",
        "        record: dict[str, Json] = msgspec.json.decode(msgspec.json.encode(self._own))\n",
        DIFFERENCES,
    ),
    Mutant(
        "run record: ranks with different bases",
        "distckpt/training/run_record.py",
        "            if other is not None:\n",
        "            if False:\n",
        DIFFERENCES,
    ),
    Mutant(
        "run record: a newer one is taken",
        "distckpt/training/run_record.py",
        "    if stored.version > VERSION:\n",
        "    if False:\n",
        DIFFERENCES,
    ),
    Mutant(
        "run record: sections that nobody knows are left out",
        "distckpt/training/run_record.py",
        "    if unknown:\n",
        "    if False:\n",
        DIFFERENCES,
    ),
    Mutant(
        "run record: an override of no argument",
        "distckpt/training/run_record.py",
        '            if name != "lr" and not any',
        "            if False and not any",
        DIFFERENCES,
    ),
    Mutant(
        "run record: differences that forbid a resume",
        "distckpt/training/run_record.py",
        "        if differences.must_block:\n",
        "        if False:\n",
        DIFFERENCES,
    ),
    Mutant(
        "run record: another scheduler's state is taken",
        "distckpt/training/environment.py",
        '    "schedulers.*class": "block",\n',
        "",
        DIFFERENCES,
    ),
    Mutant(
        "run record: another scaler's state is taken",
        "distckpt/training/environment.py",
        '    "scaler.class": "block",\n',
        "",
        DIFFERENCES,
    ),
    Mutant(
        "run record: an allowed scheduler takes what is not its own",
        "distckpt/training/sections.py",
        "and self._has_other_schedulers(contents)",
        "and False",
        DIFFERENCES,
    ),
    Mutant(
        "run record: one of another type",
        "distckpt/training/resumable.py",
        "        return decode_json(encoded, StoredRecord)\n",
        "        return StoredRecord(**msgspec.json.decode(encoded))\n",
        DIFFERENCES,
    ),
    Mutant(
        "run record: a newer one is read as ours",
        "distckpt/training/resumable.py",
        "        if version > VERSION:\n            return",
        "        if False:\n            return",
        RESUMABLE,
    ),
    Mutant(
        "run record: any adapter fits any base",
        "distckpt/training/base_checkpoint.py",
        "    if now.digest != stored.digest:\n",
        "    if False:\n",
        ("tests/unit/test_weights_and_adapters.py",),
    ),
    Mutant(
        "run record: an adapter fits no base",
        "distckpt/training/base_checkpoint.py",
        "    if now is None:\n",
        "    if False:\n",
        ("tests/unit/test_weights_and_adapters.py",),
    ),
    Mutant(
        "run record: a whole model is taken for an adapter",
        "distckpt/training/base_checkpoint.py",
        "    if stored is None:\n",
        "    if False:\n",
        ("tests/unit/test_weights_and_adapters.py",),
    ),
    Mutant(
        "train state: another optimizer's state is taken",
        "distckpt/training/sections.py",
        "was == class_of(optimizer):",
        "True:",
        ("tests/unit/test_train_state.py",),
    ),
    Mutant(
        "train state: batch statistics of a frozen module are left out",
        "distckpt/training/model_state.py",
        "if own or isinstance(module, nn.modules.batchnorm._NormBase):",
        "if own:",
        ("tests/unit/test_weights_and_adapters.py",),
    ),
    Mutant(
        "train state: gradients that are kept elsewhere are lost",
        "distckpt/training/gradients.py",
        "    if not state:\n",
        "    if False:\n",
        SECTIONS,
    ),
    Mutant(
        "train state: gradients of a step that was given up stay",
        "distckpt/training/gradients.py",
        "        parameter.grad = None\n",
        "        pass\n",
        SECTIONS,
    ),
    Mutant(
        "train state: gradients that a job cannot take are dropped",
        "distckpt/training/gradients.py",
        "    if len(template) < len(stored):\n",
        "    if False:\n",
        SECTIONS,
    ),
    Mutant(
        "train state: a section begins anew in silence",
        "distckpt/training/sections.py",
        "        if missing or unexpected:\n",
        "        if False:\n",
        ("tests/unit/test_train_state.py",),
    ),
    Mutant(
        "train state: a section of a scaler that is off counts as missing",
        "distckpt/training/sections.py",
        "    return found | (set() if record is None else set(record.sections))\n",
        "    return found\n",
        SECTIONS,
    ),
    Mutant(
        "train state: a scale is dropped",
        "distckpt/training/sections.py",
        "            and not is_enabled()\n",
        "            and False\n",
        SECTIONS,
    ),
    Mutant(
        "train state: a model on the meta device is taken from under its optimizer",
        "distckpt/training/sections.py",
        "    if meta is not None and (parts.optimizers or _is_fully_sharded(parts.models)):\n",
        "    if False:\n",
        ("tests/unit/test_weights_and_adapters.py",),
    ),
    Mutant(
        "train state: a model on the meta device is taken from under fully_shard",
        "distckpt/training/sections.py",
        "(parts.optimizers or _is_fully_sharded(parts.models))",
        "parts.optimizers",
        SECTIONS,
    ),
    Mutant(
        "train state: tensors that hooks made are thrown away",
        "distckpt/training/model_state.py",
        "        if others:\n",
        "        if False:\n",
        SECTIONS,
    ),
    Mutant(
        "train state: two tensors of one name",
        "distckpt/training/model_state.py",
        "    if taken:\n",
        "    if False:\n",
        SECTIONS,
    ),
    Mutant(
        "train state: a position in other data is gone on from",
        "distckpt/training/data_position.py",
        "        if report.is_other_data and not accept_other_data:\n",
        "        if False:\n",
        ("tests/unit/test_train_state.py",),
    ),
    Mutant(
        "train state: a position that stands still is saved",
        "distckpt/training/train_state.py",
        "        if not self._has_given and now[0] > before[0] and now[1] == before[1]:\n",
        "        if False:\n",
        ("tests/unit/test_train_state.py",),
    ),
    Mutant(
        "train state: a batch in hand is left out of a resume",
        "distckpt/training/train_state.py",
        "        if self._is_in_hand:\n",
        "        if False:\n",
        SECTIONS,
    ),
    Mutant(
        "train state: a wrong directory is a first start",
        "distckpt/training/train_state.py",
        "            if iteration is not None or error.candidates:\n",
        "            if iteration is not None:\n",
        ("tests/unit/test_wrong_directories.py",),
    ),
    Mutant(
        "train state: a selector that names nothing is a first start",
        "distckpt/training/train_state.py",
        "            if iteration is not None or error.candidates:\n",
        "            if error.candidates:\n",
        ("tests/unit/test_wrong_directories.py",),
    ),
    Mutant(
        "train state: text allows what its letters match",
        "distckpt/training/train_state.py",
        "    if isinstance(given, str) or unknown:\n",
        "    if unknown:\n",
        SECTIONS,
    ),
    Mutant(
        "train state: all ranks draw the same after a reseed",
        "distckpt/training/random_streams.py",
        "                    seed_all(loaded.seed)\n",
        "                    seed_all(0)\n",
        SECTIONS,
    ),
    Mutant(
        "train state: an end of an epoch alarms",
        "distckpt/training/train_state.py",
        "        self._progress.restore(progress, at_epoch_start=is_start)\n",
        "        self._progress.restore(progress, at_epoch_start=False)\n",
        SECTIONS,
    ),
    Mutant(
        "train state: each rank judges a resume for itself",
        "distckpt/training/progress.py",
        "            worst = max(ranks, key=lambda verdict: _SEVERITY.index(verdict.status))\n",
        "            worst = ranks[0]\n",
        ("tests/unit/test_resume_differences.py",),
    ),
    Mutant(
        "train state: a failed resume goes on",
        "distckpt/training/progress.py",
        '        if self.verdict.status == "fail" and self._mode == "error":\n',
        "        if False:\n",
        ("tests/unit/test_resume_differences.py",),
    ),
    Mutant(
        "load: a key that is not allowed may be missing",
        "distckpt/loading.py",
        "            if mismatched or (self.strict and (lacking or unread)):\n",
        "            if mismatched:\n",
        ("tests/unit/test_templates.py",),
    ),
    Mutant(
        "load: a template that one rank refuses",
        "distckpt/loading.py",
        "                if rank.refused is not None:\n",
        "                if False:\n",
        ("tests/unit/test_templates.py",),
    ),
    Mutant(
        "load: numbers overflow a smaller type",
        "distckpt/converting.py",
        "and _overflows(stored.data, view):\n",
        "and False:\n",
        SECTIONS,
    ),
    Mutant(
        "load: another type without being asked",
        "distckpt/matching.py",
        "not (convert_dtypes and _is_convertible(entry, leaf))",
        "not _is_convertible(entry, leaf)",
        ("tests/unit/test_templates.py",),
    ),
    Mutant(
        "train state: all epochs begin with the same random numbers",
        "distckpt/training/train_state.py",
        "        if not goes_on:\n            return iter(self._loader)\n",
        "",
        ("tests/unit/test_train_state.py",),
    ),
    Mutant(
        "train state: a fresh sharded optimizer has nothing to fill",
        "distckpt/training/sharded_optimizer.py",
        "is_loading=True)\n",
        "is_loading=False)\n",
        ("tests/unit/test_sharded_optimizer.py",),
    ),
    Mutant(
        "train state: common values of a sharded optimizer are left out",
        "distckpt/training/sharded_optimizer.py",
        "    _add_common(state, stored)\n    return state\n",
        "    return state\n",
        ("tests/unit/test_sharded_optimizer.py",),
    ),
    # Elements, comparisons and statistics
    Mutant(
        "elements: float64 is rounded twice",
        "distckpt/elements.py",
        'if source == "float64" and to_dtype in _ML_DTYPES:',
        "if False:",
        ("tests/unit/test_elements.py",),
    ),
    Mutant(
        "diff: integers of 64 bits are subtracted as float64",
        NUMBERS,
        "            distance, largest = _integers_apart(x, y)\n",
        "            pass\n",
        DIFFERENCES_OF_NUMBERS,
    ),
    Mutant(
        "diff: a NaN is within the tolerance",
        NUMBERS,
        "outside = is_nan | np.isinf(distance)",
        "outside = np.isinf(distance)",
        DIFFERENCES_OF_NUMBERS,
    ),
    Mutant(
        "diff: an infinity is within the tolerance",
        NUMBERS,
        "outside = is_nan | np.isinf(distance) | (distance > limit)",
        "outside = is_nan | ~(distance <= tolerance.atol + tolerance.rtol * size)",
        DIFFERENCES_OF_NUMBERS,
    ),
    Mutant(
        "diff: damage is a difference like others",
        "distckpt/cli/diff.py",
        "    if not report.is_complete:\n",
        "    if False:\n",
        CLI_VALUES,
    ),
    Mutant(
        "diff: a step is read over the one that is compared",
        PAIRS,
        "memory = memories[number % 2]",
        "memory = memories[0]",
        COMPARING,
    ),
    Mutant(
        "diff: what cannot be read ends the others of its step",
        PAIRS,
        "            source.fill([one])\n",
        "            raise error\n",
        COMPARING,
    ),
    Mutant(
        "diff: a tensor is ended at every band that cannot be read",
        PAIRS,
        "                self._failed.add(part.key)\n",
        "",
        COMPARING,
    ),
    Mutant(
        "diff: a checkpoint that was removed is called damaged",
        "distckpt/comparing.py",
        "    if not is_complete:\n",
        "    if False:\n",
        COMPARING,
    ),
    Mutant(
        "diff: a per-rank value that one side lacks",
        "distckpt/comparing.py",
        "            if has_same_axes or _NO_FILE not in files:\n",
        "            if _NO_FILE not in files:\n",
        COMPARING,
    ),
    Mutant(
        "cat: squares overflow",
        "distckpt/moments.py",
        "    if unit > moments.unit:\n",
        "    unit = 1.0\n    if unit > moments.unit:\n",
        ("tests/unit/test_moments.py",),
    ),
    Mutant(
        "cat: a small deviation is lost beside a large mean",
        "distckpt/moments.py",
        "        return math.sqrt(self.spread_units / self.finite) * self.unit if self.finite else None\n",
        "        return math.sqrt(abs(self.squares_units / self.finite - self.mean_units**2)) * self.unit "
        "if self.finite else None\n",
        ("tests/unit/test_moments.py",),
    ),
    Mutant(
        "cat: a file has its name before it is durable",
        TENSOR_VALUES,
        "            os.fsync(out.fileno())\n",
        "",
        VALUES_OF_TENSORS,
    ),
    Mutant(
        "cat: the name of a file is not durable",
        TENSOR_VALUES,
        "        sync_directory(os.path.dirname(os.path.abspath(path)))\n",
        "        pass\n",
        VALUES_OF_TENSORS,
    ),
    Mutant(
        "cat: writes over what was made meanwhile",
        TENSOR_VALUES,
        "            os.link(temporary, path)  # Fails if somebody has made it meanwhile.\n",
        "            os.replace(temporary, path)\n            return\n",
        VALUES_OF_TENSORS,
    ),
    Mutant(
        "cat: leaves a half-written file",
        TENSOR_VALUES,
        "            os.unlink(temporary)\n        raise\n",
        "            pass\n        raise\n",
        VALUES_OF_TENSORS,
    ),
    Mutant(
        "inspect: data in the page can end its element",
        "distckpt/cli/inspect_page.py",
        '    for character in "<>&\\u2028\\u2029":\n',
        "    for character in ():\n",
        INSPECT_PAGE,
    ),
    Mutant(
        "inspect: the page runs any script",
        "distckpt/cli/inspect_page.py",
        "script-src {_hash(script)}",
        "script-src 'unsafe-inline'",
        INSPECT_PAGE,
    ),
    Mutant(
        "inspect: the title of the page is markup",
        "distckpt/cli/inspect_page.py",
        'escape(str(data["title"]))',
        'str(data["title"])',
        INSPECT_PAGE,
    ),
    Mutant(
        "inspect: a page as large as it comes",
        "distckpt/cli/inspect_page.py",
        "            if self._numbers + numbers > _MAX_NUMBERS:\n",
        "            if False:\n",
        INSPECT_PAGE,
    ),
    Mutant(
        "inspect: chunks where none can lie",
        "distckpt/inspecting.py",
        "            check_locations(index, keys, copies.target, copies.hits)\n",
        "",
        INSPECTING,
    ),
    Mutant(
        "inspect: all chunks at a time",
        "distckpt/inspecting.py",
        "        if batch and record_bytes + size > _BATCH_BYTES:\n",
        "        if False:\n",
        INSPECTING,
    ),
    Mutant(
        "inspect: damage is not told by the exit code",
        "distckpt/cli/inspect.py",
        "return DAMAGED if any(one.damage is not None for one in entries) else 0",
        "return 0",
        CLI_INSPECT,
    ),
    Mutant(
        "inspect: what is removed meanwhile is damaged",
        "distckpt/cli/inspect.py",
        "        if commit not in list_commits(storage):\n",
        "        if False:\n",
        CLI_INSPECT,
    ),
    Mutant(
        "inspect: values give orders to a terminal",
        "distckpt/cli/inspect_text.py",
        "{plain_text(_json_text(value.value))}",
        "{_json_text(value.value)}",
        CLI_INSPECT,
    ),
    Mutant(
        "inspect: keys give orders to a terminal",
        "distckpt/cli/inspect_text.py",
        "            shown(tensor.key),\n",
        "            tensor.key,\n",
        CLI_INSPECT,
    ),
    # Export and import
    Mutant(
        "import: a directory in the place of a chunk is zeros",
        "distckpt/exchange/zarr_group.py",
        "                if not stat.S_ISREG(found.st_mode):",
        "                if stat.S_ISFIFO(found.st_mode):",
        ZARR_HOSTILE,
    ),
    Mutant(
        "import: errors of zarr of any type come out",
        "distckpt/exchange/zarr_group.py",
        "    except Exception as error:\n",
        "    except (OSError, ValueError) as error:\n",
        ZARR_HOSTILE,
    ),
    Mutant(
        "import: chunks may have no extent",
        "distckpt/exchange/zarr_group.py",
        "    if any(size < 1 for size in (*chunk, *shard)):",
        "    if False:",
        ZARR_HOSTILE,
    ),
    Mutant(
        "export: a target may lie in an iteration",
        "distckpt/exchange/exporting.py",
        "    found = root_above(path)\n",
        "    found = None\n",
        SAFETENSORS,
    ),
    Mutant(
        "export: small tensors are read one by one",
        "distckpt/exchange/exporting.py",
        "            if batch and box.size * item_bytes > left:",
        "            if batch:",
        SAFETENSORS,
    ),
    Mutant(
        "planning a load looks at the types of all tensors",
        "distckpt/index.py",
        "for t in asked.tolist()], np.int64)[at]",
        "for t in range(len(keys))], np.int64)[tensor]",
        ("tests/unit/test_index.py",),
    ),
    Mutant(
        "export: zeros are left out",
        "distckpt/exchange/zarr_group.py",
        'config={"write_empty_chunks": True},',
        'config={"write_empty_chunks": False},',
        ZARR_EXPORT,
    ),
    Mutant(
        "export: chunks of zarr have no checksum",
        "distckpt/exchange/zarr_group.py",
        "compressors=[*compressors, codecs.Crc32cCodec()],",
        "compressors=compressors,",
        ZARR_EXPORT,
    ),
    Mutant(
        "export: arrays lie in arrays",
        "distckpt/exchange/zarr_layout.py",
        '("%t" if key in parents else "")',
        '""',
        ZARR_EXPORT,
    ),
    Mutant(
        "export: names that zarr keeps are not escaped",
        "distckpt/exchange/zarr_layout.py",
        "    if _RESERVED.match(name):\n",
        "    if False:\n",
        ZARR_EXPORT,
    ),
    Mutant(
        "export: chunks of zarr grow with a tensor",
        "distckpt/exchange/zarr_layout.py",
        "        if extent * row <= max_elements:\n",
        "        if extent <= max_elements:\n",
        ZARR_EXPORT,
    ),
    Mutant(
        "export: dimensions of one name have two sizes",
        "distckpt/exchange/zarr_layout.py",
        'f"size_{extent}" if count == 1',
        'f"size_{len(shape)}" if count == 1',
        ZARR_EXPORT,
    ),
    Mutant(
        "export: stored chunks are gone through several at a time",
        "distckpt/exchange/exporting.py",
        "    if cell is None:\n        return boxes\n",
        "    if True:\n        return boxes\n",
        ZARR_EXPORT,
    ),
    Mutant(
        "export: what is given up stays",
        "distckpt/exchange/exporting.py",
        "        shutil.rmtree(temporary, ignore_errors=True)\n        raise\n",
        "        raise\n",
        ZARR_EXPORT,
    ),
    Mutant(
        "export: a target that is there is replaced",
        "distckpt/exchange/exporting.py",
        "    if os.path.lexists(path):\n",
        "    if False:\n",
        ZARR_EXPORT,
    ),
    Mutant(
        "export: a full disk is seen late",
        "distckpt/exchange/exporting.py",
        "    if free is not None and size_bytes > free.size_bytes:\n",
        "    if False:\n",
        ZARR_EXPORT,
    ),
    Mutant(
        "export: shards of zarr are not synced",
        "distckpt/exchange/zarr_group.py",
        "        sync_path(os.path.join(self.root, self.path, key))\n",
        "",
        ZARR_EXPORT,
    ),
    Mutant(
        "export: directories of zarr are not synced",
        "distckpt/exchange/zarr_group.py",
        "            sync_path(directory)\n",
        "",
        ZARR_EXPORT,
    ),
    Mutant(
        "export: the name of a target is not synced",
        "distckpt/exchange/exporting.py",
        "    sync_path(above)\n",
        "",
        ZARR_EXPORT,
    ),
    Mutant(
        "export: numbers become infinities",
        "distckpt/exchange/export_source.py",
        "if overflows(elements, converted):",
        "if False:",
        SAFETENSORS,
    ),
    Mutant(
        "export: two keys get one name",
        "distckpt/exchange/safetensors_files.py",
        "        if name in taken:\n",
        "        if False:\n",
        SAFETENSORS,
    ),
    Mutant(
        "import: a shard that is missing is zeros",
        "distckpt/exchange/zarr_group.py",
        "            if not os.path.isfile(file):",
        "            if False:",
        ZARR_EXPORT,
    ),
    Mutant(
        "import: an array may be of any type and shape",
        "distckpt/exchange/zarr_group.py",
        "        if is_ != expected:\n",
        "        if False:\n",
        ZARR_EXPORT,
    ),
    Mutant(
        "import: a layout that is newer is read",
        "distckpt/exchange/zarr_group.py",
        "        if version != LAYOUT_VERSION:\n",
        "        if False:\n",
        ZARR_EXPORT,
    ),
    Mutant(
        "import: what is said of ranks is not checked",
        "distckpt/exchange/importing.py",
        "    _check_facts(facts, path)\n",
        "",
        ZARR_EXPORT,
    ),
    Mutant(
        "import: chunks of any size are held",
        "distckpt/exchange/zarr_group.py",
        "* item_bytes > max_bytes:\n",
        "* item_bytes > max_bytes * 1000:\n",
        ZARR_EXPORT,
    ),
    Mutant(
        "import: the index is not checked",
        "distckpt/exchange/import_commit.py",
        "            decode_index(encode_index(index), name=source)  # What",
        "            # What",
        ZARR_EXPORT,
    ),
    Mutant(
        "import: a root that has checkpoints is taken",
        "distckpt/exchange/import_commit.py",
        "    if commits:\n",
        "    if False:\n",
        ZARR_EXPORT,
    ),
    Mutant(
        "import: a full disk is seen late",
        "distckpt/exchange/import_commit.py",
        "    if free is not None and needed > free.size_bytes:\n",
        "    if False:\n",
        ZARR_EXPORT,
    ),
    Mutant(
        "import: what is given up stays",
        "distckpt/exchange/import_commit.py",
        "            discard(storage, iteration, save_id)",
        "            pass",
        ZARR_EXPORT,
    ),
    Mutant(
        "import: the values lie in any file",
        "distckpt/exchange/import_commit.py",
        "    written = [write(files[0])]\n",
        "    written = [write(files[-1])]\n",
        ZARR_EXPORT,
    ),
    Mutant(
        "import: a header of any length is read",
        "distckpt/exchange/safetensors_files.py",
        "    if size > MAX_HEADER_BYTES or size + 8 > file.size_bytes:\n",
        "    if False:\n",
        SAFETENSORS,
    ),
    Mutant(
        "import: tensors overlap",
        "distckpt/exchange/safetensors_files.py",
        "        if entry.data_offsets[0] != position or entry.data_offsets[1] < position:\n",
        "        if False:\n",
        SAFETENSORS,
    ),
    Mutant(
        "import: bytes behind the tensors are left out",
        "distckpt/exchange/safetensors_files.py",
        "    if 8 + size + position != file.size_bytes:\n",
        "    if False:\n",
        SAFETENSORS,
    ),
    Mutant(
        "import: a tensor has any number of bytes",
        "distckpt/exchange/safetensors_files.py",
        "    if prod(entry.shape) * DTYPES[stored].item_bytes != size:\n",
        "    if False:\n",
        SAFETENSORS,
    ),
    Mutant(
        "import: an index names files anywhere",
        "distckpt/exchange/safetensors_files.py",
        'if "/" in file or "\\\\" in file or "\\0" in file or not',
        "if not",
        SAFETENSORS,
    ),
    Mutant(
        "import: a tensor that an index names is missing",
        "distckpt/exchange/importing.py",
        "        if missing:\n",
        "        if False:\n",
        SAFETENSORS,
    ),
    Mutant(
        "import: of two tensors of one name the last counts",
        "distckpt/exchange/importing.py",
        "            if key in tensors:\n                raise CorruptionError",
        "            if False:\n                raise CorruptionError",
        SAFETENSORS,
    ),
    Mutant(
        "import: a shard file is taken for whole tensors",
        "distckpt/exchange/safetensors_files.py",
        '    if metadata.get("format") == FORMAT:\n',
        "    if False:\n",
        SAFETENSORS,
    ),
    Mutant(
        "export: a tensor is held whole",
        "distckpt/exchange/exporting.py",
        "bands(whole, max_bytes // item_bytes) if",
        "bands(whole, whole.size) if",
        SAFETENSORS,
    ),
    # Resharding
    Mutant(
        "resharding: blocks are not split one by one",
        "distckpt/resharding/target_layout.py",
        "        blocks = self.spec.blocks[dim] if self.spec.blocks else 1\n",
        "        blocks = 1\n",
        RESHARDING,
    ),
    Mutant(
        "resharding: the owner holds nothing alone",
        "distckpt/resharding/target_layout.py",
        "    if spec.owner is not None and tensor.at is not None and",
        "    if False and",
        RESHARDING,
    ),
    Mutant(
        "resharding: layers are dealt out equally, whatever was asked",
        "distckpt/resharding/numbering.py",
        "        if counts is None:\n            if total % size:\n",
        "        if True:\n            if total % size:\n",
        RESHARDING,
    ),
    Mutant(
        "resharding: an axis other than tp is not split",
        "distckpt/resharding/target_layout.py",
        "for axis in partition if axis is not None and mesh.size(axis) > 1))",
        "for axis in partition if axis == 'tp' and mesh.size(axis) > 1))",
        RESHARDING,
    ),
    Mutant(
        "resharding: a checkpoint of another layout is taken for what is asked",
        "distckpt/resharding/committing.py",
        "        if not np.array_equal(found, _sorted_rows(chunks.offsets, chunks.shapes, chunks.ranks)):\n",
        "        if False:\n",
        RESHARDING,
    ),
    Mutant(
        "resharding: it is not looked for what is there already",
        "distckpt/resharding/committing.py",
        "    there = _find_twin(target, planned)\n",
        "    there = None\n",
        RESHARDING,
    ),
    Mutant(
        "resharding: a window takes more than it has room for",
        "distckpt/resharding/steps.py",
        "        if skipped <= room:\n",
        "        if True:\n",
        RESHARDING,
    ),
    Mutant(
        "resharding: an axis may split two dimensions",
        "distckpt/resharding/tensor_labels.py",
        "        if len(set(axes)) < len(axes):",
        "        if False:",
        RESHARDING_PLANS,
    ),
    Mutant(
        "resharding: a plan may name any axis",
        "distckpt/resharding/tensor_labels.py",
        "        if axis not in known:\n",
        "        if False:\n",
        RESHARDING_PLANS,
    ),
    Mutant(
        "resharding: whatever ends as a key does is state of its tensor",
        "distckpt/resharding/tensor_labels.py",
        " and self._is_of_state(match.end(), key):",
        ":",
        RESHARDING,
    ),
    Mutant(
        "resharding: what lies on one of two stages is taken for an end of the pipeline",
        "distckpt/resharding/tensor_labels.py",
        " and (numbering is not None or not numbers):",
        ":",
        RESHARDING_PLANS,
    ),
    Mutant(
        "resharding: overflow is not noticed",
        "distckpt/resharding/part.py",
        "    if overflows(before, after):\n",
        "    if False:\n",
        RESHARDING_CASES,
    ),
    Mutant(
        "resharding: exact values by rank may get lost",
        "distckpt/resharding/content.py",
        '        if entry.on_change == "exact":\n',
        "        if False:\n",
        RESHARDING_CASES,
    ),
    Mutant(
        "resharding: padding is not zero",
        "distckpt/resharding/part.py",
        "            np.frombuffer(memory[begin : begin + size], np.uint8)[:] = 0\n",
        "            np.frombuffer(memory[begin : begin + size], np.uint8)[:] = 1\n",
        RESHARDING_CASES,
    ),
    Mutant(
        "resharding: the journal speaks of what is not durable",
        "distckpt/resharding/shard_output.py",
        "        self._open_file().sync()\n",
        "",
        RESHARDING_FAULTS,
    ),
    Mutant(
        "resharding: the journal speaks of files whose names are not durable",
        "distckpt/resharding/part.py",
        "            self._target.sync_directory(plan.directory)\n",
        "",
        RESHARDING_FAULTS,
    ),
    Mutant(
        "resharding: pages that are not whole are lost",
        "distckpt/resharding/shard_output.py",
        "self._is_whole.tobytes(), begun, pages)",
        "self._is_whole.tobytes(), begun)",
        RESHARDING_FAULTS,
    ),
    Mutant(
        "resharding: a job that saves to the target is ended",
        "distckpt/resharding/committing.py",
        "    if owner is not None and owner.reshards is None:\n",
        "    if False:\n",
        RESHARDING_LIMITS,
    ),
    Mutant(
        "resharding: the target of a source that has pruned is another run's",
        "distckpt/resharding/committing.py",
        "    if owner is None or owner.reshards != planned.storage.location:\n",
        "    if True:\n",
        RESHARDING_LIMITS,
    ),
    Mutant(
        "resharding: a mesh may have any number of ranks",
        "distckpt/resharding/target_layout.py",
        "        if prod(sizes.values()) > MAX_WORLD_SIZE:\n",
        "        if False:\n",
        RESHARDING_LIMITS,
    ),
    Mutant(
        "resharding: a tensor may be cut into any number of parts",
        "distckpt/resharding/target_layout.py",
        "    if count > MAX_CHUNKS:\n",
        "    if False:\n",
        RESHARDING_LIMITS,
    ),
    Mutant(
        "resharding: files are opened until there are too many",
        "distckpt/resharding/job.py",
        "        reserve_open_files(len(plan.own) + lots * _HANDLES_PER_SOURCE * sources)\n",
        "",
        RESHARDING_LIMITS,
    ),
    Mutant(
        "resharding: stages that mean nothing are passed over",
        "distckpt/resharding/tensor_labels.py",
        "    _check_stages(plan, mesh, tensors)\n",
        "",
        RESHARDING_LIMITS,
    ),
    Mutant(
        "resharding: nobody is told that parity could mend the source",
        "distckpt/resharding/job.py",
        "        if _has_parity(planned):\n",
        "        if False:\n",
        RESHARDING_LIMITS,
    ),
    Mutant(
        "resharding: goes on with what had other options",
        "distckpt/resharding/committing.py",
        "        if journal.digest == planned.digest and",
        "        if True and",
        RESHARDING_FAULTS,
    ),
    Mutant(
        "resharding: journals of one that is fenced go on",
        "distckpt/resharding/part.py",
        "            self._check_fence()\n",
        "",
        RESHARDING_FAULTS,
    ),
    Mutant(
        "resharding: the chunk table of another's commit is removed",
        "distckpt/resharding/committing.py",
        "        target.replace(name, table)\n",
        "        target.remove(name)\n        target.replace(name, table)\n",
        RESHARDING_FAULTS,
    ),
    Mutant(
        "resharding: what is left after a commit stays",
        "distckpt/resharding/committing.py",
        "        _finish_twin(target, planned, there)\n",
        "",
        RESHARDING_FAULTS,
    ),
    Mutant(
        "resharding: blocks of the source are not checked",
        "distckpt/storage/checked.py",
        "            if len(bad):\n                return first + int(bad[0]), int(found[bad[0]])\n",
        "",
        RESHARDING_FAULTS,
    ),
)


@dataclass(frozen=True)
class Result:
    verdict: str
    seconds: float
    detail: str


def copy_tree(target: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(source, target / name)


def run_python(tree: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def run_tests(tree: Path, tests: Sequence[str]) -> Result:
    """Run the tests in the tree until one fails."""
    started = time.monotonic()
    arguments = ["-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]
    try:
        done = run_python(tree, arguments)
    except subprocess.TimeoutExpired:
        return Result(KILLED, time.monotonic() - started, "by a hang")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if done.returncode < 0:
        return Result(KILLED, time.monotonic() - started, f"by signal {-done.returncode}")
    verdict = {0: "SURVIVED", 1: KILLED}.get(done.returncode, "broken")
    detail = failed[0].split(" ")[1].partition("::")[2] if failed else done.stdout[-300:] + done.stderr[-300:]
    return Result(verdict, time.monotonic() - started, detail if verdict != "SURVIVED" else "")


def run_mutant(tree: Path, mutant: Mutant) -> Result:
    """Apply it, run its tests, take it back."""
    path = tree / mutant.file
    source = path.read_text()
    if source.count(mutant.text) != 1:
        return Result("text not found", 0.0, f"{source.count(mutant.text)} times in {mutant.file}")
    path.write_text(source.replace(mutant.text, mutant.replacement) + mutant.appended)
    try:
        return run_tests(tree, mutant.tests)
    finally:
        path.write_text(source)


def main(
    only: Annotated[str, typer.Option(help="Only mutants whose name contains this.")] = "",
    list_: Annotated[bool, typer.Option("--list", help="List the mutants and stop.")] = False,
) -> None:
    """Run the mutants; exit code 1 unless every one is killed."""
    console = Console()
    chosen = [mutant for mutant in MUTANTS if only in mutant.name]
    if list_ or not chosen:
        for mutant in chosen:
            console.print(f"{mutant.name}  [dim]{mutant.file}[/dim]", highlight=False)
        raise typer.Exit(0 if chosen else 2)
    table = Table("mutant", "result", "s", "by", title=f"{len(chosen)} mutants")
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        tree = Path(scratch).resolve()
        copy_tree(tree)
        where = run_python(tree, ["-c", "import distckpt; print(distckpt.__file__)"]).stdout.strip()
        if not where.startswith(str(tree)):
            console.print(f"the tests would import {where or 'nothing'} instead of the copy in {tree}")
            raise typer.Exit(2)
        unchanged = {tests: run_tests(tree, tests) for tests in dict.fromkeys(mutant.tests for mutant in chosen)}
        for mutant in chosen:
            passes = unchanged[mutant.tests].verdict == "SURVIVED"
            result = run_mutant(tree, mutant) if passes else Result("broken", 0.0, "fails without any mutant")
            survivors += result.verdict != KILLED
            color = "green" if result.verdict == KILLED else "red"
            row = (mutant.name, f"[{color}]{result.verdict}[/{color}]", f"{result.seconds:.0f}")
            table.add_row(*row, result.detail.replace("[", "\\["))
            console.print(f"{mutant.name}: {result.verdict}", highlight=False)
    console.print(table)
    console.print(f"{len(chosen) - survivors} of {len(chosen)} killed", highlight=False)
    raise typer.Exit(1 if survivors else 0)


if __name__ == "__main__":
    typer.run(main)
