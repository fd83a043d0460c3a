"""What Synapse's tables have of all sticky events (E3)."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.seams import table

SEAMS = (
    table(
        "sticky_events",
        "room_id text, event_id text, sender text, expires_at integer,"
        " event_stream_ordering integer",
    ),
    table("events", "event_id text, type text"),
    table("event_json", "event_id text, internal_metadata text"),
    table("redactions", "redacts text"),
    table("room_stats_state", "room_id text, name text, canonical_alias text"),
    table("federation_inbound_events_staging", "room_id text, received_ts integer"),
    table("destination_rooms_sticky_events_backlog", "destination text, room_id text"),
)

_FIRST = -(2**63)
"""Before every position."""


class SynapseRooms:
    """Counts the rows of Synapse's tables."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver

    def counts_txn(self, txn: Cursor, at_most: int) -> dict[str, Any]:
        """Active events and their rooms, what is staged, and what other servers lack."""
        now_ms = self._homeserver.now_ms()
        txn.execute(
            "SELECT COUNT(*), COUNT(DISTINCT room_id) FROM ("
            "SELECT room_id FROM sticky_events WHERE ? < expires_at LIMIT ?) AS active",
            (now_ms, at_most),
        )
        ((active, rooms),) = txn.fetchall()
        txn.execute(
            "SELECT COUNT(*), COUNT(DISTINCT room_id), MIN(received_ts) FROM ("
            "SELECT room_id, received_ts FROM federation_inbound_events_staging LIMIT ?) AS staged",
            (at_most,),
        )
        ((staged, staged_rooms, oldest_ms),) = txn.fetchall()
        txn.execute(
            "SELECT COUNT(*), COUNT(DISTINCT destination) FROM ("
            "SELECT destination FROM destination_rooms_sticky_events_backlog LIMIT ?) AS lacking",
            (at_most,),
        )
        ((pairs, servers),) = txn.fetchall()
        return {
            "active": {"events": active, "rooms": rooms},
            "staged": {"pdus": staged, "rooms": staged_rooms, "oldest_ms": oldest_ms},
            "backlog": {"rooms_of_servers": pairs, "servers": servers},
        }

    def rooms(self, now_ms: int) -> tuple[str, tuple[Any, ...]]:
        """The rooms of the active events, as SQL."""
        return "SELECT room_id AS name FROM sticky_events WHERE ? < expires_at", (now_ms,)

    def servers(self, now_ms: int) -> tuple[str, tuple[Any, ...]]:
        """The servers of their senders, likewise."""
        find = "strpos" if self._homeserver.is_postgres else "instr"
        return (
            f"SELECT substr(sender, {find}(sender, ':') + 1) AS name FROM sticky_events"
            " WHERE ? < expires_at",
            (now_ms,),
        )

    def lacking(self, now_ms: int) -> tuple[str, tuple[Any, ...]]:
        """The servers that lack events of a room, a row for each room, likewise."""
        return "SELECT destination AS name FROM destination_rooms_sticky_events_backlog", ()

    def names_txn(
        self, txn: Cursor, room_ids: Collection[str]
    ) -> Mapping[str, tuple[str | None, str | None]]:
        """The names and aliases of the rooms, as far as Synapse has noted them."""
        clause, args = self._homeserver.in_list("room_id", room_ids)
        txn.execute(
            f"SELECT room_id, name, canonical_alias FROM room_stats_state WHERE {clause}", args
        )
        return {room_id: (name, alias) for room_id, name, alias in txn.fetchall()}

    def active_txn(
        self, txn: Cursor, room_id: str, after: int | None, limit: int
    ) -> list[tuple[int, dict[str, Any]]]:
        """The room's active events after this position in the stream of all events, in its order,
        each with its position. It reads the rows of the page by index, and those that have expired
        in between."""
        now_ms = self._homeserver.now_ms()
        txn.execute(
            "SELECT se.event_stream_ordering, se.event_id, se.sender, se.expires_at, e.type,"
            " j.internal_metadata,"
            " EXISTS (SELECT 1 FROM redactions AS r WHERE r.redacts = se.event_id)"
            " FROM sticky_events AS se"
            " LEFT JOIN events AS e ON e.event_id = se.event_id"
            " LEFT JOIN event_json AS j ON j.event_id = se.event_id"
            " WHERE se.room_id = ? AND se.event_stream_ordering > ? AND ? < se.expires_at"
            " ORDER BY se.event_stream_ordering LIMIT ?",
            (room_id, _FIRST if after is None else after, now_ms, limit),
        )
        found = []
        for at, event_id, sender, ends_ms, kind, metadata, is_redacted in txn.fetchall():
            is_soft_failed = json.loads(metadata or "{}").get("soft_failed", False)
            why = "redacted" if is_redacted else "soft-failed" if is_soft_failed else None
            state = "active" if why is None else "not delivered"
            entry = {"event_id": event_id, "sender": sender, "type": kind, "state": state}
            found.append((at, {**entry, "why": why, "since_ms": None, "ends_ms": ends_ms}))
        return found

    def types_txn(self, txn: Cursor, event_ids: Collection[str]) -> Mapping[str, str]:
        """The types of these events."""
        clause, args = self._homeserver.in_list("event_id", event_ids)
        txn.execute(f"SELECT event_id, type FROM events WHERE {clause}", args)
        return dict(txn.fetchall())
