"""A client that syncs on and on, as real ones do, whatever happens to its server meanwhile."""

import json
import threading
from collections.abc import Callable
from typing import Any

import requests

from tests.lab.client import (
    WITHOUT_TIMELINE,
    ApiError,
    Client,
    sliding_sticky_events,
    sticky_events,
)

_POLL_MS = 1_000
_PAUSE_S = 0.1


class Watcher:
    """Syncs in a thread, from where it was; asks again from there if there was no answer. Close it.

    Args:
        sliding: by sliding sync, not by /sync.
        taking: is given each answer, in the thread.
        body: each request of sliding sync has this as well (``Client.sliding_sync``).
    """

    def __init__(
        self,
        user: Client,
        *,
        sliding: bool = False,
        taking: Callable[[Any], object] = lambda answer: None,
        **body: Any,
    ) -> None:
        self._user = user.again()
        self._sliding = sliding
        self._taking = taking
        self._body = body
        self.answers: list[Any] = []
        self._over = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def seen(self, room_id: str) -> list[str]:
        """The IDs of the room's sticky events, as often as they were given, in their order.

        Raises:
            ApiError: the server answered with an error that a client can do nothing about.
        """
        found: Callable[[Any, str], list[str]] = (
            sliding_sticky_events if self._sliding else sticky_events
        )
        self.check()
        return [event_id for answer in [*self.answers] for event_id in found(answer, room_id)]

    def check(self) -> None:
        """Raises what ``seen`` raises."""
        if self._error is not None:
            raise self._error

    def text(self) -> str:
        """All that it was told."""
        return json.dumps(self.answers)

    def close(self) -> None:
        """Ends it."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        answer = None
        while not self._over.is_set():
            try:
                answer = self._next(answer)
            except Exception as e:  # noqa: BLE001  # told to whoever asks what was seen
                if isinstance(e, requests.RequestException) or (
                    isinstance(e, ApiError) and e.status >= 500
                ):
                    self._over.wait(_PAUSE_S)
                else:
                    self._error = e
                    return
            else:
                self.answers.append(answer)
                self._taking(answer)

    def _next(self, answer: Any) -> Any:
        if self._sliding:
            return self._user.sliding_sync(answer, timeout_ms=_POLL_MS, **self._body)
        since = None if answer is None else answer["next_batch"]
        return self._user.sync(since, _POLL_MS, WITHOUT_TIMELINE)
