"""What is parked is counted by its reason, and whatever gives up its place is counted, too (E3)."""

import asyncio
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from synapse_sticky import metrics
from synapse_sticky.handlers.staging.parking import places
from synapse_sticky.handlers.staging.parking.handler import ParkingHandler
from synapse_sticky.handlers.staging.parking.pdus import ParkedPdu
from synapse_sticky.handlers.staging.parking.reasons import LONGEST, Reason, name_of
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.handlers.staging.pdu import StagedPdu
from synapse_sticky.homeserver.causes import Verdict
from synapse_sticky.homeserver.layout import migrate
from tests.unit.staging import CountingStore, prepared
from tests.unit.test_causes import of_postgres
from tests.unit.test_limits_in_synapse import done
from tests.unit.test_parking import ROOM, handler_of, park, parked
from tests.unit.test_parking_failures import Waiting, loaded

pytestmark = pytest.mark.requirement("E3")


def counted(name: str, server_name: str = "here", **labels: str) -> float:
    labels = {"server_name": server_name, **labels}
    return REGISTRY.get_sample_value(f"synapse_sticky_{name}", labels) or 0


def dropped(reason: str, server_name: str = "here") -> float:
    return counted("parked_dropped_total", server_name, reason=reason)


@pytest.fixture
def homeserver() -> Any:
    return Waiting()


@pytest.fixture
def table(homeserver: Any) -> ParkedTable:
    made = ParkedTable(homeserver)
    asyncio.run(migrate(homeserver, made))
    return made


def fail(
    homeserver: Any, handler: ParkingHandler, origin: str, event_id: str, why: str = "a reason"
) -> None:
    pdu = ParkedPdu(origin, event_id, ROOM, "{}", "{}", ("$before",))
    staged = StagedPdu(event_id, {"duration_ms": 3_600_000}, homeserver.now, homeserver.now)
    asyncio.run(handler.fail(pdu, staged, why, Verdict.PASSES))


# Reasons


def test_each_reason_has_a_name() -> None:
    assert {reason.name.lower() for reason in Reason} == {*metrics.REASONS}
    for reason in Reason:
        assert name_of(str(reason)) == reason.name.lower()
        # What is behind it, as the database says it, changes nothing; nor does the part of it that
        # the table is asked for.
        cause = f"{reason}: the disk is full ' % \\ {'x' * 300}"
        assert name_of(cause[:LONGEST]) == name_of(cause) == reason.name.lower()
    assert name_of(None) == name_of("") == name_of("words of another version") == "unknown"


@pytest.mark.requirement("E3", "E4")
def test_what_is_parked_now_is_shown_by_its_reason(homeserver: Any, table: ParkedTable) -> None:
    handler = loaded(homeserver, table)
    for number, reason in enumerate(Reason):
        for copy in range(number + 1):
            why = f"{reason}: {copy}"
            fail(homeserver, handler, f"{number}.test", f"${number}{copy}", why)
    # One of another version.
    park(table, "a.test", "$old")
    homeserver.in_room = False
    asyncio.run(handler._trying.try_due())
    shown = {reason: counted("parked_now", reason=reason) for reason in metrics.REASONS}
    expected = {reason.name.lower(): number + 1 for number, reason in enumerate(Reason)}
    assert shown == expected | {"unknown": expected["unknown"] + 1}
    # Another process, after a restart, finds the same; and what is there no more is not shown.
    asyncio.run(table.postpone("0.test", ROOM, 0))
    homeserver.now = 3_600_000
    other = loaded(homeserver, table)
    asyncio.run(other._trying.try_due())
    assert {counted("parked_now", reason=reason) for reason in metrics.REASONS} == {0}


