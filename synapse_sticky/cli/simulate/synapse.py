"""Sticky events that a homeserver persisted, read from its database."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attr
from synapse.api.constants import StickyEvent

from synapse_sticky.cli.simulate.arrivals import Arrival, UnusableError, arrival, in_order
from synapse_sticky.cli.synapse import Configuration
from synapse_sticky.homeserver.database import portions
from synapse_sticky.homeserver.seams import table
from synapse_sticky.index.key import key_of

SEAMS = (
    table(
        "events",
        "event_id text, room_id text, sender text, type text, origin_server_ts integer, "
        "received_ts integer, stream_ordering integer, outlier boolean, rejection_reason text",
    ),
    table("event_json", "event_id text, json text, internal_metadata text"),
)

_FIELD: str = StickyEvent.EVENT_FIELD_NAME
_HOUR_MS = 3_600_000
_MOST = 50_000
"""So many events, sticky or not, are looked at."""
_AT_ONCE = 500
"""Of so many the JSON is in memory at a time, up to 64 kB of each."""
_PATIENCE_MS = 60_000

# Only the time that the sender claims has an index. No event is sticky an hour after that time.
_EVENTS = """
    SELECT event_id, room_id, sender, type, origin_server_ts, received_ts, stream_ordering,
        outlier OR rejection_reason IS NOT NULL
    FROM events WHERE ? < origin_server_ts AND origin_server_ts <= ?
    ORDER BY origin_server_ts LIMIT ?
"""
_JSON = "SELECT event_id, json, internal_metadata FROM event_json WHERE json LIKE ? AND event_id IN"


def read_database(paths: Sequence[str], since_ms: int, until_ms: int) -> tuple[str, list[Arrival]]:
    """The name of the server, and the sticky events that it persisted in this time.

    It only reads. What is dated more than an hour ahead of ``until_ms`` is left out.

    Args:
        paths: the files of the configuration.
        since_ms, until_ms: in ms since the epoch.

    Raises:
        UnusableError: there are no sticky events, or too many events to be looked at.
        Exception: the configuration is wrong, or the database cannot be read.
    """
    configuration = Configuration(paths)
    span = (since_ms - _HOUR_MS, until_ms + _HOUR_MS)
    with configuration.transaction() as cursor:
        if configuration.has_postgres:
            cursor.execute("SET TRANSACTION READ ONLY")
            cursor.execute(f"SET LOCAL statement_timeout = {_PATIENCE_MS}")
        else:
            cursor.execute("PRAGMA query_only = ON")
        cursor.execute(_EVENTS, (*span, _MOST + 1))
        rows = cursor.fetchall()
        if len(rows) > _MOST:
            raise UnusableError(
                f"The server has more than {_MOST} events, sticky or not, of this time and an hour"
                " before and after it. Give a shorter time with --since and --until."
            )
        events = [
            event for event in (_Event(*row) for row in rows) if event.came(since_ms, until_ms)
        ]
        events.sort(key=lambda event: (event.received_ms, event.stream_ordering))
        found = [one for portion in portions(events, _AT_ONCE) for one in _sticky(cursor, portion)]
    return configuration.server_name, in_order(found)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _Event:
    """A row of ``events``; times in ms since the epoch."""

    event_id: str
    room_id: str
    sender: str
    type: str
    sent_ms: int
    received_ms: int
    stream_ordering: int
    is_refused: bool

    def came(self, since_ms: int, until_ms: int) -> bool:
        """Was it persisted in this time, and not as an outlier or rejected?"""
        is_known = self.received_ms is not None and not self.is_refused
        return is_known and since_ms <= self.received_ms <= until_ms


def _sticky(cursor: Any, events: Sequence[_Event]) -> Iterator[Arrival]:
    """Those of the events that are sticky and not soft-failed, in their order."""
    ids = [event.event_id for event in events]
    cursor.execute(f"{_JSON} ({', '.join('?' * len(ids))})", (f'%"{_FIELD}"%', *ids))
    json_of = {event_id: texts for event_id, *texts in cursor.fetchall()}
    for event in events:
        if event.event_id not in json_of:
            continue
        whole, metadata = map(json.loads, json_of[event.event_id])
        field = whole.get(_FIELD)
        if metadata.get("soft_failed") or not isinstance(field, Mapping):
            continue
        one = arrival(
            event.stream_ordering,
            event.received_ms,
            event.room_id,
            event.sender,
            event_id=event.event_id,
            duration_ms=field.get("duration_ms"),
            origin_server_ts=event.sent_ms,
            key=key_of(event.type, whole.get("content")),
        )
        if one is not None:
            yield one
