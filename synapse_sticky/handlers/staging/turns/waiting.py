"""Whose turn it is, of the origins that have PDUs staged for a room (D7).

Pure: no clock, no database. What changes of an origin costs the same however many there are.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import attr

Turn = tuple[int, int]
"""When an origin had its last turn, in ms since the epoch, and the number of that turn."""

Place = tuple[int, int, str]
"""Of a PDU among those of its origin: when it was received, its depth, its ID."""

_NEVER: Turn = (0, 0)

_Key = tuple[int, int, Place]


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Persisted:
    """An event of the room: its place in the stream, its sender's server, and when it was
    persisted, in ms since the epoch."""

    stream_ordering: int
    server: str
    at_ms: int


class WaitingOrigins:
    """The origins of a room, by who has waited longest.

    learnt_up_to: the place in the stream of the last event that turns were learnt from.
    """

    def __init__(self) -> None:
        self._turns: dict[str, Turn] = {}
        self._number = 0
        self._now_ms = 0
        self.learnt_up_to = 0
        self._first: dict[str, Place] = {}
        # In the order of the keys. As time goes on a key may be greater than it is here.
        self._order: list[tuple[_Key, str]] = []
        self._keys: dict[str, _Key] = {}

    def __len__(self) -> int:
        return len(self._first)

    def set_first(self, origin: str, first: Place | None) -> None:
        """Where the first PDU of the origin is; None if it has none any more."""
        if first == self._first.get(origin):
            return
        if first is None:
            del self._first[origin]
        else:
            self._first[origin] = first
        self._put(origin)

    def had_turn(self, origin: str, at_ms: int) -> None:
        """The origin goes behind all others that wait then."""
        self._number += 1
        self._turns[origin] = (max(at_ms, self._turns.get(origin, _NEVER)[0]), self._number)
        self._put(origin)
        # Of those who have nothing staged; they would be the first anyway when they have.
        if len(self._turns) > 2 * len(self._first) + 100:
            self._turns = {o: turn for o, turn in self._turns.items() if o in self._first}

    def learn(self, persisted: Iterable[Persisted], now_ms: int) -> None:
        """Events that were persisted, by this process or another, in the order of the stream."""
        for event in persisted:
            self.learnt_up_to = max(self.learnt_up_to, event.stream_ordering)
            at_ms = min(event.at_ms, now_ms)
            if at_ms > self._turns.get(event.server, _NEVER)[0]:
                self.had_turn(event.server, at_ms)

    def set_time(self, now_ms: int) -> None:
        """A clock that was set back keeps no origin from its turns."""
        is_set_back = now_ms < self._now_ms
        self._now_ms = now_ms
        if is_set_back:
            self._turns = {o: (min(ms, now_ms), n) for o, (ms, n) in self._turns.items()}
            for origin in self._first:
                self._put(origin)

    def in_order(self) -> Iterator[str]:
        """Those that have waited longest first. Nothing else may change meanwhile."""
        at = 0
        while at < len(self._order):
            key, origin = self._order[at]
            if key != self._key(origin):
                self._put(origin)
                continue
            yield origin
            at += 1

    def _key(self, origin: str) -> _Key:
        first = self._first[origin]
        received_ms = min(first[0], self._now_ms)
        at_ms, number = self._turns.get(origin, _NEVER)
        # An origin that comes now does not go in front of those that wait already.
        return max(at_ms, received_ms), number, first

    def _put(self, origin: str) -> None:
        if (before := self._keys.pop(origin, None)) is not None:
            del self._order[bisect_left(self._order, (before, origin))]
        if origin in self._first:
            self._keys[origin] = self._key(origin)
            insort(self._order, (self._keys[origin], origin))
