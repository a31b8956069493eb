"""PerRank: a value that differs by rank, such as random-number state or a data position. Holds it; does nothing."""

from __future__ import annotations

from distckpt.errors import InvalidShardingError
from distckpt.index import OnChange


class PerRank:
    """A leaf of the state that is stored once for each combination of coordinates on `axes` of the mesh.

    value: anything a state may hold except ShardedTensor; tensors in it are kept small (it is stored as JSON).
    axes: mesh axes that tell different values apart; None means all of the mesh. Ranks that share these
        coordinates must hold equal values, and one of them is stored.
    on_change: what load does when one of `axes` has another size than the checkpoint's: "exact" raises
        MismatchError; "skip" leaves `value` alone; "reseed" leaves it alone and sets `seed`.

    After a load `value` is the stored one (an object with load_state_dict() is loaded instead of replaced) and
    `seed` is None; or, after "reseed", `seed` is an integer of 64 bits, equal on ranks with equal coordinates,
    different on all others and in every checkpoint, from which the caller starts a fresh stream.
    """

    __slots__ = ("axes", "on_change", "seed", "value")

    def __init__(self, value: object, axes: tuple[str, ...] | None = None, on_change: OnChange = "exact") -> None:
        if on_change not in ("exact", "reseed", "skip"):
            raise InvalidShardingError(f"PerRank on_change={on_change!r}: expected 'exact', 'reseed' or 'skip'")
        self.value = value
        self.axes = axes
        self.on_change = on_change
        self.seed: int | None = None

    def __repr__(self) -> str:
        return f"PerRank({self.value!r}, axes={self.axes!r}, on_change={self.on_change!r})"
