"""What the benchmarks are made of: states that can be compared, plans, figures, words."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.engines import ENGINES
from benchmarks.engines.port import Engine
from benchmarks.figures import KINDS, LAYOUT_CHANGES
from benchmarks.files import cached_fraction, drop_from_page_cache, read_into_page_cache, sync_files
from benchmarks.layout import Layout, layout_of
from benchmarks.measuring import steps
from benchmarks.model import Content, Model, Precision
from benchmarks.peak_memory import PeakMemory
from benchmarks.plan import plan_sections
from benchmarks.report.markdown import to_markdown
from benchmarks.report.page import to_html
from benchmarks.request import Answer
from benchmarks.results import Limit, Limits, Record, limits_of, section_result
from benchmarks.runs import _last_words
from benchmarks.state import PRIMES, RankState

README = Path(__file__).parents[2] / "benchmarks" / "README.md"
MODEL = Model(size_bytes=1_000_000, small_tensors=16)


def whole(model: Model, layout: Layout, step: int) -> dict[str, Tensor]:
    """The global tensors that the ranks' pieces make up."""
    tensors: dict[str, Tensor] = {}
    for rank in range(layout.ranks):
        state = RankState(layout, rank, model)
        for _ in range(step):
            state.advance()
        for key, piece in state.pieces.items():
            target = tensors.setdefault(key, torch.zeros(piece.global_shape, dtype=piece.data.dtype))
            if piece.axis is not None:
                size = piece.data.shape[piece.axis]
                target = target.narrow(piece.axis, piece.at * size, size)
            target.copy_(piece.data)
    return tensors


@pytest.mark.parametrize("content", ["gpt", "rows", "columns"])
@pytest.mark.parametrize("precision", ["fp32", "mixed"])
def test_state_is_the_same_on_every_layout(content: Content, precision: Precision) -> None:
    model = replace(MODEL, content=content, precision=precision)
    one = whole(model, Layout(), 2)
    for layout in (Layout(tp=8), Layout(tp=2, pp=2, dp=2), Layout(pp=4)):
        other = whole(model, layout, 2)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2), Layout(tp=2, dp=2), Layout(pp=2, dp=4)])
def test_every_piece_has_one_first_replica(layout: Layout) -> None:
    states = [RankState(layout, rank, MODEL) for rank in range(layout.ranks)]
    stored = sum(state.own_bytes for state in states)
    assert stored == sum(tensor.nbytes for tensor in whole(MODEL, Layout(), 0).values())
    assert sum(state.size_bytes for state in states) >= layout.dp * stored


@pytest.mark.parametrize("precision", ["fp32", "mixed"])
def test_values_are_finite_numbers(precision: Precision) -> None:
    state = RankState(Layout(), 0, replace(MODEL, precision=precision))
    assert all(tensor.isfinite().all() for tensor in state.tensors().values())
    for item_bytes, infinity in ((2, 0x7F80), (4, 0x7F80_0000)):
        assert 2 * (PRIMES[item_bytes] - 1) + 300 < infinity  # after so many steps


@pytest.mark.parametrize("has_optimizer", [False, True])
def test_advance_makes_the_state_of_the_next_step(has_optimizer: bool) -> None:
    state = RankState(Layout(tp=2), 1, MODEL)
    assert not has_optimizer or state.optimizer
    state.advance()
    state.check(1)
    with pytest.raises(ValueError, match="step 0"):
        state.check(0)


def test_optimizer_step_calls_hooks_outside_of_its_own_time() -> None:
    state = RankState(Layout(), 0, MODEL)
    seen: list[bool] = []
    state.optimizer.register_step_pre_hook(lambda *_: seen.append(state.pieces["model.output.weight"].holds(0)))
    state.advance()
    assert seen == [True]
    assert state.optimizer.change_s > 0


@pytest.mark.parametrize("precision", ["fp32", "mixed"])
def test_check_finds_one_wrong_bit(precision: Precision) -> None:
    state = RankState(Layout(), 0, replace(MODEL, precision=precision))
    for key, piece in state.pieces.items():
        piece.bits.view(-1)[-1] ^= 1
        with pytest.raises(ValueError, match=re.escape(key)):
            state.check(0)
        piece.bits.view(-1)[-1] ^= 1
    state.check(0)


