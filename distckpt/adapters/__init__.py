"""Foreign tensors as ours. Each adapter looks at one leaf of a state and says what it is, or None if not its kind."""

from distckpt.adapters.dtensor import adapt_dtensor
from distckpt.adapters.megatron import adapt_megatron

ADAPTERS = (adapt_dtensor, adapt_megatron)

__all__ = ["ADAPTERS", "adapt_dtensor", "adapt_megatron"]
