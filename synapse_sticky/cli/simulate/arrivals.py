"""Sticky events with the times at which a server takes them in, and files of them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

import attr

from synapse_sticky._core import MAX_STICKY_DURATION_MS, sticky_until_ms
from synapse_sticky.handlers.deferral.handler import NewStickyEvent
from synapse_sticky.index.key import key_of

MOST = 100_000
"""How many events are played at most. That takes some seconds, and some 200 MB."""

_NEVER_MS = 2**63 - 1


class UnusableError(Exception):
    """What was given cannot be played; says why, and what to do."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Arrival:
    """A sticky event that a server persists at this time, in ms since the epoch."""

    at_ms: int
    event: NewStickyEvent

    @property
    def server(self) -> str:
        """The sender's."""
        return self.event.sender.partition(":")[2]


def arrival(
    number: int,
    at_ms: int,
    room_id: str,
    sender: str,
    *,
    event_id: str | None = None,
    duration_ms: object = MAX_STICKY_DURATION_MS,
    origin_server_ts: object = None,
    key: int | None = None,
) -> Arrival | None:
    """An event as deferral sees it; None if it is not sticky when it arrives.

    Args:
        number: its place among those that arrive.
        event_id: made up of the number if None.
        origin_server_ts: ``at_ms`` if None.
        key: what it is the state of, hashed.
    """
    field = {"duration_ms": duration_ms}
    sent_ms = at_ms if origin_server_ts is None else origin_server_ts
    expires_at_ms = sticky_until_ms(field, sent_ms, at_ms)
    if expires_at_ms is None or expires_at_ms <= at_ms:
        return None
    event = NewStickyEvent(
        event_id or f"$event{number}",
        room_id,
        sender,
        expires_at_ms,
        number,
        key,
        sticky_until_ms(field, sent_ms, _NEVER_MS),
    )
    return Arrival(at_ms, event)


def in_order(found: Iterable[Arrival | None]) -> list[Arrival]:
    """The sticky ones by the time of their arrival, each event once.

    Raises:
        UnusableError: there are none, or too many.
    """
    arrivals = {one.event.event_id: one for one in found if one is not None}
    if not arrivals:
        raise UnusableError("There is no sticky event in what was given, so nothing to play.")
    if len(arrivals) > MOST:
        raise UnusableError(f"These are more than {MOST} sticky events. Play fewer.")
    return sorted(arrivals.values(), key=lambda one: one.at_ms)


def read(lines: Iterable[str]) -> list[Arrival]:
    """What is in a file of one JSON object a line, as ``write`` makes it.

    ``at_ms``, ``room_id`` and ``sender`` are needed. ``event_id``, ``duration_ms`` (an hour),
    ``origin_server_ts`` (``at_ms``), and ``key`` (a string or a hash; none) are not.

    Raises:
        UnusableError: a line is wrong, or there are none or too many.
    """
    found: list[Arrival | None] = []
    for number, line in enumerate(lines, 1):
        if number > MOST:
            raise UnusableError(f"The file has more than {MOST} lines. Play fewer.")
        if line.strip():
            found.append(_read_one(number, line))
    return in_order(found)


def _read_one(number: int, line: str) -> Arrival | None:
    try:
        values: Any = json.loads(line)
    except ValueError as e:
        raise UnusableError(f"Line {number} is no JSON: {e}") from None
    if not isinstance(values, Mapping):
        raise UnusableError(f"Line {number} is no JSON object.")
    for name, kind in (("at_ms", int), ("room_id", str), ("sender", str)):
        value = values.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UnusableError(f"Line {number} has no {name} that is of type {kind.__name__}.")
    if not 0 <= values["at_ms"] < 2**53:
        raise UnusableError(f"Line {number} has an at_ms that is no time in ms since 1970.")
    key = values.get("key")
    if isinstance(key, str):
        key = key_of("", {"sticky_key": key})
    if key is not None and (not isinstance(key, int) or not -(2**63) <= key < 2**63):
        raise UnusableError(f"Line {number} has a key that is neither a string nor a hash.")
    return arrival(
        number,
        values["at_ms"],
        values["room_id"],
        values["sender"],
        event_id=str(values["event_id"]) if "event_id" in values else None,
        duration_ms=values.get("duration_ms", MAX_STICKY_DURATION_MS),
        origin_server_ts=values.get("origin_server_ts"),
        key=key,
    )


def write(arrivals: Iterable[Arrival], file: TextIO) -> None:
    """Writes what ``read`` reads: the same events, without their content."""
    file.writelines(f"{line}\n" for line in _lines(arrivals))


def _lines(arrivals: Iterable[Arrival]) -> Iterator[str]:
    for one in arrivals:
        event = one.event
        # With these two it ends, and is as new, as it does and is.
        duration_ms = event.expires_at_ms - one.at_ms
        newness_ms = event.expires_at_ms if event.newness_ms is None else event.newness_ms
        values = {
            "at_ms": one.at_ms,
            "event_id": event.event_id,
            "room_id": event.room_id,
            "sender": event.sender,
            "origin_server_ts": newness_ms - duration_ms,
            "duration_ms": duration_ms,
            "key": event.key,
        }
        yield json.dumps(values)
