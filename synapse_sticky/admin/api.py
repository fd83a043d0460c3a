"""What can be asked for, by path, and who answers (E3)."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import attr
from synapse.module_api.errors import Codes, SynapseError

from synapse_sticky.admin.requests import Request

Get = Callable[[Request], Awaitable[Mapping[str, Any]]]


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Route:
    """One thing that can be asked for.

    path: its parts; one in braces stands for any text.
    """

    method: str
    path: str
    answer: Get

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

    async def answer(self, request: Request) -> tuple[int, Any]:
        """The HTTP status and what is answered as JSON. Raises ``SynapseError``."""
        fitting = [route for route in self.routes if route.fits(request.path)]
        if not fitting:
            raise SynapseError(404, "Unrecognized request", Codes.UNRECOGNIZED)
        for route in fitting:
            if route.method == request.method:
                return 200, await route.answer(request)
        raise SynapseError(405, "Unrecognized request", Codes.UNRECOGNIZED)
