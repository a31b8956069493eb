"""distckpt cat: what one key of a checkpoint holds: statistics of a tensor, elements, a .npy file, a value."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer

from distckpt.cli.interruption import leaving
from distckpt.cli.numbers import json_number, number_text, shape_text
from distckpt.cli.output import MEMORY, ROOT, WHICH, console, plain_text, print_json, progress_bar, shown, size_text
from distckpt.cli.quantities import size_bytes
from distckpt.elements import Elements
from distckpt.geometry import Box
from distckpt.moments import are_numbers
from distckpt.number_differences import number_of
from distckpt.shard_file import DTYPES
from distckpt.tensor_values import (
    StoredKey,
    TensorStatistics,
    as_numpy_type,
    find_key,
    parse_slice,
    read_bands,
    read_values,
    statistics_of,
    tensor_entry,
    write_npy,
)

_MAX_PRINTED = 100_000  # elements


def cat(
    root: Annotated[Path, typer.Argument(help=ROOT)],
    key: Annotated[str, typer.Argument(help="Of a tensor or a value, as `distckpt inspect` names it.")],
    iteration: Annotated[str | None, typer.Option(help=WHICH, show_default=False)] = None,
    slice_: Annotated[
        str | None,
        typer.Option("--slice", help="Print these elements, or write these alone: '0:4, :, 3'.", show_default=False),
    ] = None,
    npy: Annotated[
        Path | None, typer.Option(help="Write the tensor into this file, which np.load reads.", show_default=False)
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Write bfloat16, float8 and complex32 as their bits, not as float32 or complex64."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    memory: Annotated[str, typer.Option(help=MEMORY)] = "256MiB",
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Show what a key holds: statistics of a tensor, its elements with --slice; a value as JSON. --npy writes a file.

    Exit code 0; 2: there is no such key, or what it holds is damaged.

    Example: distckpt cat /checkpoints/run7 model/embedding.weight --slice "0:2, :4"
    """
    stored = find_key(root, key, iteration)
    memory_bytes = size_bytes(memory)
    if stored.entry is None:
        if slice_ is not None or npy is not None:
            tensor_entry(stored)  # Says that it is none.
        _print_values(stored, as_json=json)
    elif npy is not None:
        _write(stored, npy, slice_ or "", raw=raw, force=force, memory_bytes=memory_bytes, as_json=json)
    elif slice_ is not None:
        _print_slice(stored, slice_, memory_bytes, as_json=json)
    else:
        with (
            leaving("nothing was changed"),
            progress_bar(f"read {shown(key, 40)}", stored.entry.size_bytes) as on_bytes,
        ):
            statistics = statistics_of(stored, memory_bytes=memory_bytes, on_bytes=on_bytes)
        if json:
            fields = msgspec.structs.asdict(statistics)
            print_json({name: json_number(value) for name, value in fields.items()})
        else:
            _print_statistics(statistics)


def _print_values(stored: StoredKey, *, as_json: bool) -> None:
    values = read_values(stored)
    if as_json:
        kind = "per-rank value" if stored.is_per_rank else "value"
        one = {"values": values} if stored.is_per_rank else {"value": values[0].value}
        print_json({"key": stored.key, "iteration": stored.commit.iteration, "kind": kind, **one})
        return
    for value in values:
        place = " ".join(f"{axis}{at}" for axis, at in value.coordinates.items())
        text = msgspec.json.format(bytes(value.value), indent=2).decode()
        lines = [plain_text(line) for line in text.splitlines()]
        console.print("\n".join([f"{plain_text(place)}: {lines[0]}" if stored.is_per_rank else lines[0], *lines[1:]]))


def _print_statistics(one: TensorStatistics) -> None:
    of = " of magnitudes" if one.dtype.startswith("complex") else ""
    facts: dict[str, object] = {
        "tensor": f"{shown(one.key)}, iteration {one.iteration}",
        "dtype": one.dtype,
        "shape": f"{shape_text(one.shape)}, {one.elements} elements, {size_text(one.bytes)}",
    }
    if not are_numbers(one.dtype):
        facts["numbers"] = "unknown: two to a byte, which --slice and --npy give"
    for name in ("min", "max", "mean", "std", "norm"):
        value = getattr(one, name)
        facts[name] = None if value is None else f"{number_text(value, 9)}{of}"
    for name in ("zeros", "nans", "infinities"):
        facts[name] = getattr(one, name)
    for name, fact in facts.items():
        if fact is not None:
            label = "NaNs" if name == "nans" else name
            console.print(f"{label + ':':<12}{fact}")


def _print_slice(stored: StoredKey, where: str, memory_bytes: int, *, as_json: bool) -> None:
    entry = tensor_entry(stored)
    box, shape = parse_slice(where, entry.global_shape)
    elements = _read_slice(stored, box, memory_bytes)
    if as_json:
        texts = [json_number(number_of(one, entry.dtype)) for one in elements]
        fields = {"key": stored.key, "iteration": stored.commit.iteration, "dtype": entry.dtype, "shape": shape}
        print_json({**fields, "offset": box.offset, "elements": _nested(texts, shape)})
        return
    array = as_numpy_type(elements, entry.dtype).reshape(shape)
    with np.printoptions(threshold=_MAX_PRINTED + 1, linewidth=120):
        console.print(f"{shown(stored.key)} {box}, {entry.dtype}")
        console.print(str(array))


def _read_slice(stored: StoredKey, box: Box, memory_bytes: int) -> Elements:
    if box.size > _MAX_PRINTED:
        raise ValueError(
            f"slice {box} of {stored.key!r} has {box.size} elements, and at most {_MAX_PRINTED} are printed: give a "
            f"smaller --slice, or write a file with --npy"
        )
    parts = [elements.copy() for elements in read_bands(stored, box, memory_bytes=memory_bytes)]
    if parts:
        return np.concatenate(parts)
    return np.zeros(0, np.float32)


def _nested(items: list[object], shape: tuple[int, ...]) -> object:
    """As numpy's tolist() nests them."""
    if not shape:
        return items[0]
    step = len(items) // shape[0] if shape[0] else 0
    return [_nested(items[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def _write(
    stored: StoredKey, npy: Path, where: str, *, raw: bool, force: bool, memory_bytes: int, as_json: bool
) -> None:
    entry = tensor_entry(stored)
    box, shape = parse_slice(where, entry.global_shape)
    size = box.size * DTYPES[entry.dtype].item_bytes
    with leaving(f"{npy} was not written"), progress_bar(f"read {shown(stored.key, 40)}", size) as on_bytes:
        dtype = write_npy(stored, npy, where=where, raw=raw, force=force, memory_bytes=memory_bytes, on_bytes=on_bytes)
    if as_json:
        fields = {"key": stored.key, "iteration": stored.commit.iteration, "dtype": entry.dtype}
        print_json({**fields, "file": str(npy), "npy_dtype": dtype.str, "shape": shape})
        return
    as_what = "" if dtype.name == entry.dtype else f", {entry.dtype} as {dtype.name}"
    bits = " (its bits)" if dtype.kind == "u" and as_what else ""
    console.print(f"{npy}: {shape_text(shape)} {dtype.name}{as_what}{bits}")
