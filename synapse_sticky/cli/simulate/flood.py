"""A flood that options describe."""

from collections.abc import Iterator

import attr

from synapse_sticky.cli.simulate.arrivals import MOST, Arrival, UnusableError, arrival, in_order
from synapse_sticky.index.key import key_of

_BEGIN_MS = 1_700_000_000_000
"""Any time will do; the same each time, so that two runs can be compared."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Flood:
    """Servers send sticky events, each sender in its turn.

    per_second: how many events arrive a second, of all servers together.
    for_ms: for how long.
    servers, senders, rooms: how many take part; the senders are those of all servers.
    keys: how many sticky keys each sender uses in turn; 0 if its events have none that can be read,
        as encrypted ones.
    duration_ms: for how long each event is sticky.
    bystanders: how many servers with one well-behaved user each send one event every ten seconds.
    """

    per_second: float
    for_ms: int
    servers: int = 1
    senders: int = 1
    rooms: int = 1
    keys: int = 0
    duration_ms: int = 3_600_000
    bystanders: int = 1

    def arrivals(self) -> list[Arrival]:
        """The events.

        Raises:
            UnusableError: there are none, or too many.
        """
        count = int(self.per_second * self.for_ms / 1000)
        if count > MOST:
            raise UnusableError(f"These are {count} events. At most {MOST} can be played.")
        if self.senders < self.servers:
            raise UnusableError(f"{self.servers} servers need as many senders, or more.")
        return in_order([*self._of_flood(count), *self._of_bystanders()])

    def _of_flood(self, count: int) -> Iterator[Arrival | None]:
        for number in range(count):
            # How many times all senders have had their turn.
            turn, sender = divmod(number, self.senders)
            key = None
            if self.keys:
                key = key_of("", {"sticky_key": str(turn % self.keys)})
            yield arrival(
                number,
                _BEGIN_MS + int(number * 1000 / self.per_second),
                f"!room{turn % self.rooms}",
                f"@flood{sender}:flood{sender % self.servers}.example",
                duration_ms=self.duration_ms,
                key=key,
            )

    def _of_bystanders(self) -> Iterator[Arrival | None]:
        for bystander in range(self.bystanders):
            for number, after_ms in enumerate(range(5_000, self.for_ms, 10_000)):
                yield arrival(
                    number,
                    _BEGIN_MS + after_ms,
                    f"!room{number % self.rooms}",
                    f"@user:bystander{bystander}.example",
                    event_id=f"$bystander{bystander}-{number}",
                    duration_ms=self.duration_ms,
                )
