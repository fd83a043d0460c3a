"""What administrators are told of deferred events (E3)."""

from collections.abc import Mapping, Sequence
from typing import Any

import attr

from synapse_sticky.config import FederationConfig
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.limits import per_second

_SCOPES: Mapping[str, tuple[str, ...]] = {
    "per_server": ("server",),
    "per_server_in_room": ("server", "room_id"),
    "per_sender": ("server", "room_id", "sender"),
    "per_room": ("room_id",),
}
"""By the name of a limit: which events it holds up together, as columns. An index has the first."""

_NAMES = "event_id, room_id, sender, server, expires_at_ms, past_limit, deferred_ms"

_UNEXPIRED = "SELECT {} AS name FROM synapse_sticky_deferred WHERE ? < expires_at_ms"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class DeferredEvent:
    """A deferred event, as it is shown. Times are in ms since the epoch.

    limit: the option that it is past; None if that was not recorded.
    deferred_ms: since when it waits; likewise.
    about_ms: when about it is released, by the rate of that limit and by how many events wait for
        the same; None if that cannot be told. Another limit may hold it up for longer.
    """

    event_id: str
    room_id: str
    sender: str
    server: str
    expires_at_ms: int
    limit: str | None
    deferred_ms: int | None
    about_ms: int | None = None


class DeferredReader:
    """Reads the table of deferred events, which has layout ``layout`` at least."""

    duty = "deferral"
    layout = 3

    def __init__(self, homeserver: Homeserver, config: FederationConfig) -> None:
        self._homeserver = homeserver
        self._config = config

    def of_event_txn(self, txn: Cursor, event_id: str) -> DeferredEvent | None:
        """The event of this ID; None if it is not deferred. With the time of its release, which
        costs a look at the deferred events of its server, or of its room."""
        txn.execute(f"SELECT {_NAMES} FROM synapse_sticky_deferred WHERE event_id = ?", (event_id,))
        row = txn.fetchone()
        if row is None:
            return None
        event = DeferredEvent(*row)
        return attr.evolve(event, about_ms=self._about_ms_txn(txn, event))

    def _about_ms_txn(self, txn: Cursor, event: DeferredEvent) -> int | None:
        limit = event.limit
        if limit is None or limit not in _SCOPES:
            return None
        columns = _SCOPES[limit]
        same = " AND ".join(f"{column} = ?" for column in columns)
        now_ms = self._homeserver.now_ms()
        txn.execute(
            f"SELECT COUNT(*) FROM synapse_sticky_deferred WHERE {same} AND expires_at_ms > ?",
            (*(getattr(event, column) for column in columns), now_ms),
        )
        row = txn.fetchone()
        count = row[0] if row else 0
        return now_ms + round(count * 1_000 / per_second(self._config, limit))

    def of_server_txn(self, txn: Cursor, server: str) -> int:
        """How many unexpired events of this server's users are deferred."""
        txn.execute(
            "SELECT COUNT(*) FROM synapse_sticky_deferred WHERE server = ? AND expires_at_ms > ?",
            (server, self._homeserver.now_ms()),
        )
        row = txn.fetchone()
        return int(row[0]) if row else 0

    def counts_txn(self, txn: Cursor, at_most: int) -> dict[str, Any]:
        """How many wait, by limit, and of how many servers; the first ``at_most`` rows count."""
        now_ms = self._homeserver.now_ms()
        few = (
            "(SELECT past_limit, server FROM synapse_sticky_deferred"
            " WHERE expires_at_ms > ? LIMIT ?) AS few"
        )
        txn.execute(
            f"SELECT past_limit, COUNT(*) FROM {few} GROUP BY past_limit", (now_ms, at_most)
        )
        by_limit = {limit or "not recorded": count for limit, count in txn.fetchall()}
        txn.execute(f"SELECT COUNT(DISTINCT server) FROM {few}", (now_ms, at_most))
        ((servers,),) = txn.fetchall()
        total = sum(by_limit.values())
        return {"deferred": {"events": total, "by_limit": by_limit, "servers": servers}}

    def rooms(self, now_ms: int) -> tuple[str, tuple[Any, ...]]:
        """The rooms of the deferred events, as SQL."""
        return _UNEXPIRED.format("room_id"), (now_ms,)

    def servers(self, now_ms: int) -> tuple[str, tuple[Any, ...]]:
        """The servers of their senders, likewise."""
        return _UNEXPIRED.format("server"), (now_ms,)

    def of_room_txn(
        self, txn: Cursor, room_id: str, after: str, limit: int
    ) -> Sequence[DeferredEvent]:
        """The room's deferred events after this event ID, in the order of their IDs."""
        txn.execute(
            f"SELECT {_NAMES} FROM synapse_sticky_deferred WHERE room_id = ? AND event_id > ?"
            " ORDER BY event_id LIMIT ?",
            (room_id, after, limit),
        )
        return [DeferredEvent(*row) for row in txn.fetchall()]
