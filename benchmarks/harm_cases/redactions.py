"""What redactions cost the syncs of those who would not get the redacted events.

The module's own part is measured in this process. It is compared with what a homeserver takes for
a whole /sync that brings one new sticky event.
"""

import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred

from benchmarks.harm import Case, Figures, Goal
from benchmarks.receipt import cpu_s
from synapse_sticky.handlers.delivery.handler import DeliveryHandler
from synapse_sticky.handlers.delivery.pages import Question
from synapse_sticky.index import Position, StickyRow
from tests.integration.rooms import NO_LIMITS, room_of
from tests.lab import Lab
from tests.unit.process import Process
from tests.unit.test_limits import NOW_MS, done
from tests.unit.test_panics import Stream, following, row

_ROOMS = 100
_EVENTS = 20_000
_IN_DOUBT = 50
_SYNCS = 1_000
_ROUNDS = 15
_BY_HAND = 60


class _Patient(Process):
    """A process whose jobs take their time."""

    def in_background(
        self, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> None:
        ensureDeferred(function(*args))  # type: ignore[arg-type]


class _Slow(Stream):
    """A database that answers when it is told to."""

    changed: Callable[[str], None]

    def __init__(self, *rows: StickyRow) -> None:
        super().__init__(*rows)
        self.asked: list[Deferred[None]] = []

    async def rows_at(self, stream_ids: Mapping[str, int]) -> list[StickyRow]:
        self.asked.append(Deferred())
        await self.asked[-1]
        return await super().rows_at(stream_ids)

    def on_event_changed(self, callback: Any) -> None:
        self.changed = callback


def _sync_s(lab: Lab) -> float:
    """The CPU time that a homeserver takes for a sync with a new sticky event, in seconds."""
    (server,) = lab.servers({"config": NO_LIMITS})
    alice = server.user()
    room_id = room_of(alice, via=server)
    since = alice.sync()["next_batch"]
    used_s = 0.0
    for _ in range(_BY_HAND):
        alice.send_sticky(room_id)
        before_s = cpu_s(server)
        since = alice.sync(since)["next_batch"]
        used_s += cpu_s(server) - before_s
    return used_s / _BY_HAND


def beside_redactions(lab: Lab, size: int) -> Figures:
    """So many events of one room are being looked up, while users of other rooms sync."""
    sync_s = _sync_s(lab)
    stream = _Slow(*(row(n, f"!{n % _ROOMS}") for n in range(1, _EVENTS + 1)))
    patient = _Patient()
    handler: Any = DeliveryHandler(patient, following(patient, stream), None)  # type: ignore[arg-type]
    rooms = frozenset(f"!{n}" for n in range(1, 51))
    question = Question(rooms, Position(_EVENTS - 60, {}), Position(_EVENTS, {}), NOW_MS, 100)
    redacted = [f"${n}" for n in range(_ROOMS, _EVENTS, _ROOMS)][: _IN_DOUBT * size]
    to_database = 0

    def syncs() -> float:
        nonlocal to_database
        start_s = time.process_time()
        for _ in range(_SYNCS):
            to_database += done(handler.answer(question)) is None
        return time.process_time() - start_s

    more_s = []
    for _ in range(_ROUNDS):
        without_s = syncs()
        for event_id in redacted:
            stream.changed(event_id)
        with_s = syncs()
        more_s.append((with_s - without_s) / _SYNCS)
        while stream.asked:
            stream.asked.pop().callback(None)
    return {
        "syncs that ask the database": to_database,
        "CPU of a sync, by what it is without": 1 + statistics.median(more_s) / sync_s,
    }


CASES = (
    Case(
        "redactions: 200 events of a room are in doubt, users of other rooms sync",
        beside_redactions,
        {
            "syncs that ask the database": Goal(0),
            "CPU of a sync, by what it is without": Goal(1.05, growth=1.5),
        },
    ),
)
