"""Sizes, times and types as people type them: 2TB, 500GiB, 7d, bf16."""

from __future__ import annotations

import re

_BYTES = {"": 1, "B": 1}
_BYTES |= {f"{prefix}{unit}": 1000**n for n, prefix in enumerate("KMGTP", 1) for unit in ("", "B")}
_BYTES |= {f"{prefix}IB": 1024**n for n, prefix in enumerate("KMGTP", 1)}
_SECONDS = {"S": 1.0, "M": 60.0, "MIN": 60.0, "H": 3600.0, "D": 86400.0, "W": 604800.0}


def _split(text: str, units: dict[str, int] | dict[str, float], example: str) -> tuple[float, str]:
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in units:
        raise ValueError(f"{text!r}: expected a number and a unit, such as {example}")
    return float(match[1]), match[2].upper()


def size_bytes(text: str) -> int:
    """Of "2TB" (units of 1000) or "500GiB" (of 1024). Raises ValueError."""
    number, unit = _split(text, _BYTES, "500MB, 256MiB or 2TB")
    return round(number * _BYTES[unit])


def dtype_name(text: str) -> str:
    """torch's name of "bf16", "fp16", "fp32", "fp64"; any other text as it is."""
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}.get(text, text)


def duration_s(text: str) -> float:
    """Of "7d", "12h", "30min" or "30m", "45s". Raises ValueError."""
    number, unit = _split(text, _SECONDS, "45s, 30min, 12h, 7d or 2w")
    return number * _SECONDS[unit]