@pytest.mark.requirement("H3")
def test_reasons_are_counted_without_a_look_at_the_pdus(
    homeserver: Any, table: ParkedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[str] = []

    async def transact(what: str, function: Any) -> Any:
        cursor = homeserver._connection.cursor()

        class Explaining:
            fetchall = cursor.fetchall

            def execute(self, sql: str, args: Any = ()) -> None:
                cursor.execute(f"EXPLAIN QUERY PLAN {sql}", args)
                plans.extend(detail for *_, detail in cursor.fetchall())
                cursor.execute(sql, args)

        return function(Explaining())

    monkeypatch.setattr(homeserver, "transact", transact)
    assert asyncio.run(table.ahead()) == (None, {})
    looks = [plan for plan in plans if "synapse_sticky_incomplete" in plan]
    assert len(looks) == 2, plans
    assert all("COVERING INDEX" in plan for plan in looks), looks


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def test_each_database_counts_them(kind: str, tmp_path: Path) -> None:
    with prepared(kind, tmp_path) as hs, closing(CountingStore(hs)) as store:
        table = ParkedTable(store)
        done(table.prepare())
        store.sql("DELETE FROM synapse_sticky_incomplete")
        now_ms = store.now_ms()
        for number, why in enumerate([*map(str, Reason), f"{Reason.DATABASE}: it is full", None]):
            pdu = ParkedPdu("there", f"${number}", ROOM, "{}", "{}", ("$before",))
            done(table.park(pdu, now_ms + 3_600_000, now_ms + number, why=why))
        due_ms, counts = done(table.ahead())
        assert due_ms == now_ms
        assert counts == dict.fromkeys(metrics.REASONS, 1) | {"database": 2, "unknown": 2}
        assert done(table.postpone("there", ROOM, 0)) == 0
        store.now += 3_600_000
        assert done(table.postpone("there", ROOM, 0)) == len(Reason) + 2
        assert done(table.ahead()) == (None, {})


# What gives up its place


@pytest.mark.requirement("L3", "L6")
def test_an_evicted_pdu_has_a_line_and_is_counted(
    homeserver: Any,
    table: ParkedTable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(places, "MOST", 3)
    handler, before = loaded(homeserver, table), dropped("evicted")
    for homeserver.now in range(3):
        fail(homeserver, handler, "evil.test", f"$evil{homeserver.now}")
    with caplog.at_level(logging.INFO):
        fail(homeserver, handler, "good.test", "$good")
    assert parked(table, "evil.test") == ["$evil0", "$evil1"]
    assert dropped("evicted") == before + 1
    lost, kept = [record.getMessage() for record in caplog.records]
    assert lost.startswith(f"Dropping the sticky PDU $evil2 of evil.test in {ROOM}: ")
    assert kept == "Parked the sticky PDU $good: a reason"
    # Who has as many as any evicts nobody.
    fail(homeserver, handler, "good.test", "$better")
    assert dropped("evicted") == before + 1


def test_what_expires_as_it_is_put_off_is_counted(homeserver: Any, table: ParkedTable) -> None:
    handler, before = handler_of(homeserver, table), counted("parked_expired_total")
    park(table, "a.test", "$1", "$2")
    homeserver.now = 3_600_000
    homeserver.staging.fails_for = "$1"
    asyncio.run(handler._trying.try_due())
    assert parked(table, "a.test") == []
    assert counted("parked_expired_total") == before + 2


def test_what_expires_before_it_could_be_written_is_counted(
    homeserver: Any, table: ParkedTable
) -> None:
    handler, before = loaded(homeserver, table), counted("parked_expired_total")
    homeserver.error = of_postgres("53100")
    fail(homeserver, handler, "a.test", "$1")
    fail(homeserver, handler, "a.test", "$2")
    homeserver.error, homeserver.now = None, 3_600_000
    for _ in range(3):
        homeserver.go_on()
    assert counted("parked_expired_total") == before + 2
    # One that has expired as it comes was never here.
    pdu = ParkedPdu("a.test", "$3", ROOM, "{}", "{}", ())
    staged = StagedPdu("$3", {"duration_ms": 5}, 0, 0)
    asyncio.run(handler.fail(pdu, staged, "a reason", Verdict.PASSES))
    assert counted("parked_expired_total") == before + 2
