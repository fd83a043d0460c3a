"""Whether a PDU could be persisted at all: one that cannot is not parked."""

from collections.abc import Iterator

from synapse.module_api import EventBase

from synapse_sticky.homeserver.spec import LABELS, LONGEST_NAME

_MAX_PREV_EVENTS = 20  # Synapse refuses a PDU with more
_MAX_AUTH_EVENTS = 10  # likewise


def is_possible(pdu: EventBase) -> bool:
    """Can it ever be persisted? Synapse takes only so many prev_events and auth_events, and names
    that are not too long. Postgres neither stores text with NUL in it, nor takes a query with
    one."""
    prev_event_ids, auth_event_ids = pdu.prev_event_ids(), pdu.auth_event_ids()
    return (
        len(set(prev_event_ids)) <= _MAX_PREV_EVENTS
        and len(auth_event_ids) <= _MAX_AUTH_EVENTS
        and all(len(name) <= LONGEST_NAME for name in _names(pdu))
        and not any("\0" in text for text in (*prev_event_ids, *auth_event_ids, *_texts(pdu)))
    )


def _names(pdu: EventBase) -> Iterator[str]:
    """What Synapse compares with the longest name."""
    for name in (pdu.event_id, pdu.room_id, pdu.sender, pdu.type, pdu.get("state_key")):
        if isinstance(name, str):
            yield name


def _texts(pdu: EventBase) -> Iterator[str]:
    """What of the PDU goes into columns of its own."""
    labels = pdu.content.get(LABELS)
    listed = labels if isinstance(labels, list | tuple) else ()
    related: tuple[str, ...] = ()
    match pdu.content.get("m.relates_to"):
        case {"rel_type": "m.annotation", "event_id": str(parent_id), "key": str(key)}:
            related = (parent_id, key)
        case {"rel_type": str(rel_type), "event_id": str(parent_id)}:
            related = (parent_id, rel_type)
        case _:
            pass  # Synapse stores no other relation, whatever is in it
    for field in (pdu.type, pdu.get("state_key"), pdu.redacts, *related, *listed):
        if isinstance(field, str):
            yield field
