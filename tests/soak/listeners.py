"""Clients in the soak that sync all the time, and note what is in their sticky sections."""

import threading
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

import attr
import requests

from tests.lab import Client
from tests.lab.client import SLIDING_EXTENSION, WITHOUT_TIMELINE, ApiError


@attr.s(auto_attribs=True)
class Member:
    """A user, and the rooms it is joined to. Only those who stay hear of everything once."""

    server: int
    client: Client
    stays: bool
    rooms: set[int] = attr.Factory(set)


class Listener(ABC):
    """A client that syncs all the time.

    first: what the first section of each room had. Of a room that was just joined that is also what
        comes after the client's token, and may come once more (D4).
    """

    def __init__(self, member: Member) -> None:
        self.member = member
        self.told: Counter[str] = Counter()
        self.first: set[str] = set()
        self._rooms: set[str] = set()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    @abstractmethod
    def _sync(self, client: Client) -> dict[str, Any]:
        """Syncs once. Gives the sections of sticky events by room.

        Raises:
            requests.RequestException, ApiError: its server is down, or knows it no longer.
        """

    def _listen(self) -> None:
        # Its own connection: sessions are not for several threads.
        client = self.member.client.again()
        while not self._ends.is_set():
            try:
                sections = self._sync(client)
            except (requests.RequestException, ApiError):
                continue  # the same again
            for room_id, section in sections.items():
                event_ids = [event["event_id"] for event in section["events"]]
                self.told.update(event_ids)
                if event_ids and room_id not in self._rooms:
                    self._rooms.add(room_id)
                    self.first.update(event_ids)

    def end(self) -> None:
        self._ends.set()
        self._thread.join(60)


class SyncListener(Listener):
    """By /sync."""

    _since: str | None = None

    def _sync(self, client: Client) -> dict[str, Any]:
        answer = client.sync(self._since, 1_000 if self._since else 0, WITHOUT_TIMELINE)
        self._since = answer["next_batch"]
        rooms = answer.get("rooms", {}).get("join", {})
        return {
            room_id: section
            for room_id, room in rooms.items()
            if (section := room.get("msc4354_sticky")) is not None
        }


class SlidingListener(Listener):
    """By sliding sync, in an app that is restarted: it goes on from the extension's ``since``."""

    def __init__(self, member: Member) -> None:
        self._answer: Any = None
        self._since: str | None = None
        self._restarts = threading.Event()
        super().__init__(member)

    def restart(self) -> None:
        """The app begins a new connection; it has kept what it was told."""
        self._restarts.set()

    def _sync(self, client: Client) -> dict[str, Any]:
        if self._restarts.is_set():
            self._restarts.clear()
            self._answer = None
        try:
            self._answer = client.sliding_sync(self._answer, since=self._since, timeout_ms=1_000)
        except ApiError as e:
            if e.errcode == "M_UNKNOWN_POS":
                self._answer = None
            raise
        extension = self._answer["extensions"][SLIDING_EXTENSION]
        self._since = extension.get("next_batch", self._since)
        rooms: dict[str, Any] = extension["rooms"]
        return rooms
