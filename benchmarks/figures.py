"""What is reported: the kinds of figures, the figures of each, their units and limits. Plain tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["sync", "async", "loop", "layouts", "memory", "index", "small", "replicas"]
# times: a multiple of something; per_cent: of a time. Less is better in all of them.
Unit = Literal["s", "bytes", "times", "per_cent"]


@dataclass(frozen=True, slots=True)
class FigureSpec:
    """limit: the name of the machine's limit for the same bytes; "1" if the figure itself cannot be below 1.

    is_compared: whether a ratio to the best peer says anything; a part of a time does not.
    """

    title: str
    unit: Unit
    limit: str
    meaning: str
    is_compared: bool = True


@dataclass(frozen=True, slots=True)
class KindSpec:
    title: str
    meaning: str
    figures: dict[str, FigureSpec]


@dataclass(frozen=True, slots=True)
class LayoutChange:
    """A checkpoint of one (tp, pp) loaded on another. content: of benchmarks.model."""

    title: str
    saved: tuple[int, int]
    loaded: tuple[int, int]
    content: Literal["gpt", "rows", "columns"]


LAYOUT_CHANGES = {
    "tp_merge": LayoutChange("TP 2 to 1", (2, 2), (1, 2), "gpt"),
    "tp_split_rows": LayoutChange("TP 1 to 8, rows", (1, 1), (8, 1), "rows"),
    "tp_split_columns": LayoutChange("TP 1 to 8, columns", (1, 1), (8, 1), "columns"),
    "pp_split": LayoutChange("PP 2 to 4", (1, 2), (1, 4), "gpt"),
}

_SYNC = {
    "save_first": FigureSpec("first save", "s", "write", "the first save of a process, until durable"),
    "save": FigureSpec("save", "s", "write", "a later save, until durable"),
    "load_cold": FigureSpec("cold load", "s", "read", "a load of files that are not in the page cache"),
    "load_warm": FigureSpec("warm load", "s", "copy", "a load of files that are in the page cache"),
}
_ASYNC = {
    "prepare": FigureSpec("prepare", "s", "", "what the engine offers to be called once before the first save"),
    "stall_first": FigureSpec("first call", "s", "copy", "inside the first call of async_save"),
    "stall": FigureSpec("call", "s", "copy", "inside a later call of async_save, nothing else running"),
    "durable": FigureSpec("durable", "s", "write", "from the call until durable, nothing else running"),
}
_LOOP = {
    "loop_stall": FigureSpec("extra time", "s", "copy", "the loop with one async save less the loop without"),
    "loop_call": FigureSpec(
        "of it: call", "s", "copy", "inside async_save, while the other ranks compute", is_compared=False
    ),
    "loop_waits": FigureSpec(
        "of it: waits", "s", "", "in the optimizer's hooks, and in what the engine wants per step", is_compared=False
    ),
    "loop_slowdown": FigureSpec("slower draining", "per_cent", "", "the rest of it, of the time the save drained"),
    "loop_drain": FigureSpec(
        "draining", "s", "write", "from the end of the call to the step that found the save ended", is_compared=False
    ),
    "loop_step": FigureSpec("step", "s", "", "a step of the loop without a save", is_compared=False),
}
_LAYOUTS = {
    name: spec
    for change, row in LAYOUT_CHANGES.items()
    for name, spec in (
        (f"{change}_load", FigureSpec(row.title, "s", "read", "a cold load")),
        (f"{change}_read", FigureSpec(f"{row.title}: read", "times", "1", "bytes read from disk over bytes needed")),
    )
}
_MEMORY = {
    "peak_save": FigureSpec("sync save", "bytes", "", "of a sync save, over what the process had before the first"),
    "peak_async": FigureSpec("async save", "bytes", "", "the same of an async save, from the call until durable"),
    "peak_load": FigureSpec("load", "bytes", "", "of a load, over what the process had before"),
}
_INDEX = {
    "index_bytes": FigureSpec("bytes a chunk", "bytes", "", "size of what lists the chunks, over their number"),
    "index_open": FigureSpec("time to open", "s", "", "reading and decoding it, all of it, in one process, cached"),
}
_SMALL = {name: spec for name, spec in (_SYNC | _ASYNC).items() if name != "load_warm"}

KINDS: dict[Kind, KindSpec] = {
    "sync": KindSpec("Saving and loading", "every rank in the call until the checkpoint is durable, or loaded", _SYNC),
    "async": KindSpec("Async saves", "training stands still inside the call only; nothing else runs", _ASYNC),
    "loop": KindSpec("What training feels", "a loop that computes on every core, with one async save among it", _LOOP),
    "layouts": KindSpec("Loading on another layout", "saved by one world size, loaded cold by another", _LAYOUTS),
    "memory": KindSpec(
        "Extra memory", "peak of anonymous and shared memory of the largest rank, children included", _MEMORY
    ),
    "index": KindSpec("Index", "of a checkpoint of many small tensors", _INDEX),
    "small": KindSpec("Many small tensors", "sync and async figures of a state of 4 KiB tensors", _SMALL),
    "replicas": KindSpec("Data parallelism", "sync figures where pairs of ranks hold equal values", _SYNC),
}
