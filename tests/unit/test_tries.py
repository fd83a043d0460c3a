"""Tries have an end, whoever makes them (H2)."""

import asyncio
import sqlite3
from typing import Any

import pytest

from synapse_sticky.handlers.staging.parking.passed_over import PassedOver
from synapse_sticky.handlers.staging.parking.pdus import Outcome, ParkedPdu
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.handlers.staging.parking.unknown import AFTER_MS
from synapse_sticky.homeserver.causes import Verdict
from synapse_sticky.homeserver.layout import migrate
from tests.unit.test_parking import ROOM, _Homeserver, parked

PASSES, REFUSED, UNKNOWN = Verdict.PASSES, Verdict.REFUSED, Verdict.UNKNOWN
FIRST_MS, SECOND_MS = AFTER_MS


class Clock:
    now_ms = 5

    def __call__(self) -> int:
        return self.now_ms


@pytest.mark.requirement("H2")
def test_what_is_refused_is_passed_over_for_some_time() -> None:
    clock = Clock()
    passed_over = PassedOver(clock)
    assert passed_over.failed("$1", REFUSED)
    assert "$1" in passed_over
    assert "$2" not in passed_over
    clock.now_ms += 3_600_000
    assert "$1" not in passed_over


@pytest.mark.requirement("H2", "L3")
def test_what_passes_is_never_passed_over() -> None:
    passed_over = PassedOver(Clock())
    assert not any(passed_over.failed("$1", PASSES) for _ in range(10))
    assert "$1" not in passed_over


@pytest.mark.requirement("H2", "L3")
def test_what_nobody_knows_is_passed_over_after_three_tries_at_a_distance() -> None:
    clock = Clock()
    passed_over = PassedOver(clock)
    # Many that come after it fail at once: that is one try.
    for delay_ms in (FIRST_MS, SECOND_MS):
        assert not any(passed_over.failed("$1", UNKNOWN) for _ in range(10))
        clock.now_ms += delay_ms - 1
        assert not passed_over.failed("$1", UNKNOWN)
        assert "$1" not in passed_over
        clock.now_ms += 1
    assert passed_over.failed("$1", UNKNOWN)
    assert "$1" in passed_over
    # Another one has tries of its own, and so has this one later.
    assert not passed_over.failed("$2", UNKNOWN)
    clock.now_ms += 3_600_000
    assert not passed_over.failed("$1", UNKNOWN)


@pytest.mark.requirement("H2")
def test_only_tries_for_a_reason_that_nobody_knows_count() -> None:
    homeserver: Any = _Homeserver()
    table = ParkedTable(homeserver)
    asyncio.run(migrate(homeserver, table))
    pdu = ParkedPdu("a.test", "$1", ROOM, "{}", "{}", ("$before",))

    def park(*counted_due_ms: int) -> tuple[Outcome, int | None]:
        outcome, _ = asyncio.run(table.park(pdu, 3_600_000, 1, counted_due_ms))
        return outcome, asyncio.run(table.ahead())[0]

    assert park() == (Outcome.PARKED, 1)
    assert park(20, 30) == (Outcome.STILL_PARKED, 20)
    assert park() == (Outcome.STILL_PARKED, 20)
    assert park(40, 50) == (Outcome.STILL_PARKED, 50)
    assert park(60, 70) == (Outcome.GIVEN_UP, None)
    assert parked(table, "a.test") == []
    # Sent once more, it is a new one.
    assert park(80, 90) == (Outcome.PARKED, 80)


@pytest.mark.requirement("E4")
def test_parked_pdus_of_the_layout_before_have_not_been_tried() -> None:
    homeserver: Any = _Homeserver()
    before = ParkedTable(homeserver)
    before.migrations = before.migrations[:1]
    asyncio.run(migrate(homeserver, before))
    table = ParkedTable(homeserver)

    def insert(txn: sqlite3.Cursor) -> None:
        columns = "origin, event_id, room_id, event_json, internal_metadata, prev_event_ids"
        txn.execute(
            f"INSERT INTO synapse_sticky_incomplete ({columns}, received_ts_ms, until_ms, due_ms)"
            f" VALUES ('a.test', '$1', '{ROOM}', '{{}}', '{{}}', '[]', 0, 9, 1)"
        )

    def forget_layout(txn: sqlite3.Cursor) -> None:
        txn.execute("DELETE FROM synapse_sticky_layouts")

    asyncio.run(homeserver.transact("insert", insert))
    asyncio.run(migrate(homeserver, table))
    # On what is there already, too.
    asyncio.run(homeserver.transact("forget", forget_layout))
    asyncio.run(migrate(homeserver, table))
    (found,) = asyncio.run(table.of_room("a.test", ROOM))
    assert (found.event_id, found.due_ms, found.tries) == ("$1", 1, 0)
