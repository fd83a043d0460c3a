"""What commands have in common of what they print."""

from collections.abc import Sequence


def examples(lines: Sequence[str]) -> str:
    """The end of a command's help."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


def printable(text: str) -> str:
    """The text without the characters that a terminal obeys: strangers choose names."""
    return "".join(c if c.isprintable() else "?" for c in text)
