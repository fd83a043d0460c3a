"""What a flood in a room costs who arrives late there."""

import statistics
import time
from typing import Any

from benchmarks.harm import Case, Figures, Goal
from synapse_sticky.handlers.delivery.handler import DeliveryHandler
from synapse_sticky.handlers.delivery.pages import Question
from synapse_sticky.handlers.delivery.present import MOST_KEYS, MOST_OLDEST
from synapse_sticky.index import Position, StickyRow
from tests.lab import Lab
from tests.unit.process import Process
from tests.unit.test_limits import HOUR_MS, NOW_MS, done
from tests.unit.test_panics import Stream, following

_MEMBERS = 50
_EVENTS = 5_000
_ROUNDS = 15


def _row(number: int, sender: str, key: int | None) -> StickyRow:
    ends_ms = NOW_MS + HOUR_MS
    room = ("!room", f"${number}", sender)
    return StickyRow(number, "here", *room, ends_ms, True, key, ends_ms, 1_000)


def late_in_a_flood(lab: Lab, size: int) -> Figures:
    """Who is in the call sent it before the flood."""
    members = [_row(n, f"@member{n}:here", 1) for n in range(1, _MEMBERS + 1)]
    numbers = range(_MEMBERS + 1, _MEMBERS + 1 + _EVENTS * size)
    stream = Stream(*members, *(_row(n, "@flood:there", None) for n in numbers))
    process = Process()
    handler: Any = DeliveryHandler(process, following(process, stream), None)  # type: ignore[arg-type]
    question = Question({"!room"}, Position(0), Position(numbers[-1]), NOW_MS, 100)
    times_s = []
    for _ in range(_ROUNDS):
        start_s = time.process_time()
        by_room, _ = done(handler.answer(question))
        times_s.append(time.process_time() - start_s)
    found = {*by_room["!room"]}
    missing = {row.event_id for row in members} - found
    return {
        "members that are not in the first response": len(missing),
        "events of the flood in it": len(found) - _MEMBERS + len(missing),
        "CPU to choose it": statistics.median(times_s) * 1_000,
    }


CASES = (
    Case(
        "arrivals: somebody joins a call of 50 after a flood of 20,000 events",
        late_in_a_flood,
        {
            "members that are not in the first response": Goal(0),
            "events of the flood in it": Goal(MOST_KEYS + MOST_OLDEST),
            "CPU to choose it": Goal(10, growth=6, unit="ms"),
        },
    ),
)
