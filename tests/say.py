"""Telling how a long run gets on."""

import sys


def say(text: str, end: str = "\n") -> None:
    """Shows progress at once, also through a pipe."""
    sys.stdout.write(text + end)
    sys.stdout.flush()
