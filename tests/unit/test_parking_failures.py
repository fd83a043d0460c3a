"""PDUs that cannot be persisted: what becomes of them (L3, H1, H2).

No clock advances by itself here: whatever waited would never come to an end.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from synapse.api.errors import FederationError, PartialStateConflictError, SynapseError
from synapse.api.room_versions import RoomVersions
from synapse.events import make_event_from_dict

from synapse_sticky.handlers.staging.parking import synapse, unknown, writing
from synapse_sticky.handlers.staging.parking.handler import ParkingHandler
from synapse_sticky.handlers.staging.parking.pdus import ParkedPdu
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.handlers.staging.pdu import StagedPdu
from synapse_sticky.homeserver.causes import Verdict
from synapse_sticky.homeserver.layout import migrate
from tests.unit.test_causes import ErrorOfPostgres, of_postgres, staging_of
from tests.unit.test_parking import ROOM, _Homeserver, handler_of, parked

PASSES, REFUSED, UNKNOWN = Verdict.PASSES, Verdict.REFUSED, Verdict.UNKNOWN
ORIGIN = "a.test"


# What the function in the place of Synapse's does.


def sticky_pdu() -> Any:
    content: dict[str, Any] = {
        "type": "m.test",
        "room_id": ROOM,
        "sender": "@user:a.test",
        "origin_server_ts": 1,
        "content": {},
        "depth": 1,
        "hashes": {},
        "signatures": {},
        "prev_events": ["$before"],
        "auth_events": ["$create"],
        synapse._FIELD: {"duration_ms": 3_600_000},
    }
    return make_event_from_dict(content, RoomVersions.V10)


def step(coroutine: Awaitable[Any]) -> None:
    """Runs it to its end, which it must come to by itself."""
    with pytest.raises(StopIteration):
        coroutine.__await__().send(None)


Failed = list[tuple[str, Verdict]]


def received(
    error: Exception,
    *,
    lacks_prev_events: bool = False,
    lacks_auth_events: bool = False,
    pulled: int = 0,
) -> tuple[Failed, int]:
    """What is said of a PDU that fails so; how often it was tried.

    Args:
        pulled: how often it comes before another, in place of being received itself.
    """
    tries = 0
    failed: Failed = []

    async def original(*_: Any, **__: Any) -> None:
        nonlocal tries
        tries += 1
        raise error

    async def fail(pdu: Any, staged: Any, why: str, verdict: Verdict) -> None:
        failed.append((why, verdict))

    async def there(event_ids: Any) -> set[str]:
        return set() if lacks_prev_events else set(event_ids)

    async def existing(event_ids: Any) -> set[str]:
        return set() if lacks_auth_events else set(event_ids)

    async def in_room(*_: Any) -> bool:
        return True

    staging: Any = staging_of(on_receive_pdu=original, _process_pulled_event=original)
    staging.persisted = there
    staging._store.is_host_joined = in_room
    staging.existing = existing
    staging.park_by(fail)
    for _ in range(pulled):
        step(staging._handler._process_pulled_event(ORIGIN, sticky_pdu(), backfilled=False))
    if pulled:
        return failed, tries

    async def receive() -> None:
        with pytest.raises(type(error)):
            await staging._handler.on_receive_pdu(ORIGIN, sticky_pdu())

    step(receive())
    return failed, tries


@pytest.mark.requirement("L3", "H1")
@pytest.mark.parametrize("lacks_prev_events", [False, True])
@pytest.mark.parametrize(
    ("sqlstate", "verdict"), [("53200", PASSES), ("57014", UNKNOWN), ("54000", REFUSED)]
)
def test_there_is_one_attempt(sqlstate: str, verdict: Verdict, lacks_prev_events: bool) -> None:
    error = of_postgres(sqlstate)
    failed, tries = received(error, lacks_prev_events=lacks_prev_events)
    assert tries == 1
    ((why, said),) = failed
    if lacks_prev_events and verdict is not PASSES:
        # It is one of these that failed.
        assert (why, said) == ("its prev_events cannot be fetched", PASSES)
    else:
        assert said is verdict
        assert sqlstate in why


@pytest.mark.requirement("L3", "H7")
@pytest.mark.parametrize("leaves", [False, True])
def test_what_comes_as_this_server_leaves_the_room_is_kept(leaves: bool) -> None:
    """It may come back while the PDU is sticky, and whoever sent it was told that it is here."""
    answers = [True, not leaves]
    failed: Failed = []

    async def original(*_: Any, **__: Any) -> None:
        """Synapse ditches it without an error if this server is not in the room."""

    async def fail(pdu: Any, staged: Any, why: str, verdict: Verdict) -> None:
        failed.append((why, verdict))
        assert pdu.is_outside

    async def in_room(*_: Any) -> bool:
        return answers.pop(0)

    staging: Any = staging_of(on_receive_pdu=original, _process_pulled_event=original)
    staging._store.is_host_joined = in_room
    staging.park_by(fail)
    step(staging._handler.on_receive_pdu(ORIGIN, sticky_pdu()))
    assert failed == ([("this server is not in the room yet", PASSES)] if leaves else [])


@pytest.mark.requirement("L3")
def test_what_synapse_itself_refuses_is_not_kept() -> None:
    refusal = FederationError("ERROR", 403, "No", affected="$e")
    assert received(refusal) == ([], 1)
    assert received(refusal, lacks_prev_events=True)[0][0][1] is PASSES


@pytest.mark.requirement("L3")
def test_missing_auth_events_are_kept_for() -> None:
    """Synapse drops it as it drops one that it refuses; the server that has them may answer yet."""
    refusal = FederationError("ERROR", 403, "Auth events could not be found", affected="$e")
    for lacks_prev_events, missing in ((False, "auth_events"), (True, "prev_events")):
        ((why, verdict),), tries = received(
            refusal, lacks_prev_events=lacks_prev_events, lacks_auth_events=True
        )
        assert (why, verdict, tries) == (f"its {missing} cannot be fetched", PASSES, 1)


@pytest.mark.requirement("L3", "H7")
def test_the_state_becomes_whole_for_a_second_time() -> None:
    """Synapse itself tries only twice. With workers the persister's answer says as much."""
    conflict = PartialStateConflictError()
    answered = SynapseError(conflict.code, conflict.msg)
    for error in (conflict, answered):
        ((why, verdict),), tries = received(error)
        assert verdict is PASSES
        assert "whole" in why
        assert tries == 1


