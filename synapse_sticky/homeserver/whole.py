"""Events as the database has them at this moment, whatever is in this process's cache (S5).

Synapse loads an event from its cache, which another process's redaction reaches a moment later, and
not at all if all of a user's events are redacted at once by a ban.
"""

from collections.abc import Collection
from typing import Any

from synapse_sticky.homeserver.fitting import misfits
from synapse_sticky.homeserver.process import Cursor, Homeserver
from synapse_sticky.homeserver.seams import STORE, attributes, method, table
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_ENTRY = "synapse.storage.databases.main.events_worker.EventCacheEntry"

SEAMS = {
    "events": (
        method(STORE, "async _get_events_from_db(event_ids, /) -> dict"),
        method(STORE, "async get_events(event_ids, /, *, allow_rejected) -> dict"),
        *attributes(_ENTRY, "event", "redacted_event"),
        method("synapse.synapse_rust.events.EventInternalMetadata", "is_redacted()"),
    ),
    "users": (
        table("room_ban_redactions", "room_id text, user_id text, redact_end_ordering integer"),
    ),
}


def can_tell_of_users(homeserver: Homeserver) -> bool:
    """Does the database say which users' events are redacted?"""
    return not misfits(SEAMS["users"], homeserver.columns)


def is_user_redacted_txn(txn: Cursor, room_id: str, user_id: str) -> bool:
    """Does Synapse redact whatever of this user's it persists in the room, since a ban or a kick
    that said so (MSC4293), and until that ends?"""
    txn.execute(
        "SELECT 1 FROM room_ban_redactions"
        " WHERE room_id = ? AND user_id = ? AND redact_end_ordering IS NULL",
        (room_id, user_id),
    )
    return txn.fetchone() is not None


async def still_whole(homeserver: Homeserver, event_ids: Collection[str]) -> dict[str, Any]:
    """Those of the events that are there and neither rejected nor redacted, by event ID.

    A redaction counts where Synapse itself applies it: it may be invalid. What is found is in
    Synapse's cache afterwards. Where this Synapse cannot be asked past its cache, the cache counts.
    """
    if not event_ids:
        return {}
    try:
        entries = await homeserver.store._get_events_from_db(event_ids)
        found = {event_id: entries[event_id] for event_id in event_ids if event_id in entries}
        return {
            event_id: entry.event
            for event_id, entry in found.items()
            if entry.redacted_event is None and entry.event.rejected_reason is None
        }
    except (AttributeError, TypeError) as e:
        logger.error(
            "This Synapse does not fit: %s. So a redaction in another process counts a moment"
            " later, and one of all of a user's events once this process hears of it.",
            e,
        )
    cached = await homeserver.store.get_events(event_ids, allow_rejected=False)
    return {
        event_id: event
        for event_id, event in cached.items()
        if not event.internal_metadata.is_redacted()
    }
