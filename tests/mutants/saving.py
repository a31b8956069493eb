"""Mutants of saving: plans, snapshots, copies from and to accelerators, termination."""

from __future__ import annotations

from tests.mutants.mutant import ALONE, Mutant

COMMIT = ("tests/unit/test_commit.py",)
ALL_RANKS = ("tests/unit/test_all_ranks.py",)
PLANNER = ("tests/unit/test_planner.py",)
PLAN_REUSE = ("tests/unit/test_plan_reuse.py",)
TIED = ("tests/unit/test_tied_memory.py",)
INTERRUPTED = ("tests/unit/test_interrupted_saves.py",)
LAZY = ("tests/unit/test_lazy_snapshot.py",)
TRANSPORT = ("tests/unit/test_transport_cuda.py",)
COPIER = ("tests/unit/test_copier.py",)
AFTER_COMMIT = ("tests/unit/test_after_commit.py",)
METRICS = ("tests/unit/test_metrics.py",)
IN_TRAINING = ("tests/unit/test_failures_in_training.py",)
TERMINATION = ("tests/unit/test_termination.py",)
CUDA = "distckpt/transport/cuda.py"

MUTANTS = (
    Mutant(
        "garbage: of two bodies the second finds collection off, and leaves it so",
        "distckpt/garbage.py",
        "            if not self.bodies:\n                self.was_enabled",
        "            if True:\n                self.was_enabled",
        ("tests/unit/test_garbage.py",),
    ),
    Mutant(
        "load: later work in the first root is removed",
        "distckpt/checkpointer.py",
        "self._has_resumed = not load.leaves_newer",
        "self._has_resumed = True",
        COPIER,
    ),
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
        "metrics: those of the ranks are not compared",
        "distckpt/offer.py",
        "        if offer.metrics != first.metrics:\n",
        "        if False:\n",
        METRICS,
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
        "every rank looks for itself which iterations there are",
        "distckpt/checkpointer.py",
        "        return agree(\n",
        "        return _alone(\n",
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
        "a failed save that some ranks have seen is not raised by a save",
        "distckpt/saving.py",
        "            if self.unseen is not None:\n",
        "            if False:\n",
        ALL_RANKS,
    ),
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
        "termination: a rank stops alone",
        "distckpt/termination.py",
        "        told = agree(\n",
        "        told = _alone(\n",
        TERMINATION,
        ALONE,
    ),
)
