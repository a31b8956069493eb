"""The simulation of large worlds, on a tiny one: it makes what it says, and both engines run through it."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks.inspect_scale import measure, write_checkpoint
from benchmarks.scale import ENGINES, SIZES, Measured, main, print_runs
from benchmarks.world import World
from distckpt.planner import plan_save
from tests.unit.test_cli import run

WORLDS = [World(1, 5), World(8, 100), World(64, 500), World(64, 120, replicas=4), World(16, 40_000)]


@pytest.mark.parametrize("world", [*WORLDS, *(World(*size) for size in SIZES)], ids=str)
def test_a_world_is_a_full_mesh_of_its_ranks(world: World) -> None:
    places = {tuple(at for at, _ in world.mesh(rank).values()) for rank in range(world.ranks)}
    assert len(places) == world.ranks == np.prod([*world.sizes.values()])
    assert world.ranks * world.shards / world.replicas == pytest.approx(world.chunks, rel=0.2)


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_the_ranks_of_a_world_have_whole_tensors(world: World) -> None:
    plan = plan_save([shards for shards, _ in world.messages()])
    tp, pp, dp = world.sizes.values()
    assert list(plan.specs) == sorted(key for stage in range(pp) for key, _ in world.tensors(stage))
    chunks = sum(len(columns.tensor) for columns in plan.columns)
    assert chunks == tp * pp * (dp // world.replicas * world.shards + world.weights)
    replicated = len(plan.replicated_of(0))
    assert replicated == (dp > 1) * world.weights + (world.replicas > 1) * world.shards
    for key, box in world.targets():
        assert box.is_inside(plan.specs[key].global_shape)


@pytest.mark.parametrize("world", WORLDS[:-1], ids=str)
def test_both_engines_go_through_all_steps_of_a_world(world: World) -> None:
    ours, peers = (ENGINES[name](world) for name in ("distckpt", "DCP"))
    assert peers.seconds.keys() <= ours.seconds.keys() == ours.peak_bytes.keys()
    for fact in ("chunks", "regions_loaded"):
        assert ours.facts[fact] == peers.facts[fact]
    assert ours.facts["tensors_loaded"] == world.shards + world.weights
    assert all(seconds >= 0 for seconds in (*ours.seconds.values(), *peers.seconds.values()))


def test_one_size_and_engine_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(ranks=[8], chunks=[50], replicas=[1], engine="distckpt")
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {"seconds", "peak_bytes", "facts"}
    assert printed["facts"]["chunks"] == 8 * 6 + 8


def test_the_table_has_a_column_for_each_run_and_says_why_one_is_missing() -> None:
    measured = Measured({"plan": 1.25}, {"plan": 3_000_000_000}, {"chunks": 1234.0})
    size = {"ranks": 64, "chunks": 1200, "replicas": 2}
    done = {"engine": "distckpt", **size, "seconds": measured.seconds, "facts": measured.facts}
    done["peak_bytes"] = measured.peak_bytes
    console = Console(record=True, width=120, file=StringIO())
    print_runs(console, [done, {"engine": "DCP", **size, "failed": "no time left"}])
    text = console.export_text()
    assert "1.250   3.00" in text
    assert "1,234" in text
    assert "x 2 replicas" in text
    assert "DCP, 64 ranks, 1,200 chunks: no time left" in text


def test_checkpoint_of_a_world_can_be_inspected(tmp_path: Path) -> None:
    facts = write_checkpoint(tmp_path, World(8, 100))
    code, said = run("inspect", tmp_path, "--ranks", "--json")
    found = json.loads(said)
    assert (code, found["contents"]["tensors"], len(found["ranks"])) == (0, facts["tensors"], 8)
    assert sum(rank["tensor_bytes"] for rank in found["ranks"]) == found["contents"]["tensor_bytes"]
    timing = measure(tmp_path, ["--json"], 1)
    assert timing.printed_bytes > 100
