"""What a flood in a room costs who arrives late there."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.harm import Case, Figures, Goal
from synapse_sticky.handlers.delivery.handler import DeliveryHandler
from synapse_sticky.handlers.delivery.pages import Question
from synapse_sticky.handlers.delivery.present import MOST_EVENTS, MOST_KEYS, MOST_OLDEST
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


def _choose(rows: Sequence[StickyRow]) -> tuple[set[str], float]:
    """What who arrives late is given first of the room, and the CPU that this takes, in ms."""
    process = Process()
    follower = following(process, Stream(*rows))
    handler: Any = DeliveryHandler(process, follower, None)  # type: ignore[arg-type]
    question = Question({"!room"}, Position(0), Position(len(rows)), NOW_MS, 100)
    times_s = []
    for _ in range(_ROUNDS):
        start_s = time.process_time()
        by_room, _ = done(handler.answer(question))
        times_s.append(time.process_time() - start_s)
    return {*by_room["!room"]}, statistics.median(times_s) * 1_000


def late_in_a_flood(lab: Lab, size: int) -> Figures:
    """Who is in the call sent it before the flood."""
    members = [_row(n, f"@member{n}:here", 1) for n in range(1, _MEMBERS + 1)]
    numbers = range(_MEMBERS + 1, _MEMBERS + 1 + _EVENTS * size)
    flood = [_row(n, "@flood:there", None) for n in numbers]
    found, cpu_ms = _choose(members + flood)
    missing = {row.event_id for row in members} - found
    return {
        "members that are not in the first response": len(missing),
        "events of the flood in it": len(found) - _MEMBERS + len(missing),
        "CPU to choose it": cpu_ms,
    }


def many_keys(lab: Lab, size: int) -> Figures:
    """No event supersedes another, and no sender has two: all of them may be the present."""
    numbers = range(1, 1 + _EVENTS * size)
    found, cpu_ms = _choose([_row(n, f"@user{n}:server{n % 97}", n) for n in numbers])
    return {"events in the first response": len(found), "CPU to choose it": cpu_ms}


CASES = (
    Case(
        "arrivals: somebody joins a room with 20,000 events, each with its own sender and key",
        many_keys,
        {
            "events in the first response": Goal(MOST_EVENTS),
            "CPU to choose it": Goal(10, growth=6, unit="ms"),
        },
    ),
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