def test_check_finds_rows_and_tensors_that_changed_places() -> None:
    state = RankState(Layout(), 0, MODEL)
    weight = state.pieces["model.layers.0.proj.weight"].data
    weight[[0, 32]] = weight[[32, 0]]
    with pytest.raises(ValueError, match=r"layers\.0\.proj\.weight"):
        state.check(0)
    weight.copy_(state.pieces["model.layers.1.proj.weight"].data)
    with pytest.raises(ValueError, match=r"layers\.0\.proj\.weight"):
        state.check(0)


def test_check_finds_a_state_that_nothing_was_loaded_into() -> None:
    state = RankState(Layout(), 0, MODEL)
    state.poison()
    with pytest.raises(ValueError, match="step 0"):
        state.check(0)


class Forgetful(Engine):
    """Its load fills everything but the last element of the last tensor."""

    def load(self, step: int) -> None:
        for piece in self.state.pieces.values():
            last = piece.bits.view(-1)[-1].clone()
            piece.fill(step)
        piece.bits.view(-1)[-1] = last


def test_a_wrong_load_is_no_figure(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="does not hold the values of step 3"):
            steps.load(Forgetful(tmp_path, RankState(Layout(), 0, MODEL)), 3)
    finally:
        torch.distributed.destroy_process_group()


def test_small_tensors_are_as_many_as_asked_for() -> None:
    layout = layout_of(4)
    states = [RankState(layout, rank, replace(MODEL, content="small", small_tensors=400)) for rank in range(4)]
    assert sum(len(state.pieces) for state in states) == 400
    assert {piece.data.nbytes for state in states for piece in state.pieces.values()} == {4096}


def test_memory_counts_while_it_is_held_here_or_in_a_child() -> None:
    size = 32 << 20
    with PeakMemory() as memory:
        held = np.ones(size, dtype=np.uint8)
        assert memory.peak_bytes() > 0.9 * size
        del held
        memory.forget_peak()
        assert memory.peak_bytes() < 0.5 * size
        child = "import sys, time; held = bytes([1]) * (32 << 20); print(len(held), flush=True); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert int(process.stdout.readline()) == size
            assert memory.peak_bytes() > 0.9 * size
            process.communicate()


def readme_table(heading: str) -> list[list[str]]:
    """The cells of the rows of the first table below a heading."""
    text = README.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return rows[2:]  # after the titles and the line below them


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_readme_names_every_figure_and_no_other() -> None:
    rows = readme_table("Figures")
    assert [kind for row in rows for kind in quoted(row[0])] == list(KINDS)
    named = {name for row in rows for name in quoted(row[1])} - {"sync", "async"}
    assert named == {figure for kind in KINDS.values() for figure in kind.figures}


def test_readme_names_every_engine() -> None:
    assert {name for row in readme_table("Engines") for name in quoted(row[0])} == set(ENGINES)


def test_plan_has_a_job_for_every_kind_and_layout_change() -> None:
    sections = list(plan_sections(list(KINDS), Layout(tp=2, pp=2), MODEL, ["mixed", "fp32"], cores=2))
    assert [section.kind for section in sections] == ["sync", *KINDS]
    by_kind = {section.kind: section for section in sections}
    assert {kind: [job.mode for group in section.groups for job in group] for kind, section in by_kind.items()} == {
        "sync": ["sync"],
        "async": ["async"],
        "loop": ["loop"],
        "layouts": ["store", "reload"] * len(LAYOUT_CHANGES),
        "memory": ["peak_save", "peak_load", "peak_async"],
        "index": ["index"],
        "small": ["sync", "async"],
        "replicas": ["sync"],
    }
    [loop_group] = by_kind["loop"].groups
    assert loop_group[0].layout.ranks == 2  # as many as cores
    assert [group[-1].label for group in by_kind["layouts"].groups] == list(LAYOUT_CHANGES)
    [replicas] = by_kind["replicas"].groups
    assert (replicas[0].layout.dp, replicas[0].layout.ranks) == (2, 4)


