"""Mutants of storage and the format: files, blocks and their checksums, parity, verify and repair."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

POWER_CUT = ("tests/crash/test_posix_power_cut.py",)
STORAGE = ("tests/unit/test_storage.py",)
DAMAGE = ("tests/unit/test_damage.py",)
INDEX = ("tests/unit/test_index.py",)
CHUNK_TABLE = ("tests/unit/test_chunk_table.py",)
VERIFYING = ("tests/unit/test_verifying.py",)
REPAIRING = ("tests/unit/test_repairing.py",)
PARITY = ("tests/unit/test_parity.py",)
ACCESS = ("tests/unit/test_access.py",)
METRICS = ("tests/unit/test_metrics.py",)
IN_TRAINING = ("tests/unit/test_failures_in_training.py",)
IO_FAULTS = ("tests/crash/test_io_faults.py",)
RESHARDING_FAULTS = ("tests/crash/test_reshard_faults.py",)
POSIX = "distckpt/storage/posix.py"

MUTANTS = (
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
    Mutant(
        "decoding: two threads may find out what a type is",
        "distckpt/decoding.py",
        "        with _finding_out:\n",
        "        if _finding_out:\n",
        ("tests/unit/test_decoding.py",),
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
        "metrics: an index made again has none",
        "distckpt/rebuilding.py",
        "        metrics=leader.metrics,\n",
        "",
        METRICS,
    ),
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
        "reads without a template: memory is taken before the sizes of files are looked at",
        "distckpt/checkpoint_files.py",
        "            check_length(file, expected.size_bytes)\n",
        "            pass\n",
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
        "writes: a full disk is tried again",
        "distckpt/writing.py",
        "error.errno not in _TRANSIENT or ",
        "",
        IN_TRAINING,
    ),
    Mutant(
        "elements: float64 is rounded twice",
        "distckpt/elements.py",
        'if source == "float64" and to_dtype in _ML_DTYPES:',
        "if False:",
        ("tests/unit/test_elements.py",),
    ),
    Mutant(
        "planning a load looks at the types of all tensors",
        "distckpt/index.py",
        "for t in asked.tolist()], np.int64)[at]",
        "for t in range(len(keys))], np.int64)[tensor]",
        ("tests/unit/test_index.py",),
    ),
    Mutant(
        "resharding: blocks of the source are not checked",
        "distckpt/storage/checked.py",
        "            if len(bad):\n                return first + int(bad[0]), int(found[bad[0]])\n",
        "",
        RESHARDING_FAULTS,
    ),
)
