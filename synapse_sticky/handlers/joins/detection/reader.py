"""Which servers newly join which rooms, read from the state changes (P3)."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import attr

from synapse_sticky._core import MAX_STICKY_DURATION_MS
from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.homeserver import Cursor, Homeserver

logger = logging.getLogger(__name__)

_BACKOFF = Backoff(5_000, 60_000)
_STORE_EVERY_MS = 60_000


@attr.s(auto_attribs=True, frozen=True, slots=True)
class ServerJoin:
    """A server has newly joined a room (P3)."""

    destination: str
    room_id: str


class StateChanges(Protocol):
    """The changes of rooms' state, as this process sees them."""

    def state_position(self) -> int:
        """Up to where state changes are visible here (position of the events stream)."""

    async def server_joins(
        self, *, after: int, up_to: int, not_before_ms: int
    ) -> tuple[int, list[ServerJoin]]:
        """One page of new joins of servers, and the position that it reaches to.

        A user's join counts if no other user of that server was joined before. Joins that were
        received before ``not_before_ms`` do not count. This server's own joins count, too. Suppose
        that this server left the room after ``not_before_ms`` and has joined it again: then the
        joins that it missed count as well.
        """


class HandledDestinations(Protocol):
    """Which destinations this process sends to."""

    def handles(self, destination: str) -> bool:
        """Does this very process send to the destination?"""

    def add_backlog_txn(self, txn: Cursor, destination: str, room_id: str) -> None:
        """Enters the room into Synapse's own backlog of the destination, from its start."""


class JoinReader:
    """Reads the state changes from a stored position on, and stores the newcomers."""

    def __init__(
        self,
        homeserver: Homeserver,
        changes: StateChanges,
        destinations: HandledDestinations,
        table: NewcomerTable,
        on_joins: Callable[[Sequence[ServerJoin], Sequence[ServerJoin], int], None],
    ) -> None:
        """
        Args:
            on_joins: gets the joins of a page that this process sends to, all of its joins, and
                until when own events are to be watched for (ms since the epoch).
        """
        self._homeserver = homeserver
        self._changes = changes
        self._destinations = destinations
        self._table = table
        self._on_joins = on_joins
        self._position: int | None = None
        self._stored_ms = 0
        self._reading = Retrying(
            homeserver, "read_joins", "Could not read who joined", self._read, _BACKOFF
        )

    async def stored_position(self) -> int:
        """Where to begin: where an earlier run got to, or the slowest of all processes."""
        return await self._table.state_position(self._changes.state_position())

    def start(self, position: int) -> None:
        """Reads from the position on. Until this is called, a wake-up does nothing."""
        self._position = position
        self.wake()

    def wake(self) -> None:
        """Reads on if there is something to read; any number may call this at any time."""
        if self._position is not None and self._changes.state_position() > self._position:
            self._reading.wake()

    async def _read(self) -> None:
        while self._position is not None and (
            (up_to := self._changes.state_position()) > self._position
        ):
            await self._read_page(self._position, up_to)

    async def _read_page(self, after: int, up_to: int) -> None:
        now_ms = self._homeserver.now_ms()
        # Earlier joins do not matter: what was sent before them has expired by now.
        position, joins = await self._changes.server_joins(
            after=after, up_to=up_to, not_before_ms=now_ms - MAX_STICKY_DURATION_MS
        )
        mine = [join for join in joins if self._destinations.handles(join.destination)]
        watch_until_ms = now_ms + MAX_STICKY_DURATION_MS
        # Without a join, the position of this process is worth a write now and then only.
        if mine or now_ms - self._stored_ms > _STORE_EVERY_MS:
            await self._table.record_joins(
                position,
                [(join.destination, join.room_id) for join in mine],
                watch_until_ms,
                self._destinations.add_backlog_txn,
            )
            self._stored_ms = now_ms
        self._position = position
        self._on_joins(mine, joins, watch_until_ms)
