"""Which names the Storage port allows. Every backend checks them the same way, before it does anything."""

from __future__ import annotations


def split_name(name: str) -> list[str]:
    """The segments of a relative name; ValueError if it is empty, absolute, or may lead outside the root."""
    segments = name.split("/")
    if "\0" in name or any(segment in ("", ".", "..") for segment in segments):
        raise ValueError(f"{name!r} is not a relative name without empty, '.' or '..' segments")
    return segments
