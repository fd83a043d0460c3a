"""What Synapse's tables have of one event, and of the servers that it is for (E3)."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from synapse.api.constants import StickyEvent

from synapse_sticky._core import sticky_until_ms
from synapse_sticky.admin.facts import PersistedEvent, Reachability, StagedPdu
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.retention import Retention
from synapse_sticky.homeserver.seams import STORE, attributes, method, table

_ENTRY = "synapse.storage.databases.main.events_worker.EventCacheEntry"
_METADATA = "synapse.synapse_rust.events.EventInternalMetadata"

SEAMS = (
    method(STORE, "async _get_events_from_db(event_ids, /) -> dict"),
    method(STORE, "async are_users_erased(user_ids, /) -> Mapping"),
    method(STORE, "async get_current_hosts_in_room(room_id, /) -> Set"),
    *attributes(_ENTRY, "event", "redacted_event"),
    method(_METADATA, "is_outlier()"),
    method(_METADATA, "is_soft_failed()"),
    *attributes(_METADATA, "policy_server_spammy", "spam_checker_spammy", "stream_ordering"),
    table("events", "event_id text, received_ts integer"),
    table("event_json", "event_id text, json text"),
    table("redactions", "event_id text, redacts text"),
    table("rooms", "room_id text"),
    table(
        "sticky_events",
        "stream_id integer, room_id text, event_id text, event_stream_ordering integer,"
        " expires_at integer",
    ),
    table(
        "federation_inbound_events_staging",
        "origin text, event_id text, room_id text, received_ts integer",
    ),
    table(
        "destinations",
        "destination text, retry_last_ts integer, retry_interval integer, failure_ts integer,"
        " last_successful_stream_ordering integer",
    ),
    table(
        "destination_rooms_sticky_events_backlog",
        "destination text, room_id text, sticky_events_stream_position integer",
    ),
)

_FIELD: str = StickyEvent.EVENT_FIELD_NAME
_MOST_REDACTIONS = 10


class SynapseEvents:
    """Reads what Synapse has of events."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        self._retention = Retention(homeserver)

    async def persisted(self, event_id: str) -> PersistedEvent | None:
        """The event, by what the database says at this moment; None if it is not here.

        It costs a few look-ups by index; and the rows of its room in the sticky events stream, if
        it was an outlier before.
        """
        entries = await self._store._get_events_from_db([event_id])
        if (entry := entries.get(event_id)) is None:
            return None
        event: Any = entry.event
        metadata = event.internal_metadata
        ordering = metadata.stream_ordering
        rows = await self._homeserver.transact(
            "admin_event", self._rows_txn, event_id, event.room_id, ordering
        )
        received_ms, field, is_censored, row, is_late, redactions = rows
        erased = await self._store.are_users_erased([event.sender])
        return PersistedEvent(
            *(event_id, event.room_id, event.sender, event.type, event.origin_server_ts),
            *(received_ms, ordering),
            duration_ms=_duration_ms(field),
            ends_ms=await self._ends_ms(event, field, received_ms, row),
            stream_id=row[0] if row else None,
            is_late=is_late,
            rejected=event.rejected_reason,
            is_outlier=metadata.is_outlier(),
            is_soft_failed=metadata.is_soft_failed(),
            refused_by=_refused_by(metadata),
            is_redacted=entry.redacted_event is not None,
            redacted_by=redactions,
            is_censored=is_censored,
            is_erased=bool(erased.get(event.sender)),
        )

    async def _ends_ms(
        self, event: Any, field: Any, received_ms: int | None, row: tuple[int, int] | None
    ) -> int | None:
        sent_ms = event.origin_server_ts
        ends_ms = row[1] if row else None
        if ends_ms is None:
            now_ms = self._homeserver.now_ms()
            ends_ms = sticky_until_ms(
                field, sent_ms, now_ms if received_ms is None else received_ms
            )
        if ends_ms is None:
            return None
        return await self._retention.ends_ms(event.room_id, ends_ms, sent_ms)

    def _rows_txn(
        self, txn: Cursor, event_id: str, room_id: str, ordering: int
    ) -> tuple[int | None, Any, bool, tuple[int, int] | None, bool, list[str]]:
        txn.execute("SELECT received_ts FROM events WHERE event_id = ?", (event_id,))
        ((received_ms,),) = txn.fetchall() or [(None,)]
        txn.execute("SELECT json FROM event_json WHERE event_id = ?", (event_id,))
        ((text,),) = txn.fetchall() or [("{}",)]
        field = json.loads(text).get(_FIELD)
        txn.execute(
            "SELECT event_id FROM redactions WHERE redacts = ? ORDER BY event_id LIMIT ?",
            (event_id, _MOST_REDACTIONS),
        )
        redactions = [redaction for (redaction,) in txn.fetchall()]
        # There is no index by event ID. The ordering is another one if it was an outlier before.
        select = "SELECT stream_id, expires_at, event_stream_ordering FROM sticky_events WHERE"
        txn.execute(f"{select} event_stream_ordering = ? AND event_id = ?", (ordering, event_id))
        row = txn.fetchone()
        if row is None:
            txn.execute(f"{select} room_id = ? AND event_id = ?", (room_id, event_id))
            row = txn.fetchone()
        is_late = False
        if row is not None:
            txn.execute(
                "SELECT 1 FROM sticky_events WHERE room_id = ? AND event_stream_ordering > ?"
                " AND stream_id < ? LIMIT 1",
                (room_id, row[2], row[0]),
            )
            is_late = txn.fetchone() is not None
        is_censored = field is None and bool(redactions)
        return received_ms, field, is_censored, row and row[:2], is_late, redactions

    def staged_txn(self, txn: Cursor, event_id: str) -> StagedPdu | None:
        """The PDU, if it is staged. There is no index by event ID alone: this reads the index of
        all that is staged, and one row."""
        txn.execute(
            "SELECT origin FROM federation_inbound_events_staging WHERE event_id = ?"
            " ORDER BY origin LIMIT 1",
            (event_id,),
        )
        row = txn.fetchone()
        if row is None:
            return None
        txn.execute(
            "SELECT origin, room_id, received_ts FROM federation_inbound_events_staging"
            " WHERE origin = ? AND event_id = ?",
            (*row, event_id),
        )
        row = txn.fetchone()
        return None if row is None else StagedPdu(*row)

    def is_known_txn(self, txn: Cursor, room_id: str) -> bool:
        """Does this server know the room?"""
        txn.execute("SELECT 1 FROM rooms WHERE room_id = ?", (room_id,))
        return txn.fetchone() is not None

    async def servers(self, room_id: str) -> list[str]:
        """The other servers in the room, in order; Synapse has them in its cache."""
        found = await self._store.get_current_hosts_in_room(room_id)
        return sorted({*found} - {self._homeserver.server_name})

    def reachability_txn(self, txn: Cursor, servers: Collection[str]) -> Mapping[str, Reachability]:
        """What is recorded of those of the servers that anything was ever sent to."""
        clause, args = self._homeserver.in_list("destination", servers)
        txn.execute(
            "SELECT destination, failure_ts, retry_last_ts, retry_interval,"
            f" last_successful_stream_ordering FROM destinations WHERE {clause}",
            args,
        )
        return {
            server: Reachability(since or None, (last or 0) + interval if interval else None, up_to)
            for server, since, last, interval, up_to in txn.fetchall()
        }

    def backlog_txn(self, txn: Cursor, room_id: str, servers: Collection[str]) -> Mapping[str, int]:
        """From which position of the sticky events stream on these servers lack events of the
        room, by Synapse's backlog; those that are not in it are left out."""
        clause, args = self._homeserver.in_list("destination", servers)
        txn.execute(
            "SELECT destination, sticky_events_stream_position"
            f" FROM destination_rooms_sticky_events_backlog WHERE {clause} AND room_id = ?",
            (*args, room_id),
        )
        return dict(txn.fetchall())


def _duration_ms(field: Any) -> int | None:
    duration_ms = field.get("duration_ms") if isinstance(field, dict) else None
    is_sticky = sticky_until_ms(field, 0, 0) is not None
    return int(duration_ms) if is_sticky and duration_ms is not None else None


def _refused_by(metadata: Any) -> str | None:
    if metadata.policy_server_spammy:
        return "policy server"
    return "spam checker" if metadata.spam_checker_spammy else None
