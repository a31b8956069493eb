"""Mutants of loading: which checkpoint, what is read, where it goes."""

from __future__ import annotations

from tests.mutants.mutant import ALONE, SILENTLY, Mutant

DAMAGE = ("tests/unit/test_damage.py",)
SHARED_READING = ("tests/unit/test_shared_reading.py",)
ALL_RANKS = ("tests/unit/test_all_ranks.py",)
RING = ("tests/unit/test_ring.py",)
COPIER = ("tests/unit/test_copier.py",)
SELECTING = ("tests/unit/test_selecting.py",)
SECTIONS = ("tests/unit/test_sections.py",)
ROLL_BACK = ("tests/crash/test_roll_back.py",)
READER = ("tests/crash/test_reader_beside_writer.py",)

MUTANTS = (
    Mutant(
        "a load falls back to an abandoned branch first",
        "distckpt/candidates.py",
        "(by_lineage(storages[0], commits) if by_branch else commits)",
        "commits",
        ROLL_BACK,
    ),
    Mutant(
        "load: later work in the first root is not told of",
        "distckpt/candidates.py",
        "    if head.created_unix_s <= created_unix_s:\n",
        "    if True:\n",
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
        "a load goes by a list that is outdated",
        "distckpt/loading.py",
        "                candidates = self._candidates()  # Listed anew",
        "                #",
        READER,
    ),
    Mutant(
        "selectors: each of two roots has a best of its own",
        "distckpt/loading.py",
        "select_one(storages, selector)",
        "select_one(storages[:1], selector)",
        SELECTING,
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
        "chunk table: chunks may lie anywhere",
        "distckpt/reader.py",
        "        check_locations(index, keys, of_tensor, copies.hits)\n",
        "",
        ("tests/unit/test_hostile_checkpoint.py",),
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
        "every rank opens the root for itself",
        "distckpt/opening.py",
        '    neighbours = agree(coordinator, "open", ',
        '    neighbours = _alone(coordinator, "open", ',
        ALL_RANKS,
        ALONE,
    ),
    Mutant(
        "a failed save that some ranks have seen is not raised by a load",
        "distckpt/loading.py",
        "            if self.unseen is not None:\n",
        "            if False:\n",
        ALL_RANKS,
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
)
