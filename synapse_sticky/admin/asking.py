"""Gathers what is known of one event (E3)."""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar

import attr

from synapse_sticky.admin.bounds import Bounds
from synapse_sticky.admin.facts import (
    Facts,
    Newcomer,
    PersistedEvent,
    Reachability,
    Receiver,
    StagedPdu,
    Table,
    Tables,
)
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.layout import versions_txn

if TYPE_CHECKING:
    from synapse_sticky.homeserver.rooms import Rooms

TableT = TypeVar("TableT", bound=Table)


def allows(is_allowed: Callable[[str], bool], server: str) -> bool:
    """Does the ACL allow the server? It allows none whose name cannot be read."""
    try:
        return is_allowed(server)
    except ValueError:
        return False


class Events(Protocol):
    """What Synapse has of events and servers."""

    async def persisted(self, event_id: str) -> PersistedEvent | None: ...
    def staged_txn(self, txn: Cursor, event_id: str) -> StagedPdu | None: ...
    def is_known_txn(self, txn: Cursor, room_id: str) -> bool: ...
    async def servers(self, room_id: str) -> list[str]: ...
    def reachability_txn(
        self, txn: Cursor, servers: Collection[str]
    ) -> Mapping[str, Reachability]: ...
    def backlog_txn(
        self, txn: Cursor, room_id: str, servers: Collection[str]
    ) -> Mapping[str, int]: ...


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Absence:
    """What is known of an event that is not here, by the room and the server that it is said to be
    of.

    is_known: whether this server knows the room.
    is_joined: whether this server is in it.
    is_allowed: whether the room's ACL allows the sender's server.
    has_member: whether that server is in the room.
    too_many_deferred: how many events of that server are deferred, if its transactions are refused
        for that; None if they are not, or if that cannot be told.
    """

    room_id: str | None
    server: str | None
    is_known: bool = True
    is_joined: bool = True
    is_allowed: bool = True
    has_member: bool = True
    too_many_deferred: int | None = None
    reachability: Reachability = Reachability()


class Asking:
    """Asks the database, and Synapse for the members and the ACL of a room."""

    def __init__(
        self,
        homeserver: Homeserver,
        rooms: "Rooms",
        events: Events,
        tables: Tables,
        bounds: Bounds,
    ) -> None:
        self._homeserver = homeserver
        self._rooms = rooms
        self._events = events
        self._tables = tables
        self._bounds = bounds

    async def facts(self, event_id: str, after: str, limit: int) -> Facts:
        """What is known of the event.

        Args:
            after: the servers that should get it are given from the one after this.
            limit: how many of them.
        """
        event = await self._events.persisted(event_id)
        facts = Facts(event_id, self._homeserver.now_ms(), self._homeserver.server_name, event)
        facts = await self._homeserver.transact("admin_waiting", self._waiting_txn, facts)
        if not facts.is_here:
            # It may have been persisted, or parked, between the two.
            event = await self._events.persisted(event_id)
            facts = attr.evolve(facts, event=event)
        if event is not None and event.server == facts.own_server:
            facts = await self._with_receivers(facts, event, after, limit)
        return facts

    def _waiting_txn(self, txn: Cursor, facts: Facts) -> Facts:
        event_id, tables, unread = facts.event_id, self._tables, list[str]()
        versions = versions_txn(txn, is_postgres=self._homeserver.is_postgres)

        def read(table: TableT) -> TableT | None:
            if versions.get(table.duty, 0) >= table.layout:
                return table
            unread.append(table.duty)
            return None

        is_on_its_way = facts.event is None or facts.event.is_outlier
        deferred, parked = read(tables.deferred), read(tables.parked)
        read(tables.newcomers)
        waiting = deferred.of_event_txn(txn, event_id) if deferred else None
        is_known = versions.get(tables.holds.duty, 0) >= tables.holds.layout
        held_until_ms, discarded, event = None, None, facts.event
        if waiting is not None and is_known:
            held_until_ms = tables.holds.held_until_txn(txn, waiting.server)
        elif event is not None and is_known and event.stream_id is None:
            since_ms = event.sent_ms if event.received_ms is None else event.received_ms
            discarded = tables.holds.discarded_txn(txn, event.room_id, event.sender, since_ms)
        return attr.evolve(
            facts,
            held_until_ms=held_until_ms,
            discarded=discarded,
            staged=self._events.staged_txn(txn, event_id) if is_on_its_way else None,
            parked=parked.of_event_txn(txn, event_id) if parked else None,
            deferred=waiting,
            unread=unread,
        )

    async def _with_receivers(
        self, facts: Facts, event: PersistedEvent, after: str, limit: int
    ) -> Facts:
        room_id = event.room_id
        servers = await self._events.servers(room_id)
        page = [server for server in servers if server > after][: limit + 1]
        shown, is_more = page[:limit], len(page) > limit
        is_allowed = await self._rooms.acl_now(room_id)

        def read_txn(txn: Cursor) -> list[Receiver]:
            reachable = self._events.reachability_txn(txn, shown)
            backlog = self._events.backlog_txn(txn, room_id, shown)
            newcomers: Mapping[str, Newcomer] = {}
            if self._tables.newcomers.duty not in facts.unread:
                newcomers = self._tables.newcomers.of_room_txn(txn, room_id, shown)
            return [
                Receiver(
                    *(server, allows(is_allowed, server), reachable.get(server, Reachability())),
                    *(backlog.get(server), newcomers.get(server)),
                )
                for server in shown
            ]

        return attr.evolve(
            facts,
            is_own_server_allowed=allows(is_allowed, facts.own_server),
            receivers=await self._homeserver.transact("admin_receivers", read_txn),
            receivers_count=len(servers),
            receivers_next=shown[-1] if is_more else None,
        )

    async def absence(self, room_id: str | None, server: str | None, facts: Facts) -> Absence:
        """What is known of an event that is not here."""

        def read_txn(txn: Cursor) -> Absence:
            return Absence(
                room_id,
                server,
                is_known=room_id is None or self._events.is_known_txn(txn, room_id),
                too_many_deferred=self._too_many_txn(txn, server, facts),
                reachability=(
                    self._events.reachability_txn(txn, [server]).get(server, Reachability())
                    if server is not None
                    else Reachability()
                ),
            )

        absence = await self._homeserver.transact("admin_absence", read_txn)
        if room_id is None or not absence.is_known:
            return absence
        absence = attr.evolve(absence, is_joined=await self._rooms.is_in_room(room_id))
        if server is None:
            return absence
        is_allowed = await self._rooms.acl_now(room_id)
        return attr.evolve(
            absence,
            is_allowed=allows(is_allowed, server),
            has_member=await self._rooms.has_member_of(room_id, server),
        )

    def _too_many_txn(self, txn: Cursor, server: str | None, facts: Facts) -> int | None:
        if server is None or self._tables.deferred.duty in facts.unread:
            return None
        holds = self._tables.holds
        versions = versions_txn(txn, is_postgres=self._homeserver.is_postgres)
        is_known = versions.get(holds.duty, 0) >= holds.layout
        most = self._bounds.now_txn(txn, holds if is_known else None)(server)
        if most is None:
            return None
        count = self._tables.deferred.of_server_txn(txn, server)
        return count if count >= most else None
