"""The map of a call that a client keeps, as the addendum of MSC4354 has it.

Pure: nothing here waits or asks, and time is an argument.
"""

from collections.abc import Mapping
from typing import Any

from tests.lab.client import HOUR_MS, STICKY_FIELD

Key = tuple[str, str, str, str]
"""Room, sender, type and the content's sticky key."""

KEY_FIELD = "msc4354_sticky_key"


class StickyMap:
    """Of each key the event that ends last counts; of two that end at once, the one with the larger
    ID. If nothing but the key is in its content, nobody is there."""

    def __init__(self) -> None:
        self._events: dict[Key, dict[str, tuple[int, bool]]] = {}
        """When each event of a key ends (ms since the epoch), and whether it says that its sender
        is there, by its ID."""
        self._redacted: set[str] = set()

    def take_in(self, room_id: str, event: Mapping[str, Any]) -> None:
        """Takes in an event of a section or of a timeline, whatever it is."""
        content, sticky = event["content"], event.get(STICKY_FIELD)
        event_id = event["event_id"]
        if not isinstance(sticky, Mapping) or event_id in self._redacted:
            return
        if not isinstance(name := content.get(KEY_FIELD), str):
            return
        key = (room_id, event["sender"], event["type"], name)
        ends_ms = event["origin_server_ts"] + min(sticky["duration_ms"], HOUR_MS)
        self._events.setdefault(key, {})[event_id] = (ends_ms, len(content) > 1)

    def redact_all(self, room_id: str, sender: str) -> None:
        """All of the user's events in the room are redacted, as by a ban (MSC4293)."""
        for key, events in self._events.items():
            if key[:2] == (room_id, sender):
                self._redacted.update(events)
                events.clear()

    def shown(self, now_ms: int) -> set[Key]:
        """Who is there."""
        found = set()
        for key, events in self._events.items():
            lasting = [(ends, event_id) for event_id, (ends, _) in events.items() if ends > now_ms]
            if lasting and events[max(lasting)[1]][1]:
                found.add(key)
        return found
