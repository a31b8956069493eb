"""Random-number state of Python, NumPy, torch, the accelerator, and of single generators. Reads it and sets it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch

from distckpt.errors import CheckpointError

# What generators raise for what is no state of theirs.
_NO_STATE = (TypeError, ValueError, RuntimeError, KeyError, IndexError, OverflowError, AttributeError)

Generator: TypeAlias = torch.Generator | np.random.Generator | random.Random


def global_random_state() -> dict[str, object]:
    """Of this process's own streams; those of its accelerators, by number, under the name of their type."""
    state: dict[str, object] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    accelerator = _accelerator()
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        state[accelerator] = [module.get_rng_state(number) for number in range(module.device_count())]
    return state


def set_global_random_state(state: Mapping[str, object]) -> list[str]:
    """Go on where the state was read. Returns the names of those for which there is no device here.

    Raises CheckpointError for what is no such state.
    """
    accelerator = _accelerator()
    left: list[str] = []
    for name, own in state.items():
        try:
            if name == "python":
                random.setstate(own)  # type: ignore[arg-type]  # What is none, it refuses.
            elif name == "numpy":
                np.random.set_state(own)  # type: ignore[arg-type]
            elif name == "torch":
                torch.set_rng_state(own)  # type: ignore[arg-type]
            elif name == accelerator:
                left += _set_device_states(accelerator, own)
            else:
                left.append(name)
        except _NO_STATE as error:
            raise CheckpointError(f"random-number state of {name!r}: {error}") from error
    return left


def _set_device_states(kind: str, states: object) -> list[str]:
    """Of each device by its number; returns those that are not here."""
    module = torch.get_device_module(kind)
    if not isinstance(states, list):
        raise TypeError(f"expected a list of states, found a {type(states).__name__}")
    here = module.device_count()
    for number, state in enumerate(states[:here]):
        module.set_rng_state(state, number)
    return [f"{kind}:{number}" for number in range(here, len(states))]


def seed_all(seed: int) -> None:
    """Seed this process's own streams from one number, each with another that follows from it."""
    random.seed(_derived(seed, "python"))
    np.random.seed(_derived(seed, "numpy") % 2**32)
    torch.manual_seed(_derived(seed, "torch"))  # accelerators too


def generator_state(generator: Generator) -> object:
    """The state of a generator, as a value that can be stored."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    raise TypeError(
        f"a {type(generator).__qualname__} is no generator whose state can be stored; expected torch.Generator, "
        f"numpy.random.Generator or random.Random"
    )


def set_generator_state(generator: Generator, state: object) -> None:
    """Go on where the state was read. Raises CheckpointError for what is none of such a generator."""
    try:
        if isinstance(generator, torch.Generator):
            generator.set_state(state)  # type: ignore[arg-type]
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = state  # type: ignore[assignment]
        else:
            generator.setstate(state)  # type: ignore[arg-type]
    except _NO_STATE as error:
        raise CheckpointError(f"state of a {type(generator).__qualname__}: {error}") from error


def seed_generator(generator: Generator, seed: int) -> None:
    """Start a fresh stream."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(_derived(seed, "generator"))
    elif isinstance(generator, np.random.Generator):
        kind = type(generator.bit_generator)
        generator.bit_generator.state = kind(_derived(seed, "generator")).state
    else:
        generator.seed(_derived(seed, "generator"))


def _accelerator() -> str | None:
    """The type of this machine's accelerator, if torch can use it."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if device is None else device.type


def _derived(seed: int, what: str) -> int:
    """63 bits."""
    digest = hashlib.blake2b(f"{seed}/{what}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
