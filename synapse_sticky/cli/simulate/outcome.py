"""What became of each event that was played, and the sums of it."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

import attr

from synapse_sticky.cli.simulate.arrivals import Arrival

_MOST_SERVERS = 8
"""So many servers are told of, those that wait for longest."""


class Fate(Enum):
    """What became of an event."""

    NOW = "now"
    """It was delivered when it arrived."""
    LATER = "later"
    """It was deferred, and delivered in its turn."""
    EXPIRED = "expired"
    """It was deferred, and expired before its turn."""
    REFUSED = "refused"
    """Too many events of its server waited, so its transaction was answered 429. Its server sends
    it again until there is room, which is not played."""


@attr.s(auto_attribs=True, slots=True)
class Played:
    """An event and what became of it.

    limit: the option whose limit it was past; empty if none.
    delivered_ms: when clients got it, in ms since the epoch; None if they did not.
    """

    arrival: Arrival
    fate: Fate
    limit: str
    delivered_ms: int | None

    @property
    def delay_ms(self) -> int:
        """How long clients had to wait for it; 0 if they did not get it."""
        return 0 if self.delivered_ms is None else self.delivered_ms - self.arrival.at_ms


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Sums:
    """How many events met which fate, and how long clients waited for those that they got.

    by_fate, by_limit: how many events, by the names of the fates, and of the limits.
    median_ms, p95_ms, longest_ms: of the delays of what was delivered.
    """

    events: int
    by_fate: Mapping[str, int]
    by_limit: Mapping[str, int]
    median_ms: int
    p95_ms: int
    longest_ms: int


class Outcome:
    """What became of all events.

    order: the IDs of those that were delivered, in the order in which clients got them.
    """

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        self.begin_ms = arrivals[0].at_ms
        self.events: dict[str, Played] = {}
        self.order: list[str] = []

    def arrived(self, arrival: Arrival, fate: Fate, limit: str) -> None:
        """An event has arrived. One that is deferred is delivered by ``released``."""
        is_now = fate is Fate.NOW
        event_id = arrival.event.event_id
        self.events[event_id] = Played(arrival, fate, limit, arrival.at_ms if is_now else None)
        if is_now:
            self.order.append(event_id)

    def released(self, event_id: str, at_ms: int) -> None:
        """A deferred event was delivered at this time."""
        self.events[event_id].delivered_ms = at_ms
        self.order.append(event_id)

    def expired(self, event_id: str) -> None:
        """A deferred event has expired."""
        self.events[event_id].fate = Fate.EXPIRED

    def sums(self) -> Sums:
        """Of all events."""
        return _sums(self.events.values())

    def by_server(self) -> dict[str, Sums]:
        """Of the servers whose events wait for longest, and of the one that waits least."""
        events: dict[str, list[Played]] = {}
        for played in self.events.values():
            events.setdefault(played.arrival.server, []).append(played)
        sums = {server: _sums(of_server) for server, of_server in events.items()}
        slowest = sorted(sums, key=lambda server: (-sums[server].longest_ms, server))
        told = slowest[: _MOST_SERVERS - 1] + slowest[_MOST_SERVERS - 1 :][-1:]
        return {server: sums[server] for server in told}

    def last_ms(self) -> int:
        """When the last event was delivered, in ms since the first arrived."""
        times = [p.delivered_ms for p in self.events.values() if p.delivered_ms is not None]
        return max(times, default=self.begin_ms) - self.begin_ms

    def most_waiting(self) -> int:
        """How many events waited at the same time at most."""
        changes: list[tuple[int, int]] = []
        for played in self.events.values():
            if played.fate in (Fate.LATER, Fate.EXPIRED):
                event = played.arrival.event
                changes.append((played.arrival.at_ms, 1))
                changes.append((played.delivered_ms or event.expires_at_ms, -1))
        waiting = most = 0
        for _, change in sorted(changes):
            waiting += change
            most = max(most, waiting)
        return most

    def as_dict(self) -> dict[str, object]:
        """For JSON: the sums, and each event in the order of arrival."""
        return {
            **attr.asdict(self.sums()),
            "last_delivered_ms": self.last_ms(),
            "most_waiting": self.most_waiting(),
            "by_server": {name: attr.asdict(sums) for name, sums in self.by_server().items()},
            "order": self.order,
            "each": [
                {
                    "event_id": event_id,
                    "sender": played.arrival.event.sender,
                    "room_id": played.arrival.event.room_id,
                    "arrived_ms": played.arrival.at_ms,
                    "fate": played.fate.value,
                    "limit": played.limit or None,
                    "delivered_ms": played.delivered_ms,
                }
                for event_id, played in self.events.items()
            ],
        }


def _sums(events: Iterable[Played]) -> Sums:
    events = list(events)
    delays = sorted(p.delay_ms for p in events if p.delivered_ms is not None)
    return Sums(
        len(events),
        Counter(p.fate.value for p in events),
        Counter(p.limit for p in events if p.limit),
        int(statistics.median(delays)) if delays else 0,
        delays[(len(delays) * 95 - 1) // 100] if delays else 0,
        delays[-1] if delays else 0,
    )
