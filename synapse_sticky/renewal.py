"""An object of the Rust core that panics is thrown away, and another one is made in its place (H1).

The call that panics raises ``PanickedError``, an error like any other: whoever called does what it
does at an error. The object in its place is empty. Until it has what it should have, the duty is
unfit, and does as it does when it is off.
"""

import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Generic, TypeVar

from synapse_sticky._core import PanickedError
from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.logs import bounded

logger = bounded(__name__)

T = TypeVar("T")
OnPanic = Callable[[str], object]

_BACKOFF = Backoff(1_000, 60_000)


async def _nothing() -> None: ...


class Renewed(Generic[T]):
    """An object of the Rust core, or several that belong together; others once one has panicked.

    it: the present object. Hold it for one call only.
    is_whole: whether it has all that it should have. While it has not, the duty does as if it was
        off.
    filling: what fills it. Panic after panic, it waits for longer, up to a minute.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        duty: str,
        make: Callable[[OnPanic], T],
        fill: Callable[[], Awaitable[None]] = _nothing,
        *,
        problem: str = "Could not make an object of the Rust core anew",
        backoff: Backoff = _BACKOFF,
        on_whole: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            duty: whose object it is.
            make: makes an empty one, and hands it the function to call if it panics.
            fill: fills it, if that takes more; it may be run at any other time as well.
            problem: the start of the log line if filling fails.
            on_whole: is called once another one is filled.
        """
        self._homeserver = homeserver
        self._duty = duty
        self._make = make
        self._fill = fill
        self._on_whole = on_whole
        self._number = 0
        self._is_broken = False
        self._is_noted = True
        self.is_whole = True
        self.filling = Retrying(homeserver, f"fill_{duty}", problem, self._run, backoff)
        self.it = self._new()

    def _new(self) -> T:
        self._number += 1
        # The object must not keep alive what holds it: Python does not see through it.
        return self._make(partial(_tell, weakref.WeakMethod(self._panicked), self._number))

    def _panicked(self, number: int, message: str) -> None:
        """Is called within the call that panicked, in whatever thread that is."""
        if number != self._number:
            return
        self.is_whole = False
        self._is_broken = True
        self._is_noted = False
        self._homeserver.in_reactor(self._begin_anew, message)
        self._replace()

    def _replace(self) -> None:
        self.it = self._new()
        self._is_broken = False

    def _begin_anew(self, message: str) -> None:
        self._is_noted = True
        self._homeserver.metrics.panicked(self._duty)
        self._homeserver.metrics.set_broken(self._duty, True)
        self.filling.set_back(f"{self._duty} is unfit: {message}")

    async def _run(self) -> None:
        if not self._is_noted:
            return  # it is to be filled after a delay only
        if self._is_broken:
            # Making it has panicked as well.
            self._replace()
        number = self._number
        await self._fill()
        if number != self._number:
            raise PanickedError("It has panicked while it was filled")
        if not self.is_whole:
            self.is_whole = True
            self._homeserver.metrics.set_broken(self._duty, False)
            logger.info("%s is on again", self._duty)
            self._on_whole()


def _tell(
    panicked: "weakref.WeakMethod[Callable[[int, str], None]]", number: int, text: str
) -> None:
    if (there := panicked()) is not None:
        there(number, text)
