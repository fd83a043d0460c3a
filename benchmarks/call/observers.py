"""Clients that keep the map of the call, and note when it changes."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import requests

from benchmarks.call.causes import Party
from benchmarks.call.spans import Span, shown_spans
from benchmarks.call.sticky_map import KEY_FIELD, Key, StickyMap
from tests.lab import Client
from tests.lab.client import SLIDING_EXTENSION, ApiError
from tests.lab.js_sdk import JsSdk
from tests.soak.moderation import REDACT_FLAG

_POLL_MS = 2_000
_PAUSE_S = 0.2
_FILTER = {
    "presence": {"not_types": ["*"]},
    "room": {"timeline": {"limit": 50, "not_types": ["org.example.call"]}},
}
"""The call's events come in the sticky section only."""
_LISTS = {"all": {"ranges": [[0, 9]], "timeline_limit": 20, "required_state": []}}

Told = list[tuple[str, Any]]
"""Events with the IDs of their rooms."""


class Observer(ABC):
    """One client. It may be closed and opened again."""

    kind: str

    def __init__(self, party: Party, user: Client) -> None:
        self.party = party
        self.user = user
        self._shown: set[Key] = set()
        self._changes: dict[Key, list[tuple[float, bool]]] = {}
        self._opened: list[float] = []
        self._closed: list[float] = []

    @abstractmethod
    def open(self) -> None:
        """Begins to watch."""

    @abstractmethod
    def close(self) -> None:
        """Ends it."""

    def watches(self, room_id: str) -> bool:
        """Does it show who is in the call of this room?"""
        return True

    def _note(self, shown: set[Key]) -> None:
        now_s = time.monotonic()
        for key in shown ^ self._shown:
            self._changes.setdefault(key, []).append((now_s, key in shown))
        self._shown = shown

    def now(self) -> set[Key]:
        """What it shows."""
        return self._shown

    def shown(self, keys: Iterable[Key], end_s: float) -> dict[Key, list[Span]]:
        """When it has shown each of these."""
        return {key: shown_spans(self._changes.get(key, []), end_s) for key in keys}

    def seen(self, end_s: float) -> list[Span]:
        """When it was open."""
        return list(zip(self._opened, [*self._closed, end_s], strict=False))


class PollingObserver(Observer):
    """It syncs in a thread. Opened again, it goes on from where it was."""

    def __init__(self, party: Party, user: Client) -> None:
        super().__init__(party, user)
        self._client = user.again()
        self._map = StickyMap()
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None
        self.errors: set[str] = set()

    @abstractmethod
    def _sync(self, client: Client) -> Told:
        """Syncs once, from where it was.

        Raises:
            requests.RequestException, ApiError: its server is down or refuses.
        """

    def open(self) -> None:
        self._ends.clear()
        self._opened.append(time.monotonic())
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self._thread is not None:
            self._closed.append(time.monotonic())
            self._ends.set()
            self._thread.join(90)
            self._thread = None

    def _watch(self) -> None:
        while not self._ends.is_set():
            try:
                told = self._sync(self._client)
            except (requests.RequestException, ApiError) as e:
                self.errors.add(getattr(e, "errcode", None) or type(e).__name__)
                self._ends.wait(_PAUSE_S)
                continue
            for room_id, event in told:
                self._take_in(room_id, event)
            self._note(self._map.shown(int(time.time() * 1000)))

    def _take_in(self, room_id: str, event: Any) -> None:
        if event["type"] == "m.room.member" and event["content"].get(REDACT_FLAG):
            self._map.redact_all(room_id, event["state_key"])
        self._map.take_in(room_id, event)


class SyncObserver(PollingObserver):
    """By /sync."""

    kind = "/sync"
    _since: str | None = None

    def _sync(self, client: Client) -> Told:
        answer = client.sync(self._since, _POLL_MS if self._since else 0, _FILTER)
        self._since = answer["next_batch"]
        told: Told = []
        for room_id, room in answer.get("rooms", {}).get("join", {}).items():
            events = [*room["timeline"]["events"], *room.get("state", {}).get("events", [])]
            events += room.get("msc4354_sticky", {}).get("events", [])
            told += [(room_id, event) for event in events]
        return told


class SlidingObserver(PollingObserver):
    """By sliding sync. Opened again, it is an app that was restarted: a new connection, which goes
    on from the extension's ``since``."""

    kind = "sliding sync"
    _answer: Any = None
    _since: str | None = None

    def open(self) -> None:
        self._answer = None
        super().open()

    def _sync(self, client: Client) -> Told:
        try:
            answer = client.sliding_sync(
                self._answer, since=self._since, timeout_ms=_POLL_MS, lists=_LISTS
            )
        except ApiError as e:
            if e.errcode == "M_UNKNOWN_POS":
                self._answer = None
            raise
        self._answer = answer
        extension = answer["extensions"][SLIDING_EXTENSION]
        self._since = extension.get("next_batch", self._since)
        told: Told = []
        for room_id, room in answer["rooms"].items():
            events = [*room.get("timeline", []), *room.get("required_state", [])]
            told += [(room_id, event) for event in events]
        for room_id, section in extension["rooms"].items():
            told += [(room_id, event) for event in section["events"]]
        return told


class SdkObserver(Observer):
    """matrix-js-sdk, with its own store. As its call sessions do, it leaves out who is not in the
    room."""

    kind = "matrix-js-sdk"

    def __init__(self, party: Party, user: Client, room_id: str) -> None:
        super().__init__(party, user)
        self._room_id = room_id
        self._app = JsSdk(user, room_id, on_line=self._take_in, log=False, contents=True)

    def open(self) -> None:
        self._opened.append(time.monotonic())
        self._app.open()

    def close(self) -> None:
        if len(self._closed) < len(self._opened):
            self._closed.append(time.monotonic())
            self._app.close()

    def watches(self, room_id: str) -> bool:
        return room_id == self._room_id

    def _take_in(self, line: Any) -> None:
        self._note(
            {
                (self._room_id, event["sender"], event["type"], event["content"][KEY_FIELD])
                for event in line["events"]
                if KEY_FIELD in event["content"] and len(event["content"]) > 1
            }
        )