@pytest.mark.requirement("H1")
def test_what_comes_after_a_refused_event_does_not_fail_with_it() -> None:
    assert received(of_postgres("54000"), pulled=3) == ([], 1)
    for sqlstate in ("53200", "57014"):
        with pytest.raises(ErrorOfPostgres):
            received(of_postgres(sqlstate), pulled=1)


# What becomes of it.


class Waiting(_Homeserver):
    """Its database can be away. What is to be done later is done when it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.later: list[Callable[[], Awaitable[None]]] = []
        self.delays_ms: list[int] = []
        staging: Any = self.staging
        staging.verdict_of = staging_of().verdict_of
        staging.receives = False
        staging.begin_on_staged_pdus = lambda: None

    def in_background(self, what: str, function: Any, *args: Any) -> None:
        self.later.append(lambda: function(*args))

    def call_later(self, *call: Any) -> Any:
        delay_ms, what, function, *args = call
        if what == "park_retry":
            self.delays_ms.append(delay_ms)
            self.later.append(lambda: function(*args))
        return SimpleNamespace(active=lambda: False)

    async def transact(self, what: str, function: Any, *args: Any) -> Any:
        if self.error is not None:
            raise self.error
        return await super().transact(what, function, *args)

    def go_on(self) -> None:
        """Until nothing is left to be done now or after the present delays."""
        later, self.later = self.later, []
        for function in later:
            asyncio.run(function())  # type: ignore[arg-type]


@pytest.fixture
def homeserver() -> Any:
    return Waiting()


@pytest.fixture
def table(homeserver: Any) -> ParkedTable:
    made = ParkedTable(homeserver)
    asyncio.run(migrate(homeserver, made))
    return made


@pytest.fixture
def handler(homeserver: Any, table: ParkedTable) -> ParkingHandler:
    return loaded(homeserver, table)


def loaded(homeserver: Any, table: ParkedTable) -> ParkingHandler:
    made = handler_of(homeserver, table)
    asyncio.run(made.load())
    return made


def fail(handler: ParkingHandler, event_id: str, verdict: Verdict, why: str = "a reason") -> None:
    pdu = ParkedPdu(ORIGIN, event_id, ROOM, "{}", "{}", ("$before",))
    staged = StagedPdu(event_id, {"duration_ms": 3_600_000}, 0, 0)
    step(handler.fail(pdu, staged, why, verdict))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.requirement("L3", "H2")
def test_what_is_refused_is_dropped(
    handler: ParkingHandler, table: ParkedTable, caplog: pytest.LogCaptureFixture
) -> None:
    fail(handler, "$1", PASSES)
    fail(handler, "$2", PASSES)
    assert parked(table, ORIGIN) == ["$1", "$2"]
    fail(handler, "$1", REFUSED, "it cannot be persisted: the text (54000)")
    assert parked(table, ORIGIN) == ["$2"]
    (warning,) = warnings_of(caplog)
    assert "$1" in warning
    assert "the text (54000)" in warning


@pytest.mark.requirement("L3", "H3")
def test_one_that_cannot_be_completed_is_logged_once(
    handler: ParkingHandler, table: ParkedTable, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(20):
            fail(handler, "$1", PASSES, "its prev_events cannot be fetched")
    assert parked(table, ORIGIN) == ["$1"]
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == "Parked the sticky PDU $1: its prev_events cannot be fetched"


@pytest.mark.requirement("L3", "H2")
def test_what_nobody_knows_is_tried_three_times(
    homeserver: Any,
    table: ParkedTable,
    caplog: pytest.LogCaptureFixture,
) -> None:
    homeserver.staging.there = {"$before"}
    delays_ms = []
    for _ in range(2):
        # After a restart, or in another process.
        handler = loaded(homeserver, table)
        fail(handler, "$1", UNKNOWN, "nobody knows (57014)")
        due_ms = asyncio.run(table.ahead())[0]
        assert due_ms is not None
        delays_ms.append(due_ms - homeserver.now)
        # Another of the room neither brings it forward, nor puts it off.
        fail(handler, "$2", PASSES)
        homeserver.now = due_ms - 1
        asyncio.run(handler._trying.try_due())
        assert "$1" not in homeserver.staging.staged
        homeserver.staging.staged.clear()
        asyncio.run(table.remove(ORIGIN, "$2"))
        homeserver.now = due_ms
        asyncio.run(handler._trying.try_due())
        assert homeserver.staging.staged == ["$1"]
        homeserver.staging.staged.clear()
        assert warnings_of(caplog) == []
    assert delays_ms == [*unknown.AFTER_MS]
    assert delays_ms == sorted(set(delays_ms))
    fail(loaded(homeserver, table), "$1", UNKNOWN, "nobody knows (57014)")
    assert parked(table, ORIGIN) == []
    (warning,) = warnings_of(caplog)
    assert "$1" in warning
    assert "nobody knows (57014) (tried 3 times)" in warning


@pytest.mark.requirement("L3", "H1", "H2")
def test_while_the_table_cannot_be_written(
    homeserver: Any,
    handler: ParkingHandler,
    table: ParkedTable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(writing, "_MOST_IN_MEMORY", 2)
    homeserver.error = of_postgres(None)
    for event_id in ("$1", "$2", "$1"):
        fail(handler, event_id, PASSES)
    assert warnings_of(caplog) == []
    fail(handler, "$3", PASSES)
    (warning,) = warnings_of(caplog)
    assert "$3" in warning
    # Each step once, at growing distance.
    caplog.clear()
    for _ in range(6):
        homeserver.go_on()
    assert homeserver.delays_ms == [1_000, 2_000, 4_000]
    assert len(warnings_of(caplog)) == 3
    homeserver.error = None
    homeserver.go_on()
    homeserver.go_on()
    assert sorted(parked(table, ORIGIN)) == ["$1", "$2"]
    # One that was given up meanwhile is not written any more.
    homeserver.error = of_postgres(None)
    fail(handler, "$4", PASSES)
    fail(handler, "$4", REFUSED)
    homeserver.error = None
    homeserver.go_on()
    assert sorted(parked(table, ORIGIN)) == ["$1", "$2"]


@pytest.mark.requirement("E4", "L3")
def test_what_can_be_neither_persisted_nor_parked_stays_staged(
    homeserver: Any,
    handler: ParkingHandler,
    table: ParkedTable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whether there is room for it in memory or not."""
    monkeypatch.setattr(writing, "_MOST_IN_MEMORY", 1)
    homeserver.held.is_heeded = True
    sent = ["$1", "$2", "$3"]
    for homeserver.error in (of_postgres("53100"), None):
        for event_id in sent if homeserver.error else ():
            fail(handler, event_id, PASSES)
        homeserver.go_on()
        if homeserver.error:
            assert sorted(homeserver.held.rooms()) == [(ORIGIN, event_id) for event_id in sent]
            assert homeserver.staging.unstaged == homeserver.staging.processed == []
    homeserver.go_on()
    assert parked(table, ORIGIN) == homeserver.staging.unstaged == ["$1"]
    # The others are processed once more. What fails again is parked then.
    assert homeserver.staging.processed == [ROOM]
    assert [*homeserver.held.rooms()] == []
    assert not any("not parking" in line for line in warnings_of(caplog))


