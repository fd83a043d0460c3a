"""One that cannot be done costs only itself; and what fails is tried once a step (H1, H2)."""

import logging
import sqlite3
from collections.abc import Callable, Collection, Sequence
from typing import Any

import attr
import pytest

from synapse_sticky.apart import Stragglers, apart, each
from synapse_sticky.backoff import Backoff
from synapse_sticky.config import ExtremitiesConfig, FederationConfig
from synapse_sticky.handlers.deferral.handler import NewStickyEvent
from synapse_sticky.handlers.deferral.observer import Observer
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.extremities.handler import ExtremitiesHandler
from synapse_sticky.handlers.extremities.senders import Able
from synapse_sticky.handlers.joins.detection.reader import JoinReader, RoomChanges, ServerJoin
from synapse_sticky.handlers.receipt.handler import ReceiptHandler
from synapse_sticky.limits import LimitReport
from tests.unit.process import Process, Timer
from tests.unit.settable import METRICS
from tests.unit.test_limits import HOUR_MS, done, table
from tests.unit.test_panics import Sink, Stream, deferring, following, row

AWAY = sqlite3.OperationalError("database is locked")
BAD = sqlite3.IntegrityError("for the test")


# The parts


class Work:
    """Something that is done with many at once, and fails with some."""

    def __init__(self, *bad: int) -> None:
        self.bad = set(bad)
        self.done: list[int] = []
        self.attempts = 0
        self.error: Exception = BAD

    async def __call__(self, items: Sequence[int]) -> None:
        self.attempts += 1
        if self.bad & set(items):
            raise self.error
        self.done += items


@pytest.mark.requirement("H1")
@pytest.mark.parametrize("bad", [(), (0,), (49,), (17, 18, 40), tuple(range(50))])
def test_each_by_itself(bad: tuple[int, ...]) -> None:
    work = Work(*bad)
    stuck = done(apart(range(50), work))
    assert [item for item, _ in stuck] == list(bad)
    assert work.done == [n for n in range(50) if n not in bad]
    assert work.attempts <= 1 + 12 * len(bad)
    assert work.attempts < 100


@pytest.mark.requirement("H1")
def test_each_that_was_noted_in_turn() -> None:
    noted = dict.fromkeys(range(5))
    work = Work(1, 3)

    async def do(item: int) -> None:
        await work([item])
        if item == 2:
            noted[2] = None  # once more, meanwhile

    with pytest.raises(sqlite3.IntegrityError):
        done(each(noted, do))
    assert work.done == [0, 2, 4]
    assert [*noted] == [1, 2, 3]
    work.error = AWAY
    with pytest.raises(sqlite3.OperationalError):
        done(each(noted, do))
    assert work.done == [0, 2, 4], "the outage ends the round"
    assert [*noted] == [2, 3, 1]


@pytest.mark.requirement("H2")
def test_a_database_that_is_away_is_asked_once() -> None:
    work = Work(17)
    work.error = AWAY
    with pytest.raises(sqlite3.OperationalError):
        done(apart(range(50), work))
    assert work.attempts == 1


def test_nothing_is_no_work() -> None:
    work = Work()
    assert done(apart([], work)) == []
    assert work.attempts == 0


def stragglers(process: Process, work: Work, most: int = 10_000) -> Stragglers[int]:
    async def do(item: int) -> None:
        await work([item])

    backoff = Backoff(1_000, 60_000, spread=0)
    return Stragglers(process, "work", "Could not do", do, backoff, most)


