"""What an event is the state of, where that can be read, and how new it is (L4, D4)."""

import hashlib
import json
from collections.abc import Mapping

from synapse_sticky._core import sticky_until_ms

_NAMES = ("msc4354_sticky_key", "sticky_key")
_ENCRYPTED = "m.room.encrypted"
_NEVER_MS = 2**63 - 1

MOST_READ_BYTES = 16_384
"""So large is the JSON of an event at most that is read for its key. Strangers send what has 64 kB,
and each process reads all of it. A larger event has no readable key."""


def key_of(event_type: str, content: object) -> int | None:
    """A hash of 64 bits of the event's type and sticky key; None if it has no readable one.

    Strangers choose keys, of up to 64 kB, so they are hashed. Who finds two with the same hash
    disturbs the order of their own events.
    """
    if event_type == _ENCRYPTED or not isinstance(content, Mapping):
        return None
    for name in _NAMES:
        key = content.get(name)
        if isinstance(key, str):
            text = f"{len(event_type)} {event_type}{key}".encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(text, digest_size=8).digest()
            return int.from_bytes(digest, "big", signed=True)
    return None


def newness_ms(field: object, origin_server_ts: object) -> int | None:
    """The end that the sender claims, in ms since the epoch: of a key, the event with the latest is
    the newest (MSC4354). None if the event is not sticky.

    Args:
        field: the value of the event's ``msc4354_sticky``.
    """
    return sticky_until_ms(field, origin_server_ts, _NEVER_MS)


def read_json(text: str | None, field_name: str) -> tuple[int | None, int | None]:
    """The key and the newness of an event's JSON; None for what cannot be read."""
    try:
        event = json.loads(text or "{}")
        key = key_of(str(event.get("type")), event.get("content"))
        return key, newness_ms(event.get(field_name), event.get("origin_server_ts"))
    except (ValueError, RecursionError, AttributeError):
        return None, None
