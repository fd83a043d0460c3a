"""What Synapse's own tables say of sticky events that are still sticky."""

from typing import Any

from synapse_sticky.homeserver.seams import Attribute, Import, table

SEAMS = (
    Import("synapse.api.constants", "StickyEvent"),
    Attribute("synapse.api.constants.StickyEvent", "EVENT_FIELD_NAME"),
    table("sticky_events", "stream_id integer, room_id text, sender text, expires_at integer"),
    table("federation_inbound_events_staging", "event_json text, received_ts integer"),
    table(
        "destination_rooms_sticky_events_backlog",
        "destination text, room_id text, sticky_events_stream_position integer",
    ),
)

_HOUR_MS = 3600 * 1000
"""What was received earlier has expired."""

_MOST = 10_000
"""Nobody needs to know of more."""


def of_others_txn(txn: Any, server_name: str, now_ms: int) -> int:
    """How many unexpired sticky events of other servers' users are in Synapse's table."""
    return _count(
        txn,
        "SELECT COUNT(*) FROM sticky_events WHERE ? < expires_at AND sender NOT LIKE ?",
        (now_ms, _users_of(server_name)),
    )


def unexpired_txn(txn: Any, now_ms: int) -> int:
    """How many unexpired sticky events of anybody are in Synapse's table."""
    return _count(txn, "SELECT COUNT(*) FROM sticky_events WHERE ? < expires_at", (now_ms,))


def staged_txn(txn: Any, now_ms: int) -> int:
    """How many sticky PDUs of the last hour are acknowledged and not processed, 10,000 at most."""
    # Nobody else who needs this file needs that.
    from synapse.api.constants import StickyEvent

    return _count(
        txn,
        "SELECT COUNT(*) FROM (SELECT 1 FROM federation_inbound_events_staging"
        " WHERE ? < received_ts AND event_json LIKE ? LIMIT ?) AS staged",
        (now_ms - _HOUR_MS, f'%"{StickyEvent.EVENT_FIELD_NAME}"%', _MOST),
    )


def lacking_txn(txn: Any, server_name: str, now_ms: int) -> int:
    """How many newcomers lack own unexpired events, by room.

    Synapse's backlog has a row of each from its join until the module has found that it lacks
    nothing.
    """
    return _count(
        txn,
        "SELECT COUNT(*) FROM synapse_sticky_newcomers AS newcomer"
        " INNER JOIN destination_rooms_sticky_events_backlog AS backlog"
        " ON backlog.destination = newcomer.destination AND backlog.room_id = newcomer.room_id"
        " INNER JOIN (SELECT room_id, MAX(stream_id) AS last FROM sticky_events"
        " WHERE ? < expires_at AND sender LIKE ? GROUP BY room_id) AS own"
        " ON own.room_id = newcomer.room_id"
        " WHERE backlog.sticky_events_stream_position <= own.last",
        (now_ms, _users_of(server_name)),
    )


def _users_of(server_name: str) -> str:
    return f"%:{server_name}"


def _count(txn: Any, sql: str, args: tuple[object, ...]) -> int:
    txn.execute(sql, args)
    row = txn.fetchone()
    return int(row[0]) if row else 0
