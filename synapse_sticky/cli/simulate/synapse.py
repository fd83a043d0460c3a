"""Sticky events that a homeserver persisted, read from its database."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from synapse.api.constants import StickyEvent

from synapse_sticky.cli.simulate.arrivals import Arrival, UnusableError, arrival, in_order
from synapse_sticky.cli.synapse import Configuration
from synapse_sticky.handlers.deferral.key import key_of
from synapse_sticky.homeserver.database import is_postgres
from synapse_sticky.homeserver.seams import table

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
"""So many events, sticky or not, are looked at. Each is up to 64 kB."""
_PATIENCE_MS = 60_000

# Only the time that the sender claims has an index. No event is sticky an hour after that time.
_READ = """
    SELECT e.event_id, e.room_id, e.sender, e.type, e.origin_server_ts, e.received_ts,
        CASE WHEN j.json LIKE ? THEN j.json END, j.internal_metadata
    FROM (
        SELECT event_id, room_id, sender, type, origin_server_ts, received_ts, stream_ordering,
            outlier, rejection_reason
        FROM events WHERE ? < origin_server_ts AND origin_server_ts <= ?
        ORDER BY origin_server_ts LIMIT ?
    ) AS e
    INNER JOIN event_json AS j ON j.event_id = e.event_id
    WHERE NOT e.outlier AND e.rejection_reason IS NULL
    ORDER BY e.received_ts, e.stream_ordering
"""
_COUNT = """
    SELECT COUNT(*) FROM (
        SELECT 1 FROM events WHERE ? < origin_server_ts AND origin_server_ts <= ? LIMIT ?
    ) AS looked_at
"""


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
        if is_postgres(cursor.database_engine):
            cursor.execute("SET TRANSACTION READ ONLY")
            cursor.execute(f"SET LOCAL statement_timeout = {_PATIENCE_MS}")
        else:
            cursor.execute("PRAGMA query_only = ON")
        cursor.execute(_COUNT, (*span, _MOST + 1))
        if cursor.fetchone()[0] > _MOST:
            raise UnusableError(
                f"The server has more than {_MOST} events, sticky or not, of this time and the hour"
                " before. Give a shorter time with --since and --until."
            )
        cursor.execute(_READ, (f'%"{_FIELD}"%', *span, _MOST))
        rows = cursor.fetchall()
    found = (one for one in _sticky(rows) if since_ms <= one.at_ms <= until_ms)
    return configuration.server_name, in_order(found)


def _sticky(rows: Sequence[Any]) -> Iterator[Arrival]:
    for number, row in enumerate(rows):
        event_id, room_id, sender, kind, sent_ms, received_ms, text, metadata = row
        if text is None or received_ms is None or json.loads(metadata).get("soft_failed"):
            continue
        event = json.loads(text)
        field = event.get(_FIELD)
        one = arrival(
            number,
            received_ms,
            room_id,
            sender,
            event_id=event_id,
            duration_ms=field.get("duration_ms") if isinstance(field, Mapping) else None,
            origin_server_ts=sent_ms,
            key=key_of(kind, event.get("content")),
        )
        if one is not None:
            yield one
