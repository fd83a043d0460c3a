"""Does with deferred events what administrators have ordered: release, discard, hold (E3).

The events of a held server are in the table and not in the queue, so that no limit lets them
through. Once the server is not held any more they are back in the queue, each in its turn.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING

from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.orders import Orders, Release

if TYPE_CHECKING:
    from synapse_sticky.handlers.deferral.tables import DeferredTable

_BATCH = 50
_AT_ONCE = 10_000
"""So many are looked up at once, about 1 MB."""

_EXPIRE_EVERY_MS = 20_000
_BACKOFF = Backoff(1_000, 60_000)
_MOST_REMEMBERED = 10_000


class Ordered:
    """Follows the orders, for the rooms whose events this process persists.

    Args:
        handles: tells whether this process persists a room's events.
        remove: takes events out of the queue.
        release: releases events, and deletes their rows; it sees to those that it cannot release.
        expire: deletes the rows of events that have expired, and counts these.
        refill: puts all that is in the table into the queue, but what is held.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        orders: Orders,
        table: "DeferredTable",
        *,
        handles: Callable[[str], bool],
        remove: Callable[[Collection[str]], None],
        release: Callable[[Sequence[str]], Awaitable[None]],
        expire: Callable[[Sequence[str]], Awaitable[None]],
        refill: Callable[[], Awaitable[None]],
    ) -> None:
        self._homeserver = homeserver
        self._orders = orders
        self._table = table
        self._handles = handles
        self._remove = remove
        self._release = release
        self._expire = expire
        self._refill = refill
        self._held: frozenset[str] = frozenset()
        self._next_expiry_ms = 0
        # Releases that were done, the last ones behind.
        self._done: dict[str, None] = {}
        self._following = Retrying(
            homeserver, "order", "Could not do what was ordered", self._follow, _BACKOFF
        )

    def begin(self, held: Collection[str]) -> None:
        """Follows the orders from now on.

        Args:
            held: the servers that were held as the queue was filled: it may be without their
                events.
        """
        self._held = frozenset(held)
        self._orders.on_read(self._look)
        self._look()

    def _look(self) -> None:
        is_new = any(order.id not in self._done for order in self._orders.releases)
        if is_new or self._held or self._orders.held_servers:
            self._following.wake()

    async def _follow(self) -> None:
        orders = self._orders
        held = orders.held_servers
        for server in sorted(held - self._held):
            await self._each(Release("", server, None, None), self._take_out)
            self._held |= {server}
        if self._held - held:
            await self._refill()
            # Only then: if that fails, it is done once more.
            self._held &= held
        if held and self._homeserver.steady_ms() >= self._next_expiry_ms:
            for server in sorted(held):
                await self._each(Release("", server, None, None), self._expire, is_expired=True)
            self._next_expiry_ms = self._homeserver.steady_ms() + _EXPIRE_EVERY_MS
        for order in orders.releases:
            if order.id not in self._done:
                await self._each(order, self._drop if order.is_discard else self._release_now)
                self._done[order.id] = None
        while len(self._done) > _MOST_REMEMBERED:
            del self._done[next(iter(self._done))]

    async def _take_out(self, event_ids: Sequence[str]) -> None:
        self._remove(event_ids)

    # Out of the queue once that is done: what fails has its turn there, should the order be over.

    async def _drop(self, event_ids: Sequence[str]) -> None:
        await self._table.drop(event_ids)
        self._remove(event_ids)

    async def _release_now(self, event_ids: Sequence[str]) -> None:
        await self._release(event_ids)
        self._remove(event_ids)

    async def _each(
        self,
        of: Release,
        do: Callable[[Sequence[str]], Awaitable[None]],
        *,
        is_expired: bool = False,
    ) -> None:
        """Does something with all events of these in this process's rooms, some at a time."""
        after: int | None = None
        while page := await self._table.matching(of, after, _AT_ONCE, is_expired=is_expired):
            own = [event_id for _, event_id, room_id in page if self._handles(room_id)]
            for first in range(0, len(own), _BATCH):
                await do(own[first : first + _BATCH])
                await self._homeserver.give_way()
            after = page[-1][0]
