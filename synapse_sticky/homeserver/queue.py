"""A few at a time, and a short queue (H3)."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from synapse.logging.context import PreserveLoggingContext
from twisted.internet.defer import DeferredSemaphore

T = TypeVar("T")


class QueueFullError(Exception):
    """Too many wait already."""


class Queue:
    """Who comes first is served first.

    Args:
        at_once: so many are served at a time.
        most_waiting: so many may wait.
    """

    def __init__(self, at_once: int, most_waiting: int) -> None:
        self._most = at_once + most_waiting
        self._here = 0
        self._places = DeferredSemaphore(at_once)

    async def serve(self, do: Callable[[], Awaitable[T]]) -> T:
        """What ``do`` gives, once there is a place for it.

        Raises:
            QueueFullError: there is none, and no place to wait, either.
        """
        if self._here >= self._most:
            raise QueueFullError
        self._here += 1
        try:
            with PreserveLoggingContext():
                await self._places.acquire()
            try:
                return await do()
            finally:
                # The next one goes on in here.
                with PreserveLoggingContext():
                    self._places.release()
        finally:
            self._here -= 1
