"""Text that can be encoded: paths need not be UTF-8, and errors quote them."""

from __future__ import annotations


def utf8_text(text: str) -> str:
    """The text with an escape for each lone surrogate, as which Python has the bytes of names that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
