"""When parked PDUs are tried again: soon after their cause is gone, and not too often (L3, H2, H4).

Time passes when a test says so, a second at a time, so that all times here are counts.
"""

import asyncio
from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any

import pytest

from synapse_sticky.handlers.staging.parking import trying
from synapse_sticky.handlers.staging.parking.handler import ParkingHandler
from synapse_sticky.handlers.staging.parking.pace import Paces
from synapse_sticky.handlers.staging.parking.pdus import ParkedPdu
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.homeserver.layout import migrate
from tests.unit.test_parking import ROOM, _Homeserver, _Staging

ORIGIN = "a.test"
OTHER_ROOM = "!other:test"
HOUR_MS = 3_600_000

Attempt = tuple[int, str]
"""When, in seconds, and the event ID."""


class _Server(_Staging):
    """Tries what is staged, and has it persisted if the origin answers.

    answers: for which event IDs it does.
    takes_s: how long it takes for each PDU until that is known.
    """

    def __init__(self, homeserver: "_World") -> None:
        super().__init__()
        self._homeserver = homeserver
        self.answers: Callable[[str], bool] = lambda event_id: False
        self.takes_s = 0
        self.attempts: list[Attempt] = []
        self.asked: list[Attempt] = []
        self.backed_off: set[str] = set()
        self.is_up = False
        self.up: list[Callable[[str], None]] = []
        self._ends: dict[str, int] = {}

    def now_s(self) -> int:
        return self._homeserver.now // 1_000

    def stage_txn(self, txn: object, room_id: str, pdus: list[ParkedPdu]) -> None:
        for pdu in pdus:
            self.attempts.append((self.now_s(), pdu.event_id))
            self._ends[pdu.event_id] = self.now_s() + self.takes_s

    def go_on(self) -> None:
        for event_id, end_s in [*self._ends.items()]:
            if end_s <= self.now_s():
                del self._ends[event_id]
                if self.answers(event_id):
                    self.there.add(event_id)

    async def still_staged(self, origin: str, event_ids: Collection[str]) -> set[str]:
        return self._ends.keys() & event_ids

    def on_up(self, listener: Callable[[str], None]) -> None:
        self.up.append(listener)

    async def is_backed_off(self, origin: str) -> bool:
        return origin in self.backed_off

    async def ask(self, origin: str) -> None:
        self.asked.append((self.now_s(), origin))
        if not self.is_up:
            raise ConnectionError(origin)
        self.backed_off.discard(origin)
        for listener in self.up:
            listener(origin)


class _World(_Homeserver):
    def __init__(self) -> None:
        super().__init__()
        self.staging: _Server = _Server(self)

    def in_background(self, what: str, function: Any, *args: Any) -> None:
        # It does not wait for anything.
        with pytest.raises(StopIteration):
            function(*args).send(None)


class World:
    """A server that has parked PDUs."""

    def __init__(self) -> None:
        homeserver: Any = _World()
        self.homeserver, self.server = homeserver, homeserver.staging
        self.table = ParkedTable(homeserver)
        asyncio.run(migrate(homeserver, self.table))
        self.handler = ParkingHandler(
            homeserver,
            homeserver,
            self.server,
            self.server,
            self.table,
            homeserver.held,
            homeserver,
        )
        self.handler._trying.install()

    def park(self, *event_ids: str, origin: str = ORIGIN, room_id: str = ROOM) -> None:
        """Each lacks an event of its own."""
        for event_id in event_ids:
            pdu = ParkedPdu(origin, event_id, room_id, "{}", "{}", (f"{event_id}-before",))
            due_ms = self.homeserver.now + 1_000
            asyncio.run(self.table.park(pdu, self.homeserver.now + 2 * HOUR_MS, due_ms))
            self.homeserver.now += 1

    def pass_s(self, seconds: int) -> list[Attempt]:
        """Gives what was tried in this time."""
        before = len(self.server.attempts)
        for _ in range(seconds):
            self.homeserver.now += 1_000
            self.server.go_on()
            asyncio.run(self.handler._trying.try_due())
            self.server.go_on()
        return list(self.server.attempts[before:])

    def s_until(self, event_ids: Collection[str]) -> int:
        """How many seconds pass until these are persisted."""
        for seconds in range(600):
            if self.server.there.issuperset(event_ids):
                return seconds
            self.pass_s(1)
        raise AssertionError(f"{len(event_ids - self.server.there)} are not there")


@pytest.fixture
def world() -> World:
    return World()


def names(count: int, of: str = "") -> list[str]:
    return [f"${of}{number:03}" for number in range(count)]


@pytest.mark.requirement("L3", "H7")
@pytest.mark.parametrize("stay_away", [(), (0, 1, 2, 3), (5, 9, 13, 20), (17, 18, 19, 20)])
def test_all_come_back_once_the_cause_is_gone(world: World, stay_away: tuple[int, ...]) -> None:
    """Each lacks something of its own; what some lack is with another server, which stays away."""
    sent = names(21)
    away = {sent[number] for number in stay_away}
    world.park(*sent)
    assert world.pass_s(20)
    world.server.answers = lambda event_id: event_id not in away
    assert world.s_until({*sent} - away) <= 60
    world.server.answers = lambda event_id: True
    assert world.s_until(away) <= 60


