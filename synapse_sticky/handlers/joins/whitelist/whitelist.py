"""Servers that the federation whitelist did not allow before this start, and allows now (H7).

Synapse notes nothing of what it would have sent to a server outside the whitelist. So such a server
is pushed all own unexpired sticky events of the rooms that it is in. The whitelist changes at a
start only. A process that starts for the first time goes by what the others have stored.
"""

from collections.abc import Collection
from typing import Protocol

from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.handlers.joins.federation import Federation
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.database import portions
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_AT_ONCE = 50
"""No transaction has others wait for long (H1)."""

_BACKOFF = Backoff(5_000, 60_000)

Allowed = Collection[str] | None
"""The servers in the whitelist; None if there is none, so that all are allowed."""


class Rooms(Protocol):
    """What a new whitelist is about."""

    def whitelist(self) -> Allowed:
        """The whitelist of this start."""

    async def rooms_with_own_events(self) -> list[str]:
        """The rooms with unexpired sticky events of this server."""

    async def servers_in(self, room_id: str) -> list[str]:
        """The servers in the room now."""


class Whitelist:
    """Finds them once a start, and enters them into Synapse's backlog."""

    def __init__(
        self, homeserver: Homeserver, rooms: Rooms, federation: Federation, table: NewcomerTable
    ) -> None:
        self._homeserver = homeserver
        self._rooms = rooms
        self._federation = federation
        self._table = table
        self._looking = Retrying(
            homeserver,
            "read_whitelist",
            "Could not look for servers that are newly in the federation whitelist",
            self._look,
            _BACKOFF,
        )

    def begin(self) -> None:
        """Looks for them in the background; the tables are there."""
        self._looking.wake()

    async def _look(self) -> None:
        allowed = self._rooms.whitelist()
        is_own, before = await self._table.whitelist()
        if before is not None and before != allowed:
            for room_id in await self._rooms.rooms_with_own_events():
                await self._enter(room_id, set(before))
        # After that: whatever ends this run meanwhile, the next one finds them once more.
        if not is_own or before != allowed:
            await self._table.store_whitelist(allowed, (before,) if is_own else None)

    async def _enter(self, room_id: str, before: Collection[str]) -> None:
        servers = [
            server
            for server in await self._rooms.servers_in(room_id)
            if server not in before and self._federation.handles(server)
        ]
        if servers:
            logger.info(
                "%d servers of %s are newly in the federation whitelist", len(servers), room_id
            )
        for some in portions(servers, _AT_ONCE):
            await self._federation.add_to_backlog([(server, room_id, 0) for server in some])
            for server in some:
                self._federation.wake(server)
