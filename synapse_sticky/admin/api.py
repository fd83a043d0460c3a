"""What can be asked for, by path, and who answers (E3)."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import attr
from synapse.module_api.errors import Codes, SynapseError

from synapse_sticky.admin.requests import Request, busy
from synapse_sticky.homeserver.queue import Queue, QueueFullError

LISTS_AT_ONCE, LISTS_WAITING = 2, 8
"""So many lists this process reads at a time, and so many more wait for that. Each may take a
connection to the database for a tenth of a second."""

_RETRY_AFTER_MS = 1_000

Get = Callable[[Request], Awaitable[Mapping[str, Any]]]


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Route:
    """One thing that can be asked for.

    path: its parts; one in braces stands for any text.
    is_list: whether it may read as many rows as there are of a table.
    """

    method: str
    path: str
    answer: Get
    is_list: bool = False

    def fits(self, parts: Sequence[str]) -> bool:
        """Is this the path?"""
        own = self.path.split("/")
        return len(own) == len(parts) and all(
            mine == part or (mine.startswith("{") and part)
            for mine, part in zip(own, parts, strict=True)
        )


class Api:
    """Everything below the API's path."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = tuple(routes)
        self._lists = Queue(LISTS_AT_ONCE, LISTS_WAITING)

    async def answer(self, request: Request) -> tuple[int, Any]:
        """The HTTP status and what is answered as JSON. Raises ``SynapseError``."""
        fitting = [route for route in self.routes if route.fits(request.path)]
        if not fitting:
            raise SynapseError(404, "Unrecognized request", Codes.UNRECOGNIZED)
        for route in fitting:
            if route.method == request.method:
                return 200, await self._answer(route, request)
        raise SynapseError(405, "Unrecognized request", Codes.UNRECOGNIZED)

    async def _answer(self, route: Route, request: Request) -> Mapping[str, Any]:
        if not route.is_list:
            return await route.answer(request)
        try:
            return await self._lists.serve(lambda: route.answer(request))
        except QueueFullError:
            raise busy("Too many lists are being read", _RETRY_AFTER_MS) from None
