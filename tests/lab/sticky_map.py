"""The sticky events of a room as a client keeps them: the map in MSC4354's addendum."""

from typing import Any

from tests.lab.client import HOUR_MS, STICKY_FIELD, TTL

STICKY_KEY = "msc4354_sticky_key"


class StickyMap:
    """Of the events with one type, sender and sticky key the latest counts. Without a key each
    event counts.

    Times are milliseconds since the epoch, by the client's own clock.
    """

    def __init__(self) -> None:
        self._events: dict[str, tuple[Any, int]] = {}
        """By its ID each event that was added, and when it expires."""

    def add(self, event: Any, now_ms: int) -> None:
        """Takes an event of a response; nothing happens if it is not sticky, or not any more."""
        duration_ms = _duration_ms(event)
        if duration_ms is None:
            return
        since_ms = min(now_ms, event["origin_server_ts"])
        ttl_ms = event.get("unsigned", {}).get(TTL)
        expires_at_ms = since_ms + duration_ms if ttl_ms is None else now_ms + ttl_ms
        self._events[event["event_id"]] = (event, expires_at_ms)

    def redact(self, event_id: str) -> None:
        """The event is gone. If it was the latest of its key, the one before it counts again."""
        self._events.pop(event_id, None)

    def current(self, now_ms: int) -> list[Any]:
        """The events that count now."""
        for event_id, (_, expires_at_ms) in [*self._events.items()]:
            if expires_at_ms <= now_ms:
                self.redact(event_id)
        latest: dict[tuple[str, ...], Any] = {}
        for event, _ in self._events.values():
            latest[_key(event)] = max(event, latest.get(_key(event), event), key=_time)
        return [*latest.values()]


def _duration_ms(event: Any) -> int | None:
    sticky = event.get(STICKY_FIELD)
    return None if sticky is None else min(sticky["duration_ms"], HOUR_MS)


def _key(event: Any) -> tuple[str, ...]:
    key = event["content"].get(STICKY_KEY)
    return (event["event_id"],) if key is None else (event["type"], event["sender"], key)


def _time(event: Any) -> tuple[int, str]:
    """What makes one event later than another: never its arrival."""
    return event["origin_server_ts"] + (_duration_ms(event) or 0), event["event_id"]
