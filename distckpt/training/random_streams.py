"""Random streams as a section of the training state: which ranks have which, and what a changed layout does."""

from __future__ import annotations

from collections.abc import Mapping

from distckpt import PerRank
from distckpt.errors import CheckpointError
from distckpt.index import OnChange
from distckpt.training.random_state import (
    Generator,
    generator_state,
    global_random_state,
    seed_all,
    seed_generator,
    set_generator_state,
    set_global_random_state,
)

GLOBAL = "global"


class RandomStreams:
    """The process's own streams, and generators by name.

    axes: mesh axes whose ranks draw different numbers; None is all of them. on_change: what a load does when one of
    these has another size: "reseed" starts fresh streams, "exact" refuses, "skip" leaves them as they are. generators:
    name -> generator, or a PerRank of one, which has axes and on_change of its own.
    """

    def __init__(
        self, axes: tuple[str, ...] | None, on_change: OnChange, generators: Mapping[str, Generator | PerRank]
    ) -> None:
        if GLOBAL in generators:
            raise ValueError(f"generators: the name {GLOBAL!r} is that of the process's own streams")
        self._own = PerRank(None, axes, on_change)
        self._generators = {
            name: given if isinstance(given, PerRank) else PerRank(given, axes, on_change)
            for name, given in generators.items()
        }
        for given in self._generators.values():
            generator_state(given.value)  # type: ignore[arg-type]  # Raises TypeError for what is no generator.

    def state(self) -> dict[str, object]:
        """To be saved."""
        streams: dict[str, object] = {GLOBAL: _like(self._own, global_random_state())}
        for name, given in self._generators.items():
            streams[name] = _like(given, generator_state(given.value))  # type: ignore[arg-type]
        return streams

    def template(self) -> dict[str, object]:
        """To be loaded; a stream that a load leaves alone has no value and no seed then."""
        return {name: _like(given, None) for name, given in {GLOBAL: self._own, **self._generators}.items()}

    def restore(self, state: Mapping[str, object]) -> list[str]:
        """Go on with what a template was filled with. Returns warnings."""
        warnings: list[str] = []
        for name, loaded in state.items():
            assert isinstance(loaded, PerRank)
            generator = None if name == GLOBAL else self._generators[name].value
            if loaded.seed is not None:
                if generator is None:
                    seed_all(loaded.seed)
                else:
                    seed_generator(generator, loaded.seed)  # type: ignore[arg-type]
            elif loaded.value is None:
                warnings.append(f"the random stream {name!r} was left as it is, as the layout has changed")
            elif generator is None:
                if not isinstance(loaded.value, dict):
                    raise CheckpointError(
                        f"rng/{name}: stored is a {type(loaded.value).__name__}, expected a state by name"
                    )
                left = set_global_random_state(loaded.value)
                warnings += [f"no {kind} device here: its random-number state was left out" for kind in left]
            else:
                set_generator_state(generator, loaded.value)  # type: ignore[arg-type]
        return warnings


def _like(given: PerRank, value: object) -> PerRank:
    return PerRank(value, given.axes, given.on_change)