@pytest.mark.requirement("H1", "H2")
def test_many_that_fail_are_ten_attempts_a_step(caplog: pytest.LogCaptureFixture) -> None:
    process, work = Process(), Work(*range(5_000))
    failing = stragglers(process, work)
    for item in range(5_000):
        failing.add([(item, BAD)])
    assert len(process.timers) == len(caplog.records) == 1
    assert work.attempts == 0
    process.pass_ms(HOUR_MS // 2)
    steps = len(caplog.records) - 1
    assert steps < 40
    assert work.attempts == 10 * steps
    assert len(process.timers) == 1
    # Each has its turn, and once the fault is gone all are done within one more step.
    work.bad = {4_999}
    process.pass_ms(60_000)
    assert sorted(work.done) == list(range(4_999))
    assert len(failing) == 1
    process.pass_ms(HOUR_MS)
    assert len(failing) == 0, "given up after an hour"
    assert process.timers == []


@pytest.mark.requirement("H1", "H7")
@pytest.mark.parametrize("place", [0, 30, 60])
def test_one_that_is_cured_does_not_wait_until_all_others_have_failed(place: int) -> None:
    """Those others fail for good."""
    process, work = Process(), Work(*range(61))
    failing = stragglers(process, work)
    failing.add((item, BAD) for item in range(61))
    process.pass_ms(HOUR_MS // 2)
    work.bad.remove(place)
    process.pass_ms(7 * 60_000)
    assert work.done == [place]
    assert len(failing) == 60


@pytest.mark.requirement("H2")
def test_while_the_database_is_away_one_of_them_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    process, work = Process(), Work(*range(100))
    work.error = AWAY
    failing = stragglers(process, work)
    failing.add((item, AWAY) for item in range(100))
    process.pass_ms(HOUR_MS // 2)
    assert 20 < work.attempts == len(caplog.records) - 1
    work.bad.clear()
    process.pass_ms(60_000)
    assert sorted(work.done) == list(range(100))


@pytest.mark.requirement("H1")
def test_no_more_than_so_many_wait() -> None:
    process, work = Process(), Work(*range(5))
    failing = stragglers(process, work, most=3)
    failing.add((item, BAD) for item in range(5))
    assert list(failing.items()) == [2, 3, 4]


# Releases


@attr.s(auto_attribs=True)
class BadRows:
    """A database in which some events cannot be entered."""

    process: Process
    bad: set[str]
    attempts: int = 0

    def __attrs_post_init__(self) -> None:
        enter = self.process.enter_txn

        def enter_txn(txn: Any, events: Any) -> None:
            self.attempts += 1
            if self.bad & {event.event_id for event in events}:
                raise BAD
            enter(txn, events)

        setattr(self.process, "enter_txn", enter_txn)  # noqa: B010


@pytest.mark.requirement("H1", "H2", "L4")
def test_a_bad_row_holds_up_no_other_release() -> None:
    process = Process()
    rows = BadRows(process, {"$3", "$5"})
    handler = deferring(process)
    deferred = process.persist(handler, range(40))
    process.pass_ms(45_000)
    assert set(process.entered) == deferred - rows.bad, "each in its time"
    assert table(process) == rows.bad
    before = rows.attempts
    process.pass_ms(HOUR_MS // 4)
    assert rows.attempts - before < 40, "each once a minute"
    rows.bad.clear()
    process.pass_ms(80_000)
    assert set(process.entered) == deferred
    assert len(process.entered) == len(deferred)
    assert table(process) == set()


# Joins


class Changes:
    """State changes of rooms, each of which is a join of a server."""

    def __init__(self) -> None:
        self.joins: list[tuple[str, str]] = []
        self.bad_rooms: set[str] = set()
        self.bad_newcomers: set[str] = set()
        self.error: Exception = BAD
        self.reads = 0
        self.failures = 0
        self.recorded: list[tuple[str, str]] = []
        self.position = 0
        self.positions: list[int] = []

    def state_position(self) -> int:
        return len(self.joins)

    def may_have_changed(self, after: int) -> bool:
        return len(self.joins) > after

    async def page(self, *, after: int, up_to: int) -> tuple[int, list[RoomChanges]]:
        self.reads += 1
        if self.error is AWAY:
            raise AWAY
        by_room: dict[str, list[str]] = {}
        reached = min(up_to, after + 20)
        for destination, room_id in self.joins[after:reached]:
            by_room.setdefault(room_id, []).append(destination)
        return reached, [RoomChanges(*room, len(room[1])) for room in by_room.items()]

    async def server_joins(
        self, rooms: Sequence[RoomChanges], *, not_before_ms: int
    ) -> list[ServerJoin]:
        if self.bad_rooms & {room.room_id for room in rooms}:
            self.failures += 1
            raise BAD
        return [ServerJoin(server, room.room_id) for room in rooms for server in room.changes]

    def handles(self, destination: str) -> bool:
        return True

    def add_backlog_txn(self, *args: object) -> None: ...

    async def record_joins(
        self, position: int, joins: Collection[tuple[str, str]], *more: object
    ) -> None:
        if self.bad_newcomers & {destination for destination, _ in joins}:
            raise BAD
        self.recorded += joins
        self.position = position
        self.positions.append(position)


def reader(process: Process, changes: Any) -> tuple[JoinReader, list[ServerJoin]]:
    told: list[ServerJoin] = []
    hs: Any = process
    read = JoinReader(hs, changes, changes, changes, lambda joins, own, until: told.extend(joins))
    read.start(0)
    return read, told


@pytest.mark.requirement("H1", "P3", "E4")
@pytest.mark.parametrize("fault", ["room", "newcomer"])
def test_a_bad_room_or_newcomer_holds_up_no_other(fault: str) -> None:
    process, changes = Process(), Changes()
    if fault == "room":
        changes.bad_rooms = {"!3"}
    else:
        changes.bad_newcomers = {"server3"}
    read, told = reader(process, changes)
    changes.joins = [(f"server{n}", f"!{n % 7}") for n in range(30)]
    read.wake()
    bad = {j for j in changes.joins if j[0] in changes.bad_newcomers or j[1] in changes.bad_rooms}
    assert set(changes.recorded) == set(changes.joins) - bad
    assert {(join.destination, join.room_id) for join in told} == set(changes.joins) - bad
    assert changes.position == 0, "the next run reads again what could not be read"
    failures = changes.failures
    for n in range(300):
        changes.joins.append((f"late{n}", f"!{n % 7}"))
        read.wake()
    assert len(process.timers) == 1
    assert changes.failures == failures, "more of the same room is not tried at every page"
    changes.bad_rooms, changes.bad_newcomers = set(), set()
    process.pass_ms(80_000)
    assert set(changes.recorded) == set(changes.joins)
    changes.joins.append(("last", "!0"))
    process.pass_ms(60_001)
    read.wake()
    assert changes.position == len(changes.joins)


# Extremities


class Rooms:
    """Rooms with too many extremities, which some cannot count."""

    threshold = 10

    def __init__(self) -> None:
        self.bad: set[str] = set()
        self.error: Exception = BAD
        self.left: dict[str, int] = {}
        self.attempts = 0
        self.tell: Callable[[set[str]], None] = lambda rooms: None

    def on_new_events(self, listener: Callable[[set[str]], None]) -> None:
        self.tell = listener

    async def count(self, room_id: str) -> int:
        self.attempts += 1
        if room_id in self.bad:
            raise self.error
        return self.left[room_id]

    def on_state_changed(self, callback: Callable[[str], None]) -> None: ...

    async def able(self, room_id: str) -> Able:
        return Able(["@alice:here"], 1)

    async def send(self, room_id: str, user_id: str) -> str | None:
        self.left[room_id] -= 10
        return None

    def left_out_since_ms(self, room_id: str) -> int | None:
        return None

    def leave_in(self, room_id: str) -> None: ...


def merging(process: Process, rooms: Any) -> None:
    hs: Any = process
    ExtremitiesHandler(hs, rooms, rooms, ExtremitiesConfig()).install()


@pytest.mark.requirement("H1", "F2")
def test_a_bad_room_ends_no_round() -> None:
    process, rooms = Process(), Rooms()
    merging(process, rooms)
    rooms.left = {f"!{n}": 25 for n in range(4)}
    rooms.bad = {"!0", "!2"}
    rooms.tell(set(rooms.left))
    process.pass_ms(15_000)
    assert rooms.left == {"!0": 25, "!1": 5, "!2": 25, "!3": 5}
    rooms.bad.clear()
    process.pass_ms(60_000)
    assert set(rooms.left.values()) == {5}
    assert process.timers == []


@pytest.mark.requirement("H1", "H2", "F2")
def test_a_database_that_is_away_ends_the_round_and_forgets_no_room(
    caplog: pytest.LogCaptureFixture,
) -> None:
    process, rooms = Process(), Rooms()
    merging(process, rooms)
    rooms.left = {f"!{n}": 15 for n in range(50)}
    rooms.bad, rooms.error = set(rooms.left), AWAY
    rooms.tell(set(rooms.left))
    process.pass_ms(5_000)
    assert rooms.attempts == len(caplog.records) == 1
    rooms.bad = set()
    process.pass_ms(120_000)
    assert set(rooms.left.values()) == {5}


# Each that tries again, while it is woken a thousand times


def _index(process: Process) -> tuple[Callable[[], object], Callable[[], int]]:
    stream = Stream()
    following(process, stream)
    stream.all.append(row(1))
    stream.fails = True
    return stream.advance, lambda: stream.reads


def _joins(process: Process) -> tuple[Callable[[], object], Callable[[], int]]:
    changes = Changes()
    read, _ = reader(process, changes)
    changes.joins = [("there", "!room")]
    changes.error = AWAY
    return read.wake, lambda: changes.reads


def _releases(process: Process) -> tuple[Callable[[], object], Callable[[], int]]:
    handler = deferring(process)
    process.persist(handler, range(10))
    process.fails, process.failures = "release", 10**6

    def wake() -> None:
        process.persist(handler, range(3))
        handler._event_changed("$9")

    return wake, lambda: process.failed


def _observing(process: Process) -> tuple[Callable[[], object], Callable[[], int]]:
    hs: Any = process
    asked = 0

    async def still_sticky(event_ids: object) -> set[str]:
        nonlocal asked
        asked += 1
        raise AWAY

    setattr(process, "still_sticky", still_sticky)  # noqa: B010
    observer = Observer(hs, hs, hs, FederationConfig(), LimitReport(process.now_ms, METRICS.limits))
    observer.install()
    event = NewStickyEvent("$1", "!room", "@eve:there", process.now + HOUR_MS, 1)
    observer._waiting.add(event, "there")
    return lambda: observer._event_changed(event.event_id), lambda: asked


def _extremities(process: Process) -> tuple[Callable[[], object], Callable[[], int]]:
    rooms = Rooms()
    merging(process, rooms)
    rooms.bad, rooms.error = {"!room"}, AWAY
    return lambda: rooms.tell({"!room"}), lambda: rooms.attempts


def _receipt(process: Process) -> tuple[Callable[[], object], Callable[[], int]]:
    hs: Any = process
    report = LimitReport(process.now_ms, METRICS.limits)
    receipt = ReceiptHandler(hs, Sink(), DeferredTable(hs), FederationConfig(), report)
    asked = 0

    async def fails(*args: object) -> None:
        nonlocal asked
        asked += 1
        raise AWAY

    setattr(process, "transact_alone", fails)  # noqa: B010
    return lambda: done(receipt._has_deferred_table()), lambda: asked


RETRYING = (_index, _joins, _releases, _observing, _extremities, _receipt)


def retries(process: Process) -> list[Timer]:
    return [t for t in process.timers if "_retry" in t.what]


@pytest.mark.requirement("H2")
@pytest.mark.parametrize("make", RETRYING)
def test_a_thousand_ticks_are_one_attempt(
    make: Callable[[Process], tuple[Callable[[], object], Callable[[], int]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One attempt, one line and one timer a step, whatever wakes it."""
    process = Process()
    wake, attempts = make(process)
    wake()
    while attempts() == 0:
        process.pass_ms(min(timer.due_ms for timer in process.timers) - process.now)
    assert attempts() == 1
    with caplog.at_level(logging.INFO):
        caplog.clear()
        for _ in range(1_000):
            wake()
        assert attempts() == 1
        assert caplog.records == []
        (timer,) = retries(process)
        process.pass_ms(timer.due_ms - process.now)
        assert attempts() == 2
        assert len([r for r in caplog.records if "trying again in" in r.getMessage()]) <= 1
        for _ in range(1_000):
            wake()
        assert attempts() == 2
        assert len(retries(process)) == 1
