"""One module per kind of measurement: each decides what is inside a figure and what is outside."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.engines.port import Engine
from benchmarks.measuring.asynchronous import measure_async
from benchmarks.measuring.index import measure_index
from benchmarks.measuring.loop import measure_loop
from benchmarks.measuring.memory import measure_peak_async, measure_peak_load, measure_peak_save
from benchmarks.measuring.relayout import measure_reload, store
from benchmarks.measuring.sync import measure_sync
from benchmarks.request import Answer, Mode, Request

# Collective: every rank of a job makes the same call and gets an answer with the same samples, but for what only
# rank 0 measures; rank 0's answer is the job's.
MEASUREMENTS: dict[Mode, Callable[[Engine, Request, Answer], None]] = {
    "sync": measure_sync,
    "async": measure_async,
    "loop": measure_loop,
    "store": store,
    "reload": measure_reload,
    "peak_save": measure_peak_save,
    "peak_load": measure_peak_load,
    "peak_async": measure_peak_async,
    "index": measure_index,
}
