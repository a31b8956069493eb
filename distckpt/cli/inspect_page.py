"""The page of `distckpt inspect --html`: one file that needs no network, with the facts as data and a script to draw.

What comes from disk is hostile: it goes into the page as JSON in which no character can end the element that it stands
in, the script makes text of it and never markup, and the browser is told to run that script and no other.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import islice

import msgspec
import numpy as np

from distckpt.cataloging import CheckpointEntry
from distckpt.chunk_table import Boxes, Grids
from distckpt.cli.inspect_text import RANK_AXIS, metadata_rows, summary_facts
from distckpt.cli.output import shown
from distckpt.commit import Commit
from distckpt.garbage import postponed_collection
from distckpt.index import Index
from distckpt.inspecting import (
    Placement,
    contents_of,
    list_per_rank,
    list_ranks,
    list_values,
    natural_order,
    placements,
)
from distckpt.storage import Storage
from distckpt.training.resumable import resumability
from distckpt.utf8_text import utf8_text

_SCRIPTS = ("common.js", "treemap.js", "drawing.js", "tensors.js", "main.js")
_MAX_NUMBERS = 4_000_000  # in all arrangements of chunks together: a page of tens of megabytes
_MAX_ROWS = 20_000  # of values, of metadata
_MAX_TEXT = 2000  # characters of one


def page_of(data: dict[str, object]) -> bytes:
    """The page that shows the data."""
    folder = files("distckpt.cli").joinpath("page")
    style = folder.joinpath("page.css").read_text("utf-8")
    script = "".join(folder.joinpath(name).read_text("utf-8") for name in _SCRIPTS)
    parts = {
        "TITLE": escape(str(data["title"])),
        "POLICY": f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}",
        "STYLE": style,
        "SCRIPT": script,
        "DATA": _embedded(data),
    }
    template = folder.joinpath("page.html").read_text("utf-8")
    # In one pass: what comes from disk may look like a place to fill.
    return re.sub(r"\[\[([A-Z]+)\]\]", lambda place: parts[place[1]], template).encode("utf-8", "replace")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(data: dict[str, object]) -> str:
    """JSON that cannot end the script element in which it stands, whatever is in it."""
    text = msgspec.json.encode(data).decode("utf-8", "replace")
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@postponed_collection()
def page_data(
    storage: Storage, commit: Commit, index: Index, entry: CheckpointEntry, keys: Sequence[str]
) -> dict[str, object]:
    """What the page shows, as columns. Raises CorruptionError or OSError."""
    keys = sorted(keys, key=natural_order)
    answer = resumability(bytes(index.metadata), commit.name)
    arrangements = _Arrangements()
    of_tensor: list[int] = []

    def noted(part: Placement) -> Placement:
        of_tensor.extend(arrangements.of(part))
        return part

    ranks = list_ranks(index, map(noted, placements(storage, commit, index, keys)))
    location = utf8_text(storage.location)
    metadata = metadata_rows(entry.metadata)
    omitted = []
    if arrangements.left_out:
        omitted.append(f"{arrangements.left_out:,} tensors are not drawn: the page would be too large")
    if len(metadata) > _MAX_ROWS:
        omitted.append(f"metadata has {len(metadata):,} entries, of which {_MAX_ROWS:,} are here")
    if len(keys) < len(index.tensors):
        omitted.append(f"only {len(keys):,} of {len(index.tensors):,} tensors are here: those that --keys matches")
    return {
        "title": f"iteration {entry.iteration} of {os.path.basename(location) or location}",
        "location": location,
        "iteration": entry.iteration,
        "written_unix_s": time.time(),
        "facts": [[name, shown(text, _MAX_TEXT)] for name, text in summary_facts(entry, contents_of(index), answer)],
        "resumable": answer,
        "dtypes": contents_of(index).dtypes,
        "sections": contents_of(index).sections,
        "mesh": [(axis, size) for axis, size in entry.mesh.items() if axis != RANK_AXIS],
        "world_size": entry.world_size,
        "files": {
            "name": [file.name for file in index.files],
            "bytes": [file.size_bytes for file in index.files],
            "rank": [file.rank for file in index.files],
        },
        "ranks": ranks,
        **_tensor_columns(index, keys),
        "layout": of_tensor,
        "layouts": arrangements.layouts,
        "values": list(_value_rows(index)),
        "per_rank": list_per_rank(index)[:_MAX_ROWS],
        "metadata": [[shown(name), shown(text, _MAX_TEXT)] for name, text in metadata[:_MAX_ROWS]],
        "omitted": omitted,
    }


def _tensor_columns(index: Index, keys: Sequence[str]) -> dict[str, object]:
    """Of each tensor its key, bytes, and the kind that it is of; tensors of one kind differ in nothing else."""
    kinds: dict[object, int] = {}
    rows: list[tuple[object, ...]] = []
    kind_of = []
    for key in keys:
        entry = index.tensors[key]
        facts = (entry.dtype, entry.global_shape, entry.partition, entry.owner, entry.blocks, entry.container)
        if facts not in kinds:
            kinds[facts] = len(rows)
            rows.append(facts)
        kind_of.append(kinds[facts])
    sizes = [index.tensors[key].size_bytes for key in keys]
    names = ("dtype", "shape", "partition", "owner", "blocks", "container")
    return {
        "keys": keys,
        "bytes": sizes,
        "kind": kind_of,
        "kinds": [dict(zip(names, facts, strict=True)) for facts in rows],
    }


def _value_rows(index: Index) -> Iterator[tuple[str, str, int]]:
    for value in islice(list_values(index), _MAX_ROWS):
        text = bytes(value.value)[: 4 * _MAX_TEXT].decode("utf-8", "ignore")
        yield value.key, text[:_MAX_TEXT], value.bytes


class _Arrangements:
    """How chunks lie in tensors: boxes and the file of each, for all tensors in which they lie alike.

    layouts: of a grid `cuts`, of each dimension, and `files`, in C order; of irregular boxes `offsets` and `shapes`,
    one chunk after the other, and `files`. left_out: tensors for which there was no more room.
    """

    def __init__(self) -> None:
        self.layouts: list[dict[str, object]] = []
        self.left_out = 0
        self._numbers = 0
        self._known: dict[object, int] = {}

    def of(self, part: Placement) -> list[int]:
        """For each tensor the number of its layout; -1 if it has none."""
        found = [-1] * len(part.keys)
        for group in part.stored:
            for row, tensor in enumerate(group.tensors.tolist()):
                if all(part.index.tensors[part.keys[tensor]].global_shape):
                    found[tensor] = self._grid(group, row) if isinstance(group, Grids) else self._boxes(group, row)
        return found

    def _grid(self, group: Grids, row: int) -> int:
        counts = group.cut_counts[row].tolist()
        first = group.cut_first[row].tolist()
        cuts = [group.cuts[at : at + count] for at, count in zip(first, counts, strict=True)]
        begin = int(group.first[row])
        chunks = group.files[begin : begin + int(np.prod(counts, dtype=np.int64))]
        identity = ("grid", *(cut.tobytes() for cut in cuts), chunks.tobytes())
        return self._number(
            identity,
            sum(counts) + len(chunks),
            lambda: {"cuts": [cut.tolist() for cut in cuts], "files": chunks.tolist()},
        )

    def _boxes(self, group: Boxes, row: int) -> int:
        rows = slice(int(group.first[row]), int(group.first[row] + group.counts[row]))
        offsets, shapes, chunks = group.offsets[rows], group.shapes[rows], group.files[rows]
        identity = ("boxes", offsets.tobytes(), shapes.tobytes(), chunks.tobytes())
        return self._number(
            identity,
            offsets.size + shapes.size + len(chunks),
            lambda: {
                "offsets": offsets.ravel().tolist(),
                "shapes": shapes.ravel().tolist(),
                "files": chunks.tolist(),
            },
        )

    def _number(self, identity: object, numbers: int, describe: Callable[[], dict[str, object]]) -> int:
        if identity not in self._known:
            if self._numbers + numbers > _MAX_NUMBERS:
                self.left_out += 1
                return -1
            self._numbers += numbers
            self._known[identity] = len(self.layouts)
            self.layouts.append(describe())
        return self._known[identity]