@pytest.mark.requirement("L3", "H7")
@pytest.mark.parametrize("after_s", [5, 60, 1_800])
def test_one_comes_back_soon(world: World, after_s: int) -> None:
    """However long it has waited."""
    world.park("$1")
    world.pass_s(after_s)
    world.server.answers = lambda event_id: True
    assert world.s_until({"$1"}) <= 15


@pytest.mark.requirement("L3", "H7", "H3")
def test_many_come_back(world: World) -> None:
    """As many as may be parked of one server."""
    sent = names(500)
    world.park(*sent)
    world.pass_s(60)
    world.server.answers = lambda event_id: True
    assert world.s_until({*sent}) <= 60


@pytest.mark.requirement("L3", "H2", "H4")
def test_what_fails_for_ever_is_tried_at_a_distance(world: World) -> None:
    world.park(*names(100))
    assert len(world.pass_s(60)) <= 2 * 10
    assert len(world.pass_s(600)) <= 2 * 60
    # All have their turn.
    world.pass_s(600)
    assert {event_id for _, event_id in world.server.attempts} == {*names(100)}


@pytest.mark.requirement("H4", "L6")
def test_a_server_with_parked_pdus_in_many_rooms_is_not_asked_too_often(world: World) -> None:
    """A plain Synapse answers ten questions a second."""
    for number in range(100):
        world.park(f"${number}", room_id=f"!room{number}:test")
    assert len(world.pass_s(60)) <= 4 * 60
    world.pass_s(60)
    assert len(world.pass_s(60)) <= 2 * 60


@pytest.mark.requirement("L3", "H7")
def test_an_answer_wakes_what_waits_in_other_rooms(world: World) -> None:
    world.park("$1")
    world.pass_s(60)
    for number in range(50):
        world.park(f"$other{number}", room_id=f"!room{number}:test")
    world.pass_s(60)
    world.server.answers = lambda event_id: True
    others = {f"$other{number}" for number in range(50)}
    assert world.s_until({"$1", *others}) <= 30


@pytest.mark.requirement("H1", "L3")
def test_a_slow_server_does_not_hold_the_room_up_all_the_time(world: World) -> None:
    """No round begins before the last one has ended, nor sooner after it than that took."""
    world.park(*names(20))
    world.server.takes_s = 30
    times = sorted({at_s for at_s, _ in world.pass_s(600)})
    assert len(times) > 5
    assert all(later - earlier >= 2 * 30 for earlier, later in pairwise(times))


@pytest.mark.requirement("H2", "H4", "L3")
def test_while_a_server_is_backed_off_it_is_only_asked(world: World) -> None:
    world.park(*names(20))
    world.park("$elsewhere", room_id=OTHER_ROOM)
    world.server.backed_off.add(ORIGIN)
    assert world.pass_s(100) == []
    # For both rooms together.
    assert 5 <= len(world.server.asked) <= 100 // 10 + 1
    world.server.is_up = True
    world.server.answers = lambda event_id: True
    assert world.s_until({*names(20), "$elsewhere"}) <= 60


@pytest.mark.requirement("H2", "H4", "L6")
def test_not_too_many_are_asked_at_the_same_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trying, "_MOST_ASKED", 3)
    origins = [f"{number}.test" for number in range(9)]
    for origin in origins:
        world.park("$1", origin=origin)
    world.server.backed_off |= {*origins}
    world.pass_s(10)
    assert len(world.server.asked) <= 2 * 3
    world.pass_s(100)
    assert {origin for _, origin in world.server.asked} == {*origins}


@pytest.mark.requirement("L3", "H7")
def test_that_a_server_is_up_wakes_what_waits_for_it(world: World) -> None:
    world.park("$1")
    world.park("$2", origin="b.test")
    world.server.backed_off |= {ORIGIN, "b.test"}
    world.pass_s(100)
    world.server.answers = lambda event_id: True
    # As when it sends something itself.
    world.server.backed_off.discard(ORIGIN)
    for listener in world.server.up:
        listener(ORIGIN)
    assert [event_id for _, event_id in world.pass_s(1)] == ["$1"]
    # It is up and down all the time: this does not make more of it.
    world.server.answers = lambda event_id: False
    world.park("$3")
    for _ in range(60):
        for listener in world.server.up:
            listener(ORIGIN)
        world.pass_s(1)
    assert [event_id for _, event_id in world.server.attempts].count("$3") <= 15


@pytest.mark.requirement("L3")
def test_what_lacks_nothing_needs_no_answer(world: World) -> None:
    """It failed for another reason, such as the database."""
    world.server.backed_off.add(ORIGIN)
    world.park("$1")
    world.server.there.add("$1-before")
    world.pass_s(3)
    assert world.server.asked == []
    world.server.answers = lambda event_id: True
    assert world.s_until({"$1"}) <= 15


@pytest.mark.requirement("L6", "H3")
def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synapse_sticky.handlers.staging.parking.pace._MOST_PAIRS", 2)
    paces = Paces()
    for number in range(5):
        paces.of((f"{number}.test", ROOM)).pause(1, 0)
    assert [pair for pair, _ in paces._looks()] == [("3.test", ROOM), ("4.test", ROOM)]
    paces.forget(("3.test", ROOM))
    assert paces.rooms("3.test") == 0
    assert paces.next_look_ms() is not None
