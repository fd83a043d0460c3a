"""Those who take part in the call, each with a client that comes, stays and goes."""

import itertools
import time
from typing import Any
from urllib.parse import quote

import requests

from benchmarks.call.causes import Party
from benchmarks.call.spans import Change
from benchmarks.call.sticky_map import KEY_FIELD, Key
from tests.lab import Client
from tests.lab.client import HOUR_MS, STICKY_PARAMETER, ApiError

KIND = "org.example.call"
_DELAY_PARAMETER = "org.matrix.msc4140.delay"
_DELAYED = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events"
_PAUSE_S = 0.25

_transactions = itertools.count()


class Participant:
    """A key of a user's device in a room. Whatever it does is for one thread at a time."""

    def __init__(self, party: Party, client: Client, name: str) -> None:
        self.party = party
        self._client = client
        self._name = name
        self._delay_id: str | None = None
        self._delay_ms = 0
        self._due: tuple[float, float] = (0.0, 0.0)
        self._is_out = False
        self.changes: list[Change] = []

    @property
    def key(self) -> Key:
        return (self.party.room, self._client.user_id, KIND, self._name)

    @property
    def user_id(self) -> str:
        return self._client.user_id

    @property
    def is_there(self) -> bool:
        """Has it come, and not gone since?"""
        return bool(self.changes) and self.changes[-1].comes

    def come(self) -> None:
        """Joins the call."""
        asked_s, known_s = self._put({"application": "m.call"})
        if not self._is_out:
            self.changes.append(Change(comes=True, asked_s=asked_s, known_s=known_s))

    def renew(self) -> None:
        """Says once more that it is there."""
        self._put({"application": "m.call"})

    def go(self) -> None:
        """Leaves the call."""
        asked_s, known_s = self._put({})
        self.changes.append(Change(comes=False, asked_s=asked_s, known_s=known_s))

    def leave_if_silent_for(self, delay_ms: int) -> None:
        """Has the server leave for it, unless it is heard of within so long (MSC4140)."""
        self._delay_ms = delay_ms
        answer = self._send({}, {_DELAY_PARAMETER: delay_ms})[2]
        self._delay_id = answer["delay_id"]

    def is_alive(self) -> None:
        """The delay of its leave begins anew."""
        path = f"{_DELAYED}/{quote(str(self._delay_id))}/restart"
        asked_s, known_s, _ = self._patiently("POST", path, {})
        self._due = (asked_s + self._delay_ms / 1000, known_s + self._delay_ms / 1000)

    def crash(self) -> None:
        """It is heard of for the last time, and its leave becomes due."""
        self.is_alive()
        self.changes.append(Change(comes=False, asked_s=self._due[0], known_s=self._due[1]))

    def gone(self, asked_s: float, known_s: float) -> None:
        """Somebody else took it out for good, with this request. Its own server may not know that
        yet."""
        self._is_out = True
        self.changes.append(Change(comes=False, asked_s=asked_s, known_s=known_s))

    def _put(self, content: dict[str, Any]) -> tuple[float, float]:
        return self._send(content, {})[:2]

    def _send(self, content: dict[str, Any], query: dict[str, Any]) -> tuple[float, float, Any]:
        path = f"rooms/{quote(self.party.room)}/send/{KIND}/call-{next(_transactions)}"
        query = {STICKY_PARAMETER: HOUR_MS, **query}
        return self._patiently("PUT", path, {KEY_FIELD: self._name, **content}, **query)

    def _patiently(
        self, method: str, path: str, body: Any, **query: Any
    ) -> tuple[float, float, Any]:
        """As a client does: again, if its server is down or asks it to wait. When it asked first
        after it was last refused, when it had the answer, and the answer."""
        asked_s = time.monotonic()
        while True:
            try:
                answer = self._client.request(method, path, body, **query)
            except requests.RequestException:
                time.sleep(_PAUSE_S)
            except ApiError as e:
                if e.status == requests.codes.too_many:
                    time.sleep(e.body.get("retry_after_ms", 1_000) / 1000)
                    asked_s = time.monotonic()
                elif e.status >= 500:  # its own fault
                    time.sleep(_PAUSE_S)
                else:
                    raise
            else:
                return asked_s, time.monotonic(), answer
