"""distckpt diff: what two checkpoints differ by, key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from distckpt.cli.interruption import leaving
from distckpt.cli.numbers import count_text, json_number, number_text, shape_text
from distckpt.cli.output import (
    DROP,
    MEMORY,
    SELECT,
    WHICH,
    console,
    print_json,
    print_table,
    progress_bar,
    shown,
    size_text,
)
from distckpt.cli.quantities import size_bytes
from distckpt.comparing import ComparisonReport, TensorDifference, compare_checkpoints
from distckpt.errors import CorruptionError
from distckpt.json_value import decode_value
from distckpt.selecting import open_selected, select_commits
from distckpt.value_differences import ValueDifference
from distckpt.verifying import stored_bytes

DIFFERENT, NOT_COMPARED = 1, 2  # exit codes
_TOP = 20


def diff(
    a: Annotated[Path, typer.Argument(help="A root, for its newest checkpoint, or the directory of an iteration.")],
    b: Annotated[Path, typer.Argument(help="The same, to compare it with.")],
    iteration: Annotated[
        str | None, typer.Option(help=f"{WHICH} Of B too, if nothing else says which.", show_default=False)
    ] = None,
    other_iteration: Annotated[
        str | None, typer.Option(help="Which of B, in the same words.", show_default=False)
    ] = None,
    select: Annotated[list[str] | None, typer.Option(help=SELECT, show_default=False)] = None,
    drop: Annotated[list[str] | None, typer.Option(help=DROP, show_default=False)] = None,
    rtol: Annotated[
        float | None, typer.Option(help="Numbers this near, relative to the larger, are equal.", show_default=False)
    ] = None,
    atol: Annotated[float | None, typer.Option(help="Numbers this near are equal.", show_default=False)] = None,
    ignore_dtype: Annotated[
        bool, typer.Option("--ignore-dtype", help="Tensors of two dtypes are equal if their values are.")
    ] = False,
    metadata: Annotated[bool, typer.Option("--metadata", help="Compare metadata and metrics too.")] = False,
    top: Annotated[
        int | None, typer.Option(min=1, help=f"So many of each kind, worst first; {_TOP} in a table.")
    ] = None,
    memory: Annotated[str, typer.Option(help=MEMORY)] = "256MiB",
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Compare two checkpoints: keys, shapes, dtypes, every element, and values. Any layout against any other.

    Equal is bit for bit, unless --rtol or --atol is given. Exit code 0: equal; 1: they differ; 2: they could not be
    compared, or not all of them, as something is damaged.

    Example: distckpt diff /checkpoints/run7 /checkpoints/run7 --iteration 1000 --other-iteration 2000
    """
    memory_bytes = size_bytes(memory)
    storage, selector = open_selected(a, iteration)
    total = stored_bytes(storage, select_commits(storage, selector)[0])
    with leaving("nothing was changed"), progress_bar("compare", total) as on_bytes:
        report = compare_checkpoints(
            a,
            b,
            iteration,
            other_iteration,
            select=select or (),
            drop=drop or (),
            rtol=rtol,
            atol=atol,
            ignore_dtype=ignore_dtype,
            metadata=metadata,
            memory_bytes=memory_bytes,
            on_bytes=on_bytes,
        )
    if json:
        print_json(_json_of(report, top))
    else:
        _print_report(report, _TOP if top is None else top)
    if not report.is_complete:
        raise typer.Exit(NOT_COMPARED)
    raise typer.Exit(0 if report.is_equal else DIFFERENT)


def _json_of(report: ComparisonReport, top: int | None) -> dict[str, object]:
    fields: dict[str, object] = msgspec.structs.asdict(report)
    tensors = [msgspec.structs.asdict(one) for one in report.tensors[:top]]
    fields["tensors"] = [{name: json_number(value) for name, value in one.items()} for one in tensors]
    for name in ("only_in_a", "only_in_b", "values"):
        fields[name] = getattr(report, name)[:top]
    return fields