def record() -> Record:
    limits_answer = Answer(state_bytes=10**9)
    limits_answer.samples = {
        "write": [0.5],
        "write_checked": [0.6],
        "read": [0.3],
        "read_copied": [0.4],
        "read_checked": [0.4],
        "copy": [0.1],
    }
    limits = limits_of(limits_answer)
    answers = {
        "distckpt": [Answer(state_bytes=2 * 10**9, samples={"save": [3.0, 1.0, 2.0]}, backend="io_uring")],
        "dcp": [Answer(state_bytes=2 * 10**9, samples={"save": [4.0]}, notes=["<odd> | thing"])],
        "torch.save": [Answer(state_bytes=2 * 10**9, samples={"save": [8.0]})],
        "torchsnapshot": [Answer(missing="No module named 'torchsnapshot'")],
    }
    peers = {"dcp", "torch.save", "torchsnapshot"}
    section = section_result("sync", "Saving", answers, {"torch.save": "it crashed"}, peers, limits)
    return Record(
        time="now",
        command="python -m benchmarks",
        commit="",
        machine={"cpu": "a", "cores": 2},
        file_system={"type": "ext4"},
        versions={},
        repeats=3,
        duration_s=1.0,
        sections=[section],
    )


def test_figures_are_medians_beside_limit_and_best_peer() -> None:
    engines = record().sections[0].engines
    figure = engines["distckpt"].figures["save"]
    assert (figure.median, figure.min, figure.max) == (2.0, 1.0, 3.0)
    assert figure.of_limit == pytest.approx(0.5)  # 2 GB at 2 GB/s take 1 s
    assert figure.of_best_peer == pytest.approx(2.0)
    assert engines["dcp"].figures["save"].of_best_peer == pytest.approx(1.0)
    assert engines["torch.save"].figures["save"].of_best_peer == pytest.approx(0.5)


def test_limits_are_measured_for_the_sections_that_are_held_against_them() -> None:
    sections = plan_sections(list(KINDS), Layout(tp=2, pp=2), MODEL, ["mixed", "fp32"], cores=2)
    assert {section.kind for section in sections if section.limits is None} == {"memory", "index"}


def test_section_without_limits_has_no_shares_of_them() -> None:
    answers = {"dcp": [Answer(state_bytes=1, samples={"save": [1.0]})]}
    section = section_result("sync", "", answers, {}, {"dcp"}, Limits(notes=["not measured: no memory"]))
    figure = section.engines["dcp"].figures["save"]
    assert (figure.of_limit, figure.of_best_peer) == (None, 1.0)


def test_extra_time_below_zero_has_no_ratios() -> None:
    copy = Limit(median_s=1.0, min_s=1.0, max_s=1.0, samples_s=[1.0], gb_per_s=1.0)
    limits = Limits(transfers={"copy": copy})
    answers = {"dcp": [Answer(state_bytes=1, samples={"loop_stall": [-0.1], "loop_slowdown": [-3.0]})]}
    figures = section_result("loop", "", answers, {}, {"dcp"}, limits).engines["dcp"].figures
    assert {(figure.of_limit, figure.of_best_peer) for figure in figures.values() if figure.median < 0} == {
        (None, None)
    }


def test_checksum_cost_is_what_checked_transfers_take_longer() -> None:
    assert record().sections[0].limits.checksum_cost == pytest.approx({"save": 0.2, "load": 0.0})


@pytest.mark.parametrize("render", [to_markdown, to_html])
def test_report_shows_figures_failures_and_what_is_missing(render: object) -> None:
    assert callable(render)
    text = render(record())
    for shown in ("2.000 s", "2.00x", "it crashed", "No module named", "io_uring" if render is to_html else "50%"):
        assert shown in text
    assert "<odd>" not in to_html(record())  # escaped


def test_last_words_say_how_a_silent_worker_ended() -> None:
    output = (
        "W torch/distributed/elastic/multiprocessing/api.py:900] Sending process 7 closing signal SIGTERM\n"
        "benchmarks.worker FAILED\n  exitcode  : -11 (pid: 12)\n"
    )
    assert _last_words(output, 1) == "no output (exitcode : -11 (pid: 12))"


def test_files_that_an_engine_removed_meanwhile_are_passed_over(tmp_path: Path) -> None:
    there, gone = tmp_path / "there", tmp_path / "gone"
    there.write_bytes(bytes(1 << 20))
    for work in (sync_files, read_into_page_cache, drop_from_page_cache):
        work([gone, there])
    assert 0.0 <= cached_fraction([gone, there]) <= 1.0
