"""A client of sliding sync that is closed and opened again, and keeps what it has meanwhile."""

import time
from threading import Lock
from typing import Any

from tests.lab.client import SLIDING_EXTENSION, Client
from tests.lab.rtc import members_of
from tests.lab.sticky_map import StickyMap
from tests.lab.watch import Watcher

_ROOMS = {"ranges": [[0, 99]], "timeline_limit": 10, "required_state": [["m.room.member", "*"]]}


class SlidingApp:
    """Watches the call of one room.

    matrix-js-sdk's own sliding sync saves nothing when it is closed. This client saves the map, and
    goes on from the extension's ``since`` with a new connection.
    """

    def __init__(self, user: Client, room_id: str) -> None:
        self.name = f"the lab's sliding sync of {user.user_id}"
        self._user = user
        self._room_id = room_id
        self._lock = Lock()
        self._map = StickyMap()
        self._joined: set[str] = set()
        self._since: str | None = None
        self.given: list[str] = []
        """The IDs in the sticky sections since it was opened, as often as they came."""

    def open(self) -> None:
        """Begins to sync."""
        self.given = []
        self._watcher = Watcher(
            self._user, sliding=True, taking=self._take, since=self._since, lists={"all": _ROOMS}
        )

    def close(self) -> None:
        """Ends the syncing."""
        self._watcher.close()

    def sticky(self) -> set[str]:
        """The IDs of the events that count.

        Raises:
            ApiError: the server answered with an error that a client can do nothing about.
        """
        return {event["event_id"] for event in self._current()}

    def call(self) -> list[str]:
        """The user IDs of the call's members, in order; raises as above."""
        return sorted(self._joined & members_of(self._current()))

    def _current(self) -> list[Any]:
        self._watcher.check()
        with self._lock:
            return self._map.current(_now_ms())

    def _take(self, answer: Any) -> None:
        room = answer.get("rooms", {}).get(self._room_id, {})
        section = answer["extensions"][SLIDING_EXTENSION]
        sticky = section["rooms"].get(self._room_id, {}).get("events", [])
        with self._lock:
            for event in [*room.get("required_state", []), *room.get("timeline", [])]:
                self._take_event(event)
            for event in sticky:
                self._map.add(event, _now_ms())
        self.given += [event["event_id"] for event in sticky]
        self._since = section.get("next_batch")

    def _take_event(self, event: Any) -> None:
        content = event["content"]
        if event["type"] == "m.room.member":
            is_joined = content["membership"] == "join"
            (self._joined.add if is_joined else self._joined.discard)(event["state_key"])
        elif event["type"] == "m.room.redaction":
            self._map.redact(event.get("redacts") or content["redacts"])
        else:
            self._map.add(event, _now_ms())


def _now_ms() -> int:
    return int(time.time() * 1000)
