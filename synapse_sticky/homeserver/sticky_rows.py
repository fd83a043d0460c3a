"""Where the rows of given events are in Synapse's table, which has no index by event ID."""

from collections.abc import Collection, Iterable

from synapse_sticky.homeserver.database import portions
from synapse_sticky.homeserver.process import Cursor, Homeserver
from synapse_sticky.homeserver.seams import table

SEAMS = (
    table(
        "sticky_events",
        "stream_id integer, room_id text, event_id text, event_stream_ordering integer",
    ),
    table("events", "event_id text, room_id text, stream_ordering integer"),
)


def stream_ids_txn(
    homeserver: Homeserver, txn: Cursor, event_ids: Collection[str]
) -> dict[str, int]:
    """The stream IDs of these events' rows, by event ID; an event without a row is left out.

    It costs a look-up an event, and the rows of the room for one that is not where most are.
    """
    found: dict[str, int] = {}
    for portion in portions(event_ids):
        found.update(_of_portion_txn(homeserver, txn, portion))
    return found


def _of_portion_txn(
    homeserver: Homeserver, txn: Cursor, event_ids: Collection[str]
) -> dict[str, int]:
    clause, args = homeserver.in_list("event_id", event_ids)
    txn.execute(f"SELECT event_id, room_id, stream_ordering FROM events WHERE {clause}", args)
    events = {event_id: (room_id, ordering) for event_id, room_id, ordering in txn.fetchall()}
    orderings = [ordering for _, ordering in events.values()]
    found = _read_txn(homeserver, txn, "event_stream_ordering", orderings)
    # Another ordering than the event's own: it was an outlier before.
    if others := events.keys() - found.keys():
        room_ids = {events[event_id][0] for event_id in others}
        of_rooms = _read_txn(homeserver, txn, "room_id", room_ids, among=others)
        found.update(of_rooms)
    return {event_id: found[event_id] for event_id in events if event_id in found}


def _read_txn(
    homeserver: Homeserver,
    txn: Cursor,
    column: str,
    values: Collection[object],
    among: Iterable[str] = (),
) -> dict[str, int]:
    clause, args = homeserver.in_list(column, values)
    if among:
        of_these, event_ids = homeserver.in_list("event_id", list(among))
        clause, args = f"{clause} AND {of_these}", [*args, *event_ids]
    txn.execute(f"SELECT event_id, stream_id FROM sticky_events WHERE {clause}", args)
    return dict(txn.fetchall())
