"""What an event is the state of, where that can be read (L4)."""

import hashlib
from collections.abc import Mapping

_NAMES = ("msc4354_sticky_key", "sticky_key")
_ENCRYPTED = "m.room.encrypted"


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
