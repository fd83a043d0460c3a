"""Clients are told how long an event is sticky by this server's own row of it (S2, S4).

Synapse tells them by the event alone, and so does not know when it was received. Of one that is
dated ahead it would say at any time that all of its duration is left.

Fails open: clients are told what Synapse says.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Protocol

from synapse_sticky.index import IndexFollower

LeftMs = Callable[[Collection[str], int], Awaitable[Mapping[str, int]]]
"""Event IDs and the time to how much is left of those that are known, both in ms."""


class Telling(Protocol):
    """Events, as clients are shown them."""

    def shorten_by(self, left_ms: LeftMs) -> None:
        """From now on no client is told that more is left than this says. Of what has nothing left
        it is told nothing."""


class TtlHandler:
    """Says how long events are sticky."""

    def __init__(self, follower: IndexFollower, telling: Telling) -> None:
        self._follower = follower
        self._telling = telling

    def install(self) -> None:
        """Takes effect from the next event on."""
        self._telling.shorten_by(self.left_ms)

    async def left_ms(self, event_ids: Collection[str], now_ms: int) -> Mapping[str, int]:
        """How much of the events' stickiness is left, of those that clients get, in ms."""
        rows = await self._follower.rows_of(event_ids)
        return {event_id: row.expires_at_ms - now_ms for event_id, row in rows.items()}