@pytest.mark.requirement("H1", "L3")
def test_one_that_cannot_be_parked_keeps_no_other_held(
    homeserver: Any,
    handler: ParkingHandler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writing, "_MOST_IN_MEMORY", 2)
    homeserver.held.is_heeded = True
    homeserver.error = of_postgres("53100")
    for event_id in ("$bad", "$2", "$3"):
        fail(handler, event_id, PASSES)
    homeserver.error = None
    park = ParkedTable.park

    async def park_others(table: ParkedTable, pdu: ParkedPdu, *args: Any, **options: Any) -> Any:
        if pdu.event_id == "$bad":
            raise of_postgres("57014")
        return await park(table, pdu, *args, **options)

    monkeypatch.setattr(ParkedTable, "park", park_others)
    for _ in range(4):
        homeserver.go_on()
    assert homeserver.staging.processed == [ROOM]
    assert [*homeserver.held.rooms()] == [(ORIGIN, "$bad")]
    # Given up, it is taken out of the staging area by Synapse.
    fail(handler, "$bad", REFUSED)
    assert [*homeserver.held.rooms()] == []


@pytest.mark.requirement("E4", "L3")
def test_synapse_leaves_staged_what_is_held() -> None:
    staging = staging_of(on_receive_pdu=None, _process_pulled_event=None)
    staging.park_by(None)  # type: ignore[arg-type]  # nothing fails
    staging._held.is_heeded = True
    staging._held.hold((ORIGIN, "$1"), ROOM)
    remove = staging._store.remove_received_event_from_staging
    assert asyncio.run(remove(ORIGIN, "$1")) is None
    assert asyncio.run(remove(ORIGIN, "$2")) == 5
    staging._held.release((ORIGIN, "$1"))
    assert asyncio.run(remove(ORIGIN, "$1")) == 5


@pytest.mark.requirement("H2")
def test_what_the_table_refuses_is_dropped(
    homeserver: Any, handler: ParkingHandler, caplog: pytest.LogCaptureFixture
) -> None:
    homeserver.error = of_postgres("22021")
    fail(handler, "$1", PASSES)
    assert homeserver.later == []
    (warning,) = warnings_of(caplog)
    assert "$1" in warning
