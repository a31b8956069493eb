"""Imports only go down: the table below is section 3 of docs/design.md, and the code is held to it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "distckpt"

VALUES = {
    "decoding",
    "errors",
    "utf8_text",
    "geometry",
    "json_value",
    "host",
    "garbage",
    "checked_json",
    "metrics",
    "key_globs",
}
FORMAT = {"chunk_table", "shard_file", "index", "elements"}
PORTS = {"storage", "coordinator"}
TENSORS = {"per_rank", "sharded_tensor", "meta", "leaf_value", "state_dict"}
MOVEMENT = {"transport", "ring", "staging", "arena", "writing", "host_group", "checkpoint_files", "reader"}
MOVEMENT |= {"open_files", "shared_reading", "commit", "wanted_tensor", "tensor_source", "removing", "heartbeat"}
MOVEMENT |= {"after_commit", "history_log", "candidates", "copier", "link_names"}
FLOWS = {"contents", "converting", "filling", "matching", "tied_memory", "describing", "offer", "share"}
FLOWS |= {"save_context", "saving", "loading", "applying"}
LIFE = {"labels", "roots", "cataloging", "surroundings", "selecting", "labelling", "retention", "pruning"}
HANDLES = {"guarding", "pending"}

# What each module may import of this package. A row for a package stands for all modules in it, which may
# import each other. "__init__" are the public names, for those who sit outside.
ALLOWED: dict[str, set[str]] = {
    "decoding": set(),
    "utf8_text": set(),
    "errors": set(),
    "geometry": {"errors"},
    "json_value": {"errors"},
    "host": set(),
    "garbage": set(),
    "checked_json": {"_C", "decoding", "errors"},
    "metrics": set(),
    "key_globs": set(),
    "root_owner": {"decoding"},
    "chunk_table": VALUES | {"_C"},
    "shard_file": VALUES | {"_C"},
    "index": VALUES | {"_C", "chunk_table", "shard_file"},
    "elements": {"shard_file"},
    "placement": VALUES | FORMAT,
    "planner": VALUES | FORMAT | {"placement"},
    "storage": {"_C", "errors", "host"},
    "coordinator": {"decoding", "errors", "utf8_text"},
    "per_rank": VALUES | {"index"},
    "meta": set(),
    "leaf_value": VALUES | FORMAT | {"per_rank", "sharded_tensor"},
    "assembling": VALUES | FORMAT | {"_C", "planner"},
    "sharded_tensor": VALUES | FORMAT,
    "state_dict": VALUES | FORMAT | {"leaf_value", "meta", "per_rank", "sharded_tensor"},
    "transport": VALUES | {"_C", "shard_file"},
    "ring": VALUES | {"_C", "transport"},
    "arena": {"_C", "host", "shard_file", "transport"},
    "staging": {"_C", "errors", "garbage", "arena", "storage", "transport"},
    "writing": VALUES | FORMAT | {"_C", "storage"},
    "checkpoint_files": VALUES | FORMAT | {"_C", "extents", "storage"},
    "located_chunks": VALUES | FORMAT | {"planner"},
    "extents": {"geometry"},
    "reading_order": VALUES | FORMAT | {"located_chunks"},
    "reader": VALUES | FORMAT | {"storage", "checkpoint_files", "located_chunks", "planner"},
    "wanted_tensor": VALUES | {"reader", "transport"},
    "tensor_source": VALUES | FORMAT | {"_C", "storage", "checkpoint_files", "extents", "reader"},
    "number_differences": {"geometry", "shard_file", "elements"},
    "value_differences": {"errors", "json_value", "number_differences"},
    "paired_reading": {
        *VALUES | FORMAT,
        *("storage", "checkpoint_files", "reader", "reading_order", "tensor_source", "number_differences"),
    },
    "comparing": {
        *VALUES | FORMAT,
        *("storage", "checkpoint_files", "commit", "roots", "selecting"),
        *("number_differences", "value_differences", "paired_reading", "tensor_source"),
    },
    "moments": {"elements", "number_differences"},
    "tensor_values": {
        *VALUES | FORMAT,
        *("_C", "storage", "checkpoint_files", "commit", "selecting", "reader", "tensor_source", "moments"),
    },
    "host_group": {"_C", "host"},
    "open_files": {"checkpoint_files", "reader"},
    "shared_reading": FORMAT | {"_C", "host_group", "open_files", "reader"},
    "commit": VALUES | FORMAT | PORTS | {"root_owner"},
    "labels": VALUES | FORMAT | {"storage", "commit", "checkpoint_files"},
    "removing": {"errors", "storage", "commit", "labels"},
    "roots": {"errors", "storage", "commit", "removing", "root_owner"},
    "cataloging": VALUES | FORMAT | {"storage", "commit", "checkpoint_files", "labels", "removing", "roots"},
    "surroundings": {"errors", "storage", "commit", "cataloging", "roots"},
    "selecting": VALUES | {"storage", "commit", "cataloging", "roots", "surroundings"},
    "inspecting": VALUES | FORMAT | {"storage", "commit", "cataloging", "checkpoint_files", "planner"},
    "labelling": VALUES | {"storage", "commit", "cataloging", "labels", "selecting"},
    "heartbeat": {"storage", "commit"},
    "retention": {"metrics", "commit"},
    "pruning": {"storage", "commit", "cataloging", "removing", "retention", "roots", "surroundings"},
    "verifying": VALUES | FORMAT | {"storage", "commit", "checkpoint_files", "planner", "parity", "selecting"},
    "worker": set(),
    "history_log": {"decoding", "errors", "index", "storage", "report"},
    "copier": {
        *(
            "errors",
            "storage",
            "cataloging",
            "commit",
            "copying",
            "pruning",
            "removing",
            "retention",
            "writing",
            "worker",
            "history_log",
        ),
        *("report",),
    },
    "link_names": {"errors", "storage", "commit", "history_log"},
    "after_commit": {
        *(
            "errors",
            "storage",
            "commit",
            "removing",
            "pruning",
            "retention",
            "worker",
            "report",
            "history_log",
            "copier",
            "link_names",
        ),
    },
    "candidates": {"errors", "index", "storage", "commit"},
    "opening": VALUES | PORTS | {"index", "planner", "protecting"},
    "copying": VALUES
    | FORMAT
    | {
        "_C",
        "storage",
        "checkpoint_files",
        "commit",
        "heartbeat",
        "labels",
        "parity",
        "removing",
        "report",
        "roots",
        "selecting",
    },
    "exchange": {
        *VALUES | FORMAT,
        *("_C", "storage", "assembling", "checkpoint_files", "commit", "heartbeat", "planner", "reader", "removing"),
        *("reading_order", "report", "roots", "selecting", "share_files", "tensor_source", "writing"),
    },
    "parity": VALUES | FORMAT | {"_C", "storage", "commit", "checkpoint_files"},
    "rebuilding": VALUES | FORMAT | {"_C", "storage", "assembling", "commit", "checkpoint_files"},
    "repairing": VALUES
    | FORMAT
    | {"storage", "commit", "removing", "checkpoint_files", "parity", "rebuilding", "verifying"}
    | {"selecting", "surroundings"},
    "protecting": VALUES | FORMAT | PORTS | {"commit", "checkpoint_files", "parity"},
    "resharding": {
        *VALUES | FORMAT | PORTS | {"root_owner"},
        *("_C", "assembling", "checkpoint_files", "commit", "copying", "elements", "heartbeat", "parity", "planner"),
        *("reader", "reading_order", "removing", "report", "roots", "selecting", "share_files", "tensor_source"),
        "writing",
    },
    "report": VALUES,
    # The flows are the checkpointer, cut in pieces; they hand the list of adapters to flatten.
    "describing": VALUES | FORMAT | TENSORS | {"_C", "planner", "adapters"},
    "offer": {"errors", "metrics", "storage", "planner"},
    "share": VALUES | FORMAT | {"planner", "commit", "arena", "describing", "share_files"},
    "share_files": VALUES | FORMAT | {"planner"},
    "save_context": {"index", "assembling", "share"} | PORTS | MOVEMENT,
    "saving": {
        *VALUES | FORMAT | PORTS | TENSORS | MOVEMENT,
        *(
            "planner",
            "assembling",
            "report",
            "describing",
            "offer",
            "share",
            "share_files",
            "save_context",
            "protecting",
            "roots",
        ),
    },
    "contents": VALUES | FORMAT | TENSORS,
    "converting": {"errors", "geometry", "transport", "wanted_tensor"},
    "filling": VALUES | FORMAT | TENSORS | MOVEMENT | {"storage", "matching", "converting", "tied_memory"},
    "matching": VALUES | FORMAT | TENSORS | {"planner", "reader", "report"},
    "tied_memory": {"errors", "geometry", "transport", "wanted_tensor"},
    "applying": {"index", "matching", "state_dict"},
    "loading": {
        *VALUES | FORMAT | PORTS | TENSORS | MOVEMENT,
        *("_C", "planner", "report", "adapters", "applying", "contents", "filling", "matching", "repairing"),
        "selecting",
    },
    "adapters": {"errors", "geometry", "sharded_tensor", "state_dict", "__init__"},
    "guarding": set(),
    "pending": {"report"},
    "checkpointer": VALUES | FORMAT | PORTS | MOVEMENT | FLOWS | HANDLES | LIFE | {"opening", "report", "protecting"},
    "termination": PORTS,
    "one_directory": VALUES | PORTS | {"checkpointer", "pending", "index", "loading", "report"},
    # Outside, as adapters and cli are: by public names, the ports, checksums of memory, and what loads are told by.
    "training": PORTS | {"utf8_text", "_C", "decoding", "errors", "index", "contents", "filling", "__init__"},
    "__init__": VALUES
    | PORTS
    | TENSORS
    | LIFE
    | {"checkpointer", "pending", "one_directory", "report", "verifying", "repairing", "termination", "history_log"}
    | {"training", "copying", "copier", "after_commit", "link_names"}
    | {"resharding", "comparing", "tensor_values", "exchange"},
    "cli": {
        *VALUES | FORMAT | PORTS | LIFE,
        *(
            "commit",
            "resharding",
            "verifying",
            "repairing",
            "report",
            "history_log",
            "copying",
            "training",
            "__init__",
        ),
        *("comparing", "number_differences", "value_differences", "tensor_values", "moments"),
        *("checkpoint_files", "inspecting"),
        "exchange",
    },
    "testing": VALUES | PORTS | {"transport", "__init__"},
}
# Rows that were agreed before their module was written. Take yours out when you add it.
PLANNED: set[str] = set()

# Only these touch tensors. The others stay usable where torch is not installed or takes too long to load.
MAY_IMPORT_TORCH = {
    *TENSORS | FLOWS | HANDLES,
    *("transport", "ring", "arena", "staging", "wanted_tensor"),
    *("checkpointer", "one_directory", "adapters", "testing", "training"),
}
# Extras: imported in the function that needs them.
NEVER_AT_MODULE_LEVEL = {"mpi4py", "zarr", "obstore", "megatron", "deepspeed", "safetensors", "matplotlib"}
# Test tools are for the contracts that backends subclass.
MAY_IMPORT_PYTEST = {"testing", "storage.contract", "coordinator.contract", "transport.contract"}


def module_name(path: Path) -> str:
    """distckpt/storage/posix.py -> "storage.posix"; a package is named without its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def row_of(module: str) -> str | None:
    """The row of the table for a module: its own, or that of its package."""
    names = [module.rsplit(".", count)[0] for count in range(module.count(".") + 1)]
    return next((name for name in names if name in ALLOWED), None)


