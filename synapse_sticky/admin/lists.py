"""``GET rooms`` and ``GET servers``: where something is sticky or waits, and of whom (E3)."""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from synapse_sticky.admin.bounds import Bounds
from synapse_sticky.admin.facts import Holds, Reachability, Table
from synapse_sticky.admin.requests import Request
from synapse_sticky.admin.tallies import Page, Source, tally_txn
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.layout import versions_txn
from synapse_sticky.lately import Lately

_NOT_RECORDED = "not recorded"
_MOST_REFUSED = 20
"""So many of the servers that were refused most are named."""


class OfRooms(Table, Protocol):
    """A table with things of rooms."""

    def rooms(self, now_ms: int, /) -> Source: ...


class OfServers(Table, Protocol):
    """A table with things of servers."""

    def servers(self, now_ms: int, /) -> Source: ...


class OfBoth(OfRooms, OfServers, Protocol):
    """A table with things of both."""


class Synapses(Protocol):
    """Synapse's own tables."""

    def rooms(self, now_ms: int, /) -> Source: ...
    def servers(self, now_ms: int, /) -> Source: ...
    def lacking(self, now_ms: int, /) -> Source: ...
    def names_txn(
        self, txn: Cursor, room_ids: Collection[str], /
    ) -> Mapping[str, tuple[str | None, str | None]]: ...


class Servers(Protocol):
    """What is recorded of other servers."""

    def reachability_txn(
        self, txn: Cursor, servers: Collection[str]
    ) -> Mapping[str, Reachability]: ...


class Lists:
    """Lists rooms and servers. Each process lists the same; what limits did lately is that of the
    process that answers.

    Args:
        bounds: of how many events of one server may wait.
        lately: what limits did lately, as far as this process knows.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        synapses: Synapses,
        servers: Servers,
        deferred: OfBoth,
        parked: OfBoth,
        newcomers: OfServers,
        holds: Holds,
        bounds: Bounds,
        lately: Lately,
    ) -> None:
        self._homeserver = homeserver
        self._synapses = synapses
        self._servers = servers
        self._deferred = deferred
        self._parked = parked
        self._newcomers = newcomers
        self._holds = holds
        self._bounds = bounds
        self._lately = lately

    async def rooms(self, request: Request) -> dict[str, Any]:
        """The rooms in which something is sticky or waits. Raises ``SynapseError`` (400)."""
        request.only("order_by", "dir", "from", "limit")
        page = Page.of(request, ("active", "deferred", "parked"))
        now_ms = self._homeserver.now_ms()

        def read_txn(txn: Cursor) -> dict[str, Any]:
            there = self._there_txn(txn)
            sources = {
                "active": self._synapses.rooms(now_ms),
                "deferred": there(self._deferred, lambda: self._deferred.rooms(now_ms)),
                "parked": there(self._parked, lambda: self._parked.rooms(now_ms)),
            }
            found, after = tally_txn(txn, sources, page)
            names = self._synapses.names_txn(txn, [room["name"] for room in found])
            for room in found:
                room["room_id"] = room.pop("name")
                room["name"], room["alias"] = names.get(room["room_id"], (None, None))
            return _answer(now_ms, "rooms", found, after)

        return await self._homeserver.transact("admin_rooms", read_txn)

    async def servers(self, request: Request) -> dict[str, Any]:
        """The servers that something sticky is of, or that lack something. Raises
        ``SynapseError`` (400)."""
        request.only("order_by", "dir", "from", "limit")
        page = Page.of(request, ("active", "deferred", "parked", "lacking", "newcomer"))
        now_ms = self._homeserver.now_ms()

        def read_txn(txn: Cursor) -> dict[str, Any]:
            there = self._there_txn(txn)
            sources = {
                "active": self._synapses.servers(now_ms),
                "deferred": there(self._deferred, lambda: self._deferred.servers(now_ms)),
                "parked": there(self._parked, lambda: self._parked.servers(now_ms)),
                "lacking": self._synapses.lacking(now_ms),
                "newcomer": there(self._newcomers, lambda: self._newcomers.servers(now_ms)),
            }
            found, after = tally_txn(txn, sources, page)
            names = [server["name"] for server in found]
            reachable = self._servers.reachability_txn(txn, names)
            versions = versions_txn(txn, is_postgres=self._homeserver.is_postgres)
            is_known = versions.get(self._holds.duty, 0) >= self._holds.layout
            bound_of = self._bounds.now_txn(txn, self._holds if is_known else None)
            for server in found:
                server["server"] = name = server.pop("name")
                known = reachable.get(name, Reachability())
                most = bound_of(name)
                server["is_refused"] = most is not None and server["deferred"] >= most
                server["failing_since_ms"] = known.failing_since_ms
                server["next_try_ms"] = known.next_try_ms
            return _answer(now_ms, "servers", found, after)

        answer = await self._homeserver.transact("admin_servers", read_txn)
        for server in answer["servers"]:
            for what in ("refused", "deferred"):
                counts = self._lately.of(what, server["server"])
                server[f"{what}_lately"] = _NOT_RECORDED if counts is None else counts
        return {**answer, "lately": self._lately_here()}

    def _lately_here(self) -> dict[str, Any]:
        # Of a server that is refused, nothing may be sticky.
        most: Any = _NOT_RECORDED
        if "refused" in self._lately.recorded:
            refused = self._lately.most("refused", _MOST_REFUSED)
            most = [{"server": server, "events": number} for server, number in refused]
        process, since_ms = self._homeserver.instance_name, self._lately.since_ms
        return {"process": process, "since_ms": since_ms, "most_refused": most}

    def _there_txn(self, txn: Cursor) -> Any:
        versions = versions_txn(txn, is_postgres=self._homeserver.is_postgres)

        def there(table: Table, source: Any) -> Source:
            is_there = versions.get(table.duty, 0) >= table.layout
            nothing = "SELECT '' AS name WHERE 1 = 0", ()
            return source() if is_there else nothing

        return there


def _answer(
    now_ms: int, what: str, found: list[dict[str, Any]], after: str | None
) -> dict[str, Any]:
    return {"now_ms": now_ms, what: found, **({"next": after} if after is not None else {})}
