"""Text from files made safe to show on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""`text` on one line, with control characters written as escapes (`\n`, `\x1b`)."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
