"""Kill a training job in the middle of a save, resume it on 4, 2 and 8 ranks, and compare every loss.

    python examples/gpt/demo.py --out out/demo

Every run is a real torchrun job of train.py. There are two families of runs, as dropout draws other masks on
another layout: with dropout, the job resumed on its own layout must repeat the uninterrupted one bit by bit;
without, the job resumed on any layout must agree with it but for the rounding of sums that are split otherwise.
Exits with 1 if a claim fails.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from figures import Panel, draw_losses, draw_saves
from rich.console import Console
from rich.table import Table
from runs import Job, Layout, Log, kill

ITERATIONS = 40
SAVE_INTERVAL = 10
KILL_AT = (20, 30)  # should the save of 20 be committed before the kill lands, that of 30 is cut
COMPARED_STEPS = 20
TOLERANCE = 1e-5
HOME = Layout(tp=2, pp=2)


@dataclass(frozen=True, slots=True)
class Family:
    """A run without interruption, the iteration whose save a kill cut, and the runs that resumed after it."""

    title: str
    reference: Log
    cut: int
    resumed: dict[Layout, Log]

    def difference(self, layout: Layout, iteration: int) -> float:
        """Relative difference of a resumed run's loss from the reference's."""
        expected = self.reference.iterations[iteration]["loss"]
        return abs(self.resumed[layout].iterations[iteration]["loss"] - expected) / expected

    def describe(self, layout: Layout, iteration: int) -> str:
        """A resumed run's loss and the difference; nothing before it resumed."""
        record = self.resumed[layout].iterations.get(iteration)
        if record is None:
            return ""
        equal = record["loss_hex"] == self.reference.iterations[iteration]["loss_hex"]
        return f"{record['loss']:.7f} " + ("=" if equal else f"±{self.difference(layout, iteration):.0e}")


@dataclass(frozen=True, slots=True)
class Claim:
    text: str
    holds: bool


def run_family(title: str, out: Path, layouts: list[Layout], dropout: str, console: Console) -> Family:
    """Run a job to its end, cut a save of the same job, and resume a copy of what that left on each layout."""
    console.rule(title)
    out.mkdir()
    options = f"--iterations {ITERATIONS} --save-interval {SAVE_INTERVAL} {dropout}"
    reference = Job(out / "reference", HOME, options).run()
    console.print(f"reference on {HOME}: {len(reference.iterations)} iterations")
    killed = Job(out / "killed", HOME, options)
    cut = kill_during_save(killed, console)
    resumed = {}
    for layout in layouts:
        copy = shutil.copytree(killed.directory, out / f"resumed-on-{layout.ranks}")
        resumed[layout] = log = Job(copy, layout, options).run()
        console.print(f"resumed on {layout} from {log.resumed_from}: {len(log.iterations)} iterations")
    return Family(title, reference, cut, resumed)


def kill_during_save(job: Job, console: Console) -> int:
    """Start `job` and kill all its processes while a save is under way; returns the iteration of that save.

    A save committed before the kill landed is not cut: the job starts again and is killed in the next.
    """
    for iteration in KILL_AT:
        directory = job.directory / f"iter_{iteration:07d}"
        process = job.start()
        while not any(directory.glob("shard-*")):
            if process.poll() is not None:
                raise job.failure(f"ended before the save of iteration {iteration}")
            time.sleep(0.001)
        kill(process)
        if not any(directory.glob("index-*.json")):
            console.print(f"killed: SIGKILL while saving iteration {iteration}, which left no index and")
            for file in sorted(directory.iterdir()):
                console.print(f"    {file.name} ({file.stat().st_size:,} bytes)", soft_wrap=True)
            return iteration
    raise SystemExit(f"the saves of iterations {KILL_AT} were all committed before the kill landed")


def resume_claims(family: Family) -> Iterator[Claim]:
    for layout, log in family.resumed.items():
        newest = family.cut - SAVE_INTERVAL
        text = f"{layout}: the save of {family.cut} was cut; resumed from {log.resumed_from}"
        yield Claim(text, log.resumed_from == newest and min(log.iterations) == newest + 1)


def equality_claims(family: Family) -> Iterator[Claim]:
    for layout, log in family.resumed.items():
        expected = {i: record["loss_hex"] for i, record in family.reference.iterations.items()}
        equal = [record["loss_hex"] == expected[i] for i, record in log.iterations.items()]
        yield Claim(f"{layout}: {sum(equal)} of the {len(equal)} losses after it are bit-equal", all(equal))


def closeness_claims(family: Family) -> Iterator[Claim]:
    for layout, log in family.resumed.items():
        compared = list(log.iterations)[:COMPARED_STEPS]
        worst = max(family.difference(layout, iteration) for iteration in compared)
        text = f"{layout}: the {len(compared)} losses after it differ by at most {worst:.0e} ({TOLERANCE:.0e} allowed)"
        yield Claim(text, len(compared) == COMPARED_STEPS and worst <= TOLERANCE)


def loss_table(family: Family) -> Table:
    """Every fifth iteration: losses, relative differences from the reference, and the stall by a save."""
    resumed = [f"resumed on {layout}" for layout in family.resumed]
    table = Table(title=family.title)
    for heading in ("iteration", "reference", *resumed, "stall"):
        table.add_column(heading, justify="right")
    for iteration in range(5, max(family.reference.iterations) + 1, 5):
        record = family.reference.iterations[iteration]
        stall = f"{record['stall_ms']:.1f} ms" if "stall_ms" in record else ""
        losses = [family.describe(layout, iteration) for layout in family.resumed]
        table.add_row(str(iteration), f"{record['loss']:.7f}", *losses, stall)
    return table


def draw(families: list[Family], out: Path) -> None:
    panels = [
        Panel(
            family.title,
            {"never interrupted": family.reference}
            | {f"resumed on {layout}": log for layout, log in family.resumed.items()},
            killed=family.cut,
        )
        for family in families
    ]
    draw_losses(panels, out / "losses.png")
    draw_saves(families[0].reference, out / "saves.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a training job in the middle of a save and resume it.")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="emptied first")
    out = parser.parse_args().out
    console = Console()
    start = time.time()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    same = run_family("Same layout, dropout 0.1", out / "same", [HOME], "--dropout 0.1", console)
    others = [Layout(pp=2), Layout(tp=2, pp=2, dp=2)]
    other = run_family("Other layouts, dropout 0", out / "other", others, "--dropout 0", console)
    claims = [*resume_claims(same), *equality_claims(same), *resume_claims(other), *closeness_claims(other)]
    console.print(loss_table(same), loss_table(other))
    draw([same, other], out)
    for claim in claims:
        console.print("[green]PASS[/]" if claim.holds else "[red]FAIL[/]", claim.text, soft_wrap=True)
    console.print(f"{time.time() - start:.0f} s; figures: {out / 'losses.png'} and {out / 'saves.png'}")
    sys.exit(0 if all(claim.holds for claim in claims) else 1)


if __name__ == "__main__":
    main()