def _print_report(report: ComparisonReport, top: int) -> None:
    for name, one in (("A", report.a), ("B", report.b)):
        console.print(shown(f"{name}: iteration {one.iteration}, {one.root}/{one.directory}", 1000))
    for name, only in (("A", report.only_in_a), ("B", report.only_in_b)):
        for one_sided in only[:top]:
            console.print(f"only in {name}: {one_sided.kind} {shown(one_sided.key)}")
        _print_rest(len(only), top, f"keys only in {name}")
    if report.tensors:
        _print_tensors(report.tensors[:top])
        _print_rest(len(report.tensors), top, "tensors that differ")
    if report.values:
        table = Table("value", "A", "B")
        table.columns[0].overflow = "fold"
        for value in report.values[:top]:
            table.add_row(*_value_row(value))
        print_table(table)
        _print_rest(len(report.values), top, "values that differ")
    problems = [one.problem for one in report.tensors] + [one.problem for one in report.values]
    for problem in list(dict.fromkeys(filter(None, problems)))[:top]:  # Tensors share blocks.
        console.print(f"not compared: {shown(problem, 1000)}")
    _print_verdict(report)


def _print_rest(count: int, top: int, what: str) -> None:
    if count > top:
        console.print(f"... and {count - top} more {what}; --top shows more")


def _print_verdict(report: ComparisonReport) -> None:
    counts = [
        f"tensors compared: {report.tensors_compared}",
        f"equal: {report.tensors_equal}",
        f"bit for bit: {report.tensors_same_bits}",
        f"values compared: {report.values_compared}",
        f"places that differ: {len(report.values)}",
    ]
    verdict = "equal" if report.is_equal else "DIFFERENT" if report.is_complete else "NOT COMPARED in full"
    speed = size_text(round(report.bytes_read / max(report.total_s, 1e-9)))
    read = f"{size_text(report.bytes_read)} read in {report.total_s:.1f} s ({speed}/s)"
    console.print(f"{verdict}: {', '.join(counts)}; {read}")


def _print_tensors(tensors: tuple[TensorDifference, ...]) -> None:
    table = Table()
    table.add_column("tensor", overflow="fold")  # A key that is cut short names nothing.
    table.add_column("dtype", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    for name in ("differ", "NaN", "max abs", "max rel"):
        table.add_column(name, justify="right")
    table.add_column("first at: A, B")
    for one in tensors:
        table.add_row(*_tensor_row(one))
    print_table(table)


def _tensor_row(one: TensorDifference) -> tuple[str, ...]:
    dtype = one.dtype_a if one.dtype_a == one.dtype_b else f"{one.dtype_a}, {one.dtype_b}"
    shape = shape_text(one.shape_a)
    if one.shape_a != one.shape_b:
        shape = f"{shape}, {shape_text(one.shape_b)}"
    known = shown(one.key), dtype, shape
    if one.differing is None or one.outside is None:
        return *known, "not compared" if one.problem else "shape", "", "", "", ""
    first = ""
    if one.first_index is not None and one.first_a is not None and one.first_b is not None:
        texts = [number_text(number, 9) for number in (one.first_a, one.first_b)]
        if texts[0] == texts[1]:
            texts = [number_text(number, 17) for number in (one.first_a, one.first_b)]
        first = f"{list(one.first_index)}: {', '.join(texts)}"
    if not one.outside:
        return *known, "dtype", "", "", "", ""
    numbers = ["" if value is None else number_text(value) for value in (one.max_abs, one.max_rel)]
    return *known, count_text(one.outside, one.shape_a), str(one.nans or ""), *numbers, first


def _value_row(value: ValueDifference) -> tuple[str, str, str]:
    path = shown(value.path)
    if value.coordinates is not None:
        path = f"{path} ({' '.join(f'{axis}{at}' for axis, at in value.coordinates.items())})"
    if value.problem is not None:
        return path, "not compared", ""
    return path, _value_text(value.a), _value_text(value.b)


def _value_text(raw: msgspec.Raw | None) -> str:
    if raw is None:
        return ""
    try:
        return shown(repr(decode_value(bytes(raw), "")), 60)
    except CorruptionError:  # The mark of a list that has tensors in it.
        return shown(bytes(raw).decode(), 60)
