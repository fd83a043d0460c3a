"""The log lines of one kind are bounded: strangers choose how often something happens (H3).

A kind is one message of the code, before its arguments are put in. So nobody but the code decides
how many kinds there are. Strangers choose names, too: a line stays one line, whatever is in them.
"""

import logging
import threading
import time
from collections.abc import Callable

import attr

MOST_A_MINUTE = 30
"""So many lines of a kind are written a minute."""

_MINUTE_S = 60.0


@attr.s(auto_attribs=True, slots=True)
class _Kind:
    """The minute that began at ``since_s``, and the lines in it.

    left_out: how many were not written since one said so last.
    """

    since_s: float
    written: int = 0
    left_out: int = 0


class Bounded(logging.Filter):
    """Lets through a bounded number of lines of each kind; none is left out at level DEBUG.

    The first line after others that were left out says how many there were.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            now_s: the time in seconds, of a clock that is never set.
        """
        super().__init__()
        self._now_s = now_s
        self._kinds: dict[tuple[str, str, int], _Kind] = {}
        # Log lines come from the threads of the database, too.
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Is this line written?"""
        if isinstance(record.args, tuple):
            record.args = tuple(map(_on_one_line, record.args))
        if record.levelno <= logging.DEBUG:
            return True
        now_s = self._now_s()
        with self._lock:
            key = (record.name, str(record.msg), record.levelno)
            kind = self._kinds.setdefault(key, _Kind(now_s))
            if now_s - kind.since_s >= _MINUTE_S:
                kind.since_s, kind.written = now_s, 0
            if kind.written >= MOST_A_MINUTE:
                kind.left_out += 1
                return False
            kind.written += 1
            left_out, kind.left_out = kind.left_out, 0
        if left_out:
            record.msg = f"{record.msg} ({left_out} such lines before this one were left out)"
        elif kind.written == MOST_A_MINUTE:
            record.msg = f"{record.msg} (more such lines within the minute are left out)"
        return True

    def forget(self) -> None:
        """Begins anew with all kinds."""
        with self._lock:
            self._kinds.clear()


def _on_one_line(argument: object) -> object:
    """The argument of a line, with escapes in place of what ends a line or controls a terminal."""
    if argument is None or isinstance(argument, (int, float)):
        return argument
    text = str(argument)
    if text.isprintable():
        return argument
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


BOUNDED = Bounded()


def bounded(name: str) -> logging.Logger:
    """The logger of this name, whose lines are bounded from now on."""
    logger = logging.getLogger(name)
    logger.addFilter(BOUNDED)
    return logger
