"""What commands have in common of what they print."""

import re
from collections.abc import Sequence


def examples(lines: Sequence[str]) -> str:
    """The end of a command's help."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


# Letters and marks that Unicode has shown as nothing, and one that is blank.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)


def printable(text: str) -> str:
    r"""The text with what a terminal obeys or nobody sees as ``\u200b``: strangers choose names.

    These are control characters, those that change the direction of text, blanks other than the
    space, and characters that are shown as nothing.
    """
    return "".join(c if c.isprintable() and not _BLANK.match(c) else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