def imported_modules(nodes: Iterator[ast.AST], module: str) -> Iterator[str]:
    """Absolute names of what the import statements among `nodes` import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: relative import; write it in full"
            if node.module == "distckpt":
                yield from (f"distckpt.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: not the bodies of functions, not `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield child
        yield from at_import_time(child)


def forbidden_imports(module: str, source: str) -> list[str]:
    """What this source, as this module, must not import."""
    row = row_of(module)
    assert row is not None, (
        f"distckpt.{module} is in no row of the table. Say in docs/design.md, section 3, which layer it "
        f"belongs to, then give it a row in {Path(__file__).name} with the layers below it."
    )
    tree = ast.parse(source)
    forbidden = []
    for name in imported_modules(ast.walk(tree), module):
        if name.split(".")[0] != "distckpt":
            continue
        inner = name.partition(".")[2]
        # A name that is no module is one of the public names.
        target = "_C" if inner == "_C" or inner.startswith("_C.") else row_of(inner) or "__init__"
        if target != row and target not in ALLOWED[row]:
            forbidden.append(name)
    for name in imported_modules(at_import_time(tree), module):
        library = name.split(".")[0]
        if (
            (library == "torch" and row not in MAY_IMPORT_TORCH)
            or library in NEVER_AT_MODULE_LEVEL
            or (library in ("pytest", "hypothesis") and module not in MAY_IMPORT_PYTEST)
        ):
            forbidden.append(name)
    return forbidden


@pytest.mark.parametrize("module", SOURCES)
def test_module_imports_only_what_lies_below_it(module: str) -> None:
    forbidden = forbidden_imports(module, SOURCES[module].read_text(encoding="utf-8"))
    assert not forbidden, f"distckpt.{module} must not import {forbidden} (docs/design.md, section 3)"


def test_every_row_has_its_module() -> None:
    built = {row_of(module) for module in SOURCES}
    assert ALLOWED.keys() - built <= PLANNED, "take the row out of the table together with its module"


def test_table_has_no_cycles() -> None:
    below: set[str] = {"_C"}
    rows = dict(ALLOWED)
    # "__init__" only re-exports; whoever sits outside may use it.
    while lowest := [row for row, allowed in rows.items() if allowed - {"__init__"} <= below]:
        below.update(lowest)
        for row in lowest:
            del rows[row]
    assert not rows


def test_modules_without_tensors_load_without_torch() -> None:
    modules = [
        f"distckpt.{module}"
        for module in SOURCES
        if row_of(module) in ALLOWED.keys() - MAY_IMPORT_TORCH and module not in ("__init__", *MAY_IMPORT_PYTEST)
    ]
    assert {"distckpt.index", "distckpt.shard_file", "distckpt.planner", "distckpt.storage"} <= set(modules)
    assert {"distckpt.commit", "distckpt.retention", "distckpt.coordinator"} <= set(modules)
    script = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"something among {modules} imports torch\n{done.stderr}"


@pytest.mark.parametrize(
    ("module", "source", "forbidden"),
    [
        ("planner", "import torch", ["torch"]),
        ("planner", "from torch.distributed import x", ["torch.distributed"]),
        ("planner", "class A:\n    import torch", ["torch"]),
        ("planner", "def f():\n    import torch", []),
        ("planner", "if TYPE_CHECKING:\n    import torch", []),
        ("planner", "from distckpt.storage import Storage", ["distckpt.storage"]),
        ("planner", "def f():\n    import distckpt.storage.posix", ["distckpt.storage.posix"]),
        ("planner", "if TYPE_CHECKING:\n    from distckpt import storage", ["distckpt.storage"]),
        ("planner", "from distckpt import Checkpointer", ["distckpt.Checkpointer"]),
        ("planner", "from distckpt.index import Index", []),
        ("storage.posix", "from distckpt import _C\nfrom distckpt.storage.port import FreeSpace", []),
        ("storage.posix", "from distckpt.coordinator import agree", ["distckpt.coordinator"]),
        ("storage.posix", "import pytest", ["pytest"]),
        ("coordinator.mpi", "import mpi4py.MPI", ["mpi4py.MPI"]),
        ("adapters.dtensor", "from distckpt import ShardedTensor\nimport torch", []),
    ],
)
def test_layering_test_finds(module: str, source: str, forbidden: list[str]) -> None:
    assert forbidden_imports(module, source) == forbidden


def test_module_without_a_row_is_refused_with_advice() -> None:
    with pytest.raises(AssertionError, match="give it a row"):
        forbidden_imports("brand_new", "")
