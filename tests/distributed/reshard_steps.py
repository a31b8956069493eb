"""distckpt reshard in small steps: python reshard_steps.py STEP_BYTES arguments of the command.

Prints the bytes of each step once it is written and, if STEP_BYTES ends in "n", noted in the journal.
"""

from __future__ import annotations

import sys

from distckpt.cli import main
from distckpt.resharding import job, planning
from distckpt.resharding.part import CACHE_BYTES, LotMemory, PartWriter
from tests.distributed.launch import say

if __name__ == "__main__":
    size = sys.argv.pop(1)
    planning.share_memory = lambda *_, **__: LotMemory(CACHE_BYTES, int(size.rstrip("n")))
    job.JOURNAL_S, job._STEP_S = 0.05, 0.01  # type: ignore[attr-defined]
    write, count = PartWriter._write, job.ReshardJob.count

    def write_and_note(self: PartWriter, *arguments: object) -> None:
        write(self, *arguments)  # type: ignore[arg-type]
        if size.endswith("n"):
            self.note()

    def count_and_say(self: job.ReshardJob, size_bytes: int) -> None:
        count(self, size_bytes)
        say("wrote", size_bytes)

    PartWriter._write = write_and_note  # type: ignore[method-assign]
    job.ReshardJob.count = count_and_say  # type: ignore[method-assign]
    say("begins")
    main()
