"""Many checks in one job of real processes: starting the processes takes longer than the checks.

A script of checks defines functions named check_..., each taking a directory, and ends with
`run_checks(globals(), WORLD_SIZE)`.
"""

from __future__ import annotations

import ast
import json
import sys
import traceback
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any


def names_of_checks(script: Path) -> list[str]:
    """The checks of a script, in order, without running it."""
    return [
        node.name
        for node in ast.parse(script.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
    ]


def outcomes_of(stdout: str) -> dict[str, str]:
    """What one rank printed: "ok" or a traceback for each check that it ran."""
    return dict(json.loads(line) for line in stdout.splitlines())


def assert_ok(name: str, ranks: list[dict[str, str]]) -> None:
    for rank, outcomes in enumerate(ranks):
        assert name in outcomes, "not run, since an earlier check failed"
        assert outcomes[name] == "ok", f"rank {rank}:\n{outcomes[name]}"


def run_checks(names: Mapping[str, Any], world_size: int) -> None:
    """Run the check_ functions of a script on this rank, in order, until one fails on any rank."""
    import torch.distributed as dist

    root = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    outcomes: list[Any] = ["ok"] * world_size
    for name, check in list(names.items()):
        if name.startswith("check_") and outcomes == ["ok"] * world_size:  # else the ranks are out of step
            outcome = "ok"
            try:
                check(root)
            except Exception:
                outcome = traceback.format_exc()
            print(json.dumps([name, outcome]))
            dist.all_gather_object(outcomes, outcome)
    dist.destroy_process_group()
