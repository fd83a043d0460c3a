"""What the joins handler does at its start, with Synapse's side made up."""

import functools
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attr
import pytest
from twisted.internet import defer

from synapse_sticky._core import StickyIndex
from synapse_sticky.config import JoinsConfig
from synapse_sticky.handlers.joins import refusals
from synapse_sticky.handlers.joins.detection.reader import RoomChanges, ServerJoin
from synapse_sticky.handlers.joins.federation import LeftToSynapseError
from synapse_sticky.handlers.joins.handler import JoinsHandler
from synapse_sticky.handlers.joins.sent import GRACE_MS
from synapse_sticky.handlers.joins.tables import Newcomer, NewcomerTable
from synapse_sticky.index import StickyRow
from synapse_sticky.orders import Orders, PushAgain
from tests.unit.settable import Settable
from tests.unit.test_limits import done

NOW_MS = 1_800_000_000_000
HOUR_MS = 3_600_000


@attr.s(auto_attribs=True)
class Timer:
    delay_ms: int
    function: Any
    args: tuple[Any, ...]

    def active(self) -> bool:
        return True

    def cancel(self) -> None:
        self.delay_ms = -1


class Here(Settable):
    """The homeserver, table and follower of a process that sends federation traffic."""

    server_name = instance_name = "here"
    is_whole = True
    duty, migrations = NewcomerTable.duty, NewcomerTable.migrations

    def __init__(self, watch_until_ms: int, own: list[int]) -> None:
        self.stream = self
        self.index = StickyIndex("here")
        self.index.insert(
            [(n, "here", "!room", f"${n}", "@alice:here", NOW_MS + HOUR_MS) for n in own]
        )
        self.watch_until_ms = watch_until_ms
        self.in_database = max(own, default=0)
        self.redacted: set[str] = set()
        self.timers: list[Timer] = []
        self.woken: list[str] = []
        self.settled: list[bool] = []
        self.failures_to_settle: list[Exception] = []
        self.callbacks: dict[str, Callable[..., Any]] = {}
        self.clock_ms = NOW_MS
        self.meanwhile: Callable[[], None] = lambda: None
        self.before_newcomers: Callable[[], None] = lambda: None
        self.calls: list[str] = []
        self.stream_position = 1
        self.changed_at = 2
        self.changes: list[RoomChanges] = []
        self.denied: set[str] = set()
        self.gone: set[str] = set()
        self.reached = {"there"}
        self.backlogged: list[tuple[str, int]] = []
        self.failing: dict[str, Exception] = {}
        self.asked: Counter[str] = Counter()
        self.looked_up: list[set[str]] = []
        self.orders = Orders()
        self.ended_orders: list[str] = []
        self.failures_to_end: list[Exception] = []
        self.recorded_again: list[tuple[str, str]] = []

    def now_ms(self) -> int:
        return self.clock_ms + self.set_by_ms

    def steady_ms(self) -> int:
        return self.clock_ms

    def call_later(self, delay_ms: int, what: str, function: Any, *args: Any) -> Timer:
        self.timers = [Timer(delay_ms, function, args)]
        return self.timers[0]

    def in_background(self, what: str, function: Any, *args: Any) -> None:
        done(function(*args))

    async def give_way(self) -> None: ...

    def may_have_changed(self, after: int) -> bool:
        return self.changed_at > after

    async def page(self, **page: int) -> tuple[int, list[RoomChanges]]:
        self.calls.append("page")
        changes, self.changes = self.changes, []
        return page["up_to"], changes

    def change_acl(self, room_id: str) -> None:
        """There is a new ACL, which this process reads of."""
        self.stream_position += 1
        self.changed_at = self.stream_position
        self.changes = [RoomChanges(room_id, [], 1, has_new_acl=True)]
        self.callbacks["on_advance"]()

    async def server_joins(self, rooms: Any, **options: Any) -> list[Any]:
        return []

    async def record_joins(self, *page: Any) -> None: ...

    async def record_again(self, newcomer: tuple[str, str], *more: Any) -> None:
        self.recorded_again.append(newcomer)

    async def end_order(self, order_id: str) -> None:
        if self.failures_to_end:
            raise self.failures_to_end.pop()
        self.ended_orders.append(order_id)

    async def newcomers(self) -> list[Newcomer]:
        self.calls.append("newcomers")
        self.before_newcomers()
        # Everything up to 10 has been delivered.
        return [Newcomer("there", "!room", 10, self.watch_until_ms)]

    async def settle(self, newcomer: Newcomer, *, still_watched: bool, **more: Any) -> None:
        if self.failures_to_settle:
            raise self.failures_to_settle.pop()
        self.settled.append(still_watched)

    async def transact_alone(self, what: str, function: Callable[..., Any]) -> None:
        """The tables are there."""

    def clear_backlog_txn(self, *args: Any) -> None: ...

    def add_backlog_txn(self, *args: Any) -> None: ...

    def state_position(self, *now: Any) -> Any:
        """Of the stream, and of the table, where it is waited for."""
        self.calls += ["state_position"] if now else []
        return defer.succeed(1) if now else self.stream_position

    def positions(self) -> dict[str, int]:
        return {"here": 10}

    async def rows_at(self, stream_ids: Mapping[str, int]) -> list[StickyRow]:
        self.looked_up.append(set(stream_ids))
        rows = {event_id: self.index.get(event_id) for event_id in stream_ids}
        return [
            StickyRow(row[0], "here", *row[1:], event_id not in self.redacted)
            for event_id, row in rows.items()
            if row is not None
        ]

    async def last_rows(self, room_id: str) -> dict[str, int]:
        self.asked[room_id] += 1
        if room_id in self.failing:
            raise self.failing[room_id]
        return {"here": self.in_database}

    def has_taken_in(self, last_rows: Mapping[str, int]) -> bool:
        return last_rows["here"] <= self.positions()["here"]

    async def retry_at_ms(self, destination: str) -> int:
        return 0

    def handles(self, destination: str) -> bool:
        return destination != "not mine"

    async def backlog(self, destination: str) -> list[tuple[str, int]]:
        return self.backlogged

    async def may_receive(self, room_id: str, destination: str) -> bool:
        self.meanwhile()
        concerned = {"here", destination}
        return not concerned & self.gone and not concerned & self.denied

    async def is_there(self, room_id: str, destination: str) -> bool:
        return destination not in self.gone

    async def is_in_room(self, room_id: str) -> bool:
        return "here" not in self.gone

    async def acl_allows(self, room_id: str, server: str) -> bool:
        return server not in self.denied

    async def acl_now(self, room_id: str) -> Callable[[str], bool]:
        self.calls.append("acl_now")
        return lambda server: server not in self.denied

    async def rows_of(self, event_ids: Sequence[str]) -> dict[str, StickyRow]:
        rows = {e: row for e in event_ids if (row := self.index.get(e))}
        return {
            e: StickyRow(at, "here", room_id, e, sender, until_ms, True)
            for e, (at, room_id, _, sender, until_ms) in rows.items()
        }

    async def add_to_backlog(self, some: Sequence[tuple[str, str, int]]) -> None:
        self.backlogged += [(room_id, at) for _, room_id, at in some]

    async def add_if_never_reached(self, destination: str) -> None:
        if destination not in self.reached:
            self.backlogged.append(("!room", 10))

    async def erased(self, user_ids: set[str]) -> set[str]:
        return set()

    def in_step(self) -> bool:
        return True

    def wake(self, destination: str) -> None:
        self.woken.append(destination)

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("on_", "serve_")):
            return functools.partial(self.callbacks.__setitem__, name)
        raise AttributeError(name)


def install(here: Here) -> JoinsHandler:
    hs: Any = here
    handler = JoinsHandler(hs, hs, hs, hs, hs, hs, hs, JoinsConfig(), here.orders, here.end_order)
    handler.install()
    return handler


def start(here: Here) -> None:
    done(install(here).load())


@pytest.mark.requirement("H3")
def test_what_others_acknowledge_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event comes by there, once for each server in its room."""
    here = Here(NOW_MS, [])
    start(here)
    asked: list[str] = []

    def now_ms() -> int:
        asked.append("time")
        return NOW_MS

    timers = here.timers
    monkeypatch.setattr(here, "now_ms", now_ms)
    monkeypatch.setattr(here, "steady_ms", now_ms)
    done(here.callbacks["on_acknowledged"]("elsewhere", [("!room", "$1")]))
    here.callbacks["on_catch_up_recorded"]("elsewhere")
    assert asked == []
    assert here.timers is timers


@pytest.mark.requirement("P3", "E4")
def test_no_join_falls_between_the_position_and_the_newcomers() -> None:
    here = Here(NOW_MS + HOUR_MS, [])
    here.stream_position = 2
    # The stream advances while the newcomers are read.
    handler = install(here)
    here.before_newcomers = here.callbacks["on_advance"]
    done(handler.load())
    # Another process may store a join and go on at any time: the position is from before that.
    assert here.calls == ["state_position", "newcomers", "page"]


@pytest.mark.requirement("E4")
def test_a_load_that_failed_starts_nothing_and_can_be_repeated() -> None:
    here = Here(NOW_MS + HOUR_MS, [12])
    here.stream_position = 2

    def fail() -> None:
        raise OSError("the connection is lost")

    here.before_newcomers = fail
    handler = install(here)
    with pytest.raises(OSError, match="lost"):
        done(handler.load())
    here.callbacks["on_advance"]()
    assert "page" not in here.calls
    assert here.timers == []
    with pytest.raises(LeftToSynapseError):
        done(here.callbacks["serve_backlog_from"]("there", 50))
    here.before_newcomers = lambda: None
    done(handler.load())
    assert here.calls.count("page") == 1
    assert done(here.callbacks["serve_backlog_from"]("there", 50)).event_ids == ["$12"]
    assert done(here.callbacks["serve_backlog_from"]("there", 50)) is None


@pytest.mark.requirement("P7", "E4")
def test_event_of_before_a_restart_is_checked_at_once() -> None:
    here = Here(NOW_MS + HOUR_MS, [12])
    start(here)
    (timer,) = here.timers
    assert timer.delay_ms <= 1, "not when the watch is over"
    done(timer.function(*timer.args))
    assert here.woken == ["there"]


@pytest.mark.requirement("E4")
def test_restored_push_without_events_is_checked_soon() -> None:
    here = Here(NOW_MS + HOUR_MS, [])
    start(here)
    assert here.timers[0].delay_ms <= 1_001


def test_push_that_nothing_is_left_of_ends_by_itself() -> None:
    here = Here(NOW_MS - HOUR_MS - 1, [])
    start(here)
    (timer,) = here.timers
    done(timer.function(*timer.args))
    assert here.settled == [False]
    assert here.woken == []


@pytest.mark.requirement("P3", "E2")
def test_no_push_ends_before_the_index_has_what_the_database_has() -> None:
    here = Here(NOW_MS - HOUR_MS - 1, [])
    here.in_database = 11
    start(here)
    (timer,) = here.timers
    done(timer.function(*timer.args))
    assert here.settled == []
    assert here.woken == ["there"], "and goes on checking"


@pytest.mark.requirement("P3", "E2")
def test_before_a_batch_the_database_is_asked() -> None:
    here = Here(NOW_MS + HOUR_MS, [12, 14])
    here.in_database = 12
    start(here)
    batch = done(here.callbacks["serve_backlog_from"]("there", 50))
    assert batch.event_ids == ["$12"], "the later one is the ordinary queue's"


@pytest.mark.requirement("E3")
def test_the_outcome_of_a_newcomer_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    here = Here(NOW_MS + HOUR_MS, [12])
    handler = install(here)
    assert handler._destinations.open_count() == handler._destinations.oldest_s() == 0
    done(handler.load())
    here.clock_ms += 5_000
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    assert done(next_batch()).event_ids == ["$12"]
    assert handler._destinations.open_count() == 1
    assert handler._destinations.oldest_s() == 5
    # It acknowledges nothing.
    here.clock_ms += HOUR_MS
    here.in_database = 10
    assert done(next_batch()) is None
    assert here.settled == [False]
    assert handler._destinations.open_count() == handler._destinations.oldest_s() == 0
    told = "there did not take 1 own sticky events of !room while they were sticky"
    assert caplog.messages == [told]


@pytest.mark.requirement("S5", "P3")
def test_what_the_database_has_as_redacted_is_not_pushed() -> None:
    """Another process has redacted it: the index of this one has yet to hear of that."""
    here = Here(NOW_MS + HOUR_MS, [12, 13, 14])
    start(here)
    here.redacted = {"$12", "$13"}
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    assert done(next_batch()).event_ids == ["$14"]
    done(here.callbacks["on_acknowledged"]("there", [("!room", "$14")]))
    here.clock_ms += HOUR_MS // 2
    assert done(next_batch()) is None


@pytest.mark.requirement("H3", "S5")
def test_the_database_is_asked_only_of_what_would_be_pushed() -> None:
    """Not of what was sent and is not confirmed yet, which may be thousands; and once more for
    what takes the place of events that are gone."""
    here = Here(NOW_MS + HOUR_MS, list(range(11, 41)))
    start(here)
    next_batch = here.callbacks["serve_backlog_from"]
    (first,) = done(next_batch("there", 4)).event_ids
    done(here.callbacks["on_acknowledged"]("there", [("!room", first)]))
    here.redacted = {f"${n}" for n in range(37, 41)}
    here.looked_up.clear()
    assert done(next_batch("there", 4)).event_ids == ["$33", "$34", "$35", "$36"]
    assert here.looked_up == [here.redacted, {"$33", "$34", "$35", "$36"}]
    assert done(next_batch("there", 4)).event_ids == ["$29", "$30", "$31", "$32"]
    assert here.looked_up[2:] == [{"$29", "$30", "$31", "$32"}]


@pytest.mark.requirement("P3", "P7")
def test_who_joins_again_is_asked_for_what_it_got_first() -> None:
    """That may be the newest, while the oldest are still to be pushed. It may have lost it."""
    here = Here(NOW_MS + HOUR_MS, list(range(11, 41)))
    handler = install(here)
    done(handler.load())
    next_batch = here.callbacks["serve_backlog_from"]
    (first,) = done(next_batch("there", 4)).event_ids
    done(here.callbacks["on_acknowledged"]("there", [("!room", first)]))
    before = handler._destinations.find("there", "!room")
    assert before is not None
    for event_id in done(next_batch("there", 4)).event_ids:
        before.mark_delivered(event_id)
    assert (before.position, before.delivered_count) == (11, 4)
    handler._newcomers.joined([ServerJoin("there", "!room")], [], NOW_MS + HOUR_MS)
    push = handler._destinations.find("there", "!room")
    assert push is not None
    assert push.is_back
    assert handler._pushed.last_done(push, 50) == ["$37", "$38", "$39", "$40"]
    assert handler._pushed.last_done(push, 3) == ["$38", "$39", "$40"]


@pytest.mark.requirement("P7", "H3")
def test_a_push_waits_for_what_a_newcomer_may_say_while_that_is_sticky() -> None:
    here = Here(NOW_MS - 1, [10])
    handler = install(here)
    done(handler.load())
    push = handler._destinations.find("there", "!room")
    assert push is not None
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    assert done(next_batch()).event_ids == ["$10"]
    done(here.callbacks["on_acknowledged"]("there", [("!room", "$10")]))
    push.mark_present(["$10"], NOW_MS, is_named=True)
    assert done(next_batch()) is None
    assert here.settled == []
    # Also where it cannot be asked for an hour.
    here.clock_ms += HOUR_MS + 1
    done(handler._ending.end_expired("there"))
    assert here.settled == [False]


@pytest.mark.requirement("P3", "E2")
def test_what_synapse_skips_is_asked_for_before_a_push_ends() -> None:
    here = Here(NOW_MS, [])
    start(here)
    catch_up = functools.partial(here.callbacks["on_skipped"], "there")
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    here.meanwhile = catch_up
    assert done(next_batch()) is None
    assert here.settled == []
    here.meanwhile = lambda: None
    assert done(next_batch()) is None
    assert here.settled == [False]


@pytest.mark.requirement("P3")
def test_what_synapse_skips_is_pushed_after_the_watch() -> None:
    here = Here(NOW_MS, [])
    here.watch_until_ms = NOW_MS - 1
    start(here)
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    here.in_database = 11
    assert done(next_batch()) is None
    here.index.insert([(12, "here", "!room", "$12", "@alice:here", NOW_MS + HOUR_MS)])
    here.callbacks["on_new_events"](["!room"])
    assert done(next_batch()) is None, "the ordinary queue's"
    here.callbacks["on_skipped"]("there")
    here.in_database = 12
    assert done(next_batch()).event_ids == ["$12"]


@pytest.mark.requirement("P7", "H1")
def test_while_the_index_is_made_anew_nothing_counts_as_gone() -> None:
    here = Here(NOW_MS + HOUR_MS, [12, 13])
    start(here)
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    assert done(next_batch()).event_ids == ["$12"]
    # Another one is in its place, and not filled yet.
    filled, here.index, here.is_whole = here.index, StickyIndex("here"), False
    here.callbacks["on_new_events"](["!room"])
    with pytest.raises(LeftToSynapseError):
        done(next_batch())
    here.index, here.is_whole = filled, True
    here.callbacks["on_new_events"](["!room"])
    assert done(next_batch()) is None, "what is under way is not sent again"
    done(here.callbacks["on_acknowledged"]("there", [("!room", "$12")]))
    assert done(next_batch()).event_ids == ["$13"]


@pytest.mark.requirement("P7", "H2", "H7")
def test_what_is_refused_goes_out_again() -> None:
    here = Here(NOW_MS + HOUR_MS, [10])
    start(here)
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    for _ in range(5):
        assert done(next_batch()).event_ids == ["$10"]
        done(here.callbacks["on_refused"]("there", {"!elsewhere", "!room"}, ["$10"]))
        assert done(next_batch()) is None
        here.clock_ms += JoinsConfig().retry_max_ms
    assert not here.settled
    assert not here.backlogged, "it is pushed already"


@pytest.mark.requirement("H7", "E4")
def test_what_the_ordinary_queue_had_refused_becomes_a_push() -> None:
    here = Here(NOW_MS + HOUR_MS, [10, 11, 12])
    start(here)
    here.index.insert(
        [
            (13, "here", "!other", "$13", "@alice:here", NOW_MS + HOUR_MS),
            (14, "here", "!other", "$14", "@alice:here", NOW_MS + HOUR_MS),
            (15, "here", "!other", "$15", "@bob:there", NOW_MS + HOUR_MS),
            (16, "here", "!other", "$16", "@alice:here", NOW_MS - 1),
            (17, "here", "!third", "$17", "@alice:here", NOW_MS + HOUR_MS),
        ]
    )
    here.woken.clear()
    refused = ["$14", "$13", "$15", "$16", "$17", "$of-nobody"]
    done(here.callbacks["on_refused"]("elsewhere", {"!other"}, refused))
    assert here.backlogged == [("!other", 13)], "from the first one on, and of its rooms only"
    assert here.woken == ["elsewhere"]
    here.in_database = 14
    batch = done(here.callbacks["serve_backlog_from"]("elsewhere", 50))
    assert batch.event_ids == ["$13"], "one, as it may be refused again"
    done(here.callbacks["on_acknowledged"]("elsewhere", [("!other", "$13")]))
    assert done(here.callbacks["serve_backlog_from"]("elsewhere", 50)).event_ids == ["$14"]


@pytest.mark.requirement("H7", "H1")
def test_what_is_refused_is_noted_once_the_database_is_back() -> None:
    here = Here(NOW_MS + HOUR_MS, [10])
    start(here)
    add = here.add_to_backlog

    async def fail(some: Sequence[tuple[str, str, int]]) -> None:
        raise OSError("the connection is lost")

    here.add_to_backlog = fail  # type: ignore[method-assign]
    done(here.callbacks["on_refused"]("elsewhere", {"!room"}, ["$10"]))
    assert here.backlogged == []
    here.add_to_backlog = add  # type: ignore[method-assign]
    done(here.timers[0].function())
    assert here.backlogged == [("!room", 10)]


@pytest.mark.requirement("H3", "H7")
def test_strangers_begin_a_bounded_number_of_pushes_by_refusing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refusals, "MOST_AN_HOUR", 100)
    here = Here(NOW_MS + HOUR_MS, [10])
    start(here)
    for number in range(300):
        done(here.callbacks["on_refused"](f"server{number}", {"!room"}, ["$10"]))
    assert len(here.backlogged) == 100
    here.clock_ms += HOUR_MS
    here.index.insert([(11, "here", "!room", "$11", "@alice:here", NOW_MS + 2 * HOUR_MS)])
    done(here.callbacks["on_refused"]("another", {"!room"}, ["$11"]))
    assert len(here.backlogged) == 101


@pytest.mark.requirement("P3", "H7")
@pytest.mark.parametrize("denied", ["here", "there"])
def test_what_an_acl_holds_back_goes_out_as_soon_as_it_is_lifted(denied: str) -> None:
    here = Here(NOW_MS + HOUR_MS, [12])
    start(here)
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    here.denied = {denied}
    for _ in range(12):
        assert done(next_batch()) is None
        here.clock_ms += 60_000
    assert here.settled == [], "the push and its row stay"
    # Another change does not lift it.
    here.woken.clear()
    here.change_acl("!room")
    assert here.woken == []
    here.denied = set()
    here.change_acl("!elsewhere")
    assert here.woken == []
    here.change_acl("!room")
    assert here.woken == ["there"]
    assert done(next_batch()).event_ids == ["$12"]


@pytest.mark.requirement("P3", "H7")
def test_who_leaves_while_an_acl_denies_it_gets_nothing() -> None:
    here = Here(NOW_MS + HOUR_MS, [12])
    start(here)
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    here.denied = {"there"}
    assert done(next_batch()) is None
    here.gone = {"there"}
    here.clock_ms += 600_000
    assert done(next_batch()) is None
    assert here.settled == [False]
    here.denied = here.gone = set()
    here.change_acl("!room")
    assert done(next_batch()) is None


@pytest.mark.requirement("H7")
def test_what_was_refused_goes_out_as_soon_as_the_acl_changes() -> None:
    """The other server may know of it earlier than this one, and later."""
    here = Here(NOW_MS + HOUR_MS, [12, 13])
    start(here)
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    for _ in range(20):
        here.clock_ms += 72_000
        done(here.callbacks["on_refused"]("there", {"!room"}, done(next_batch()).event_ids))
    assert done(next_batch()) is None
    here.woken.clear()
    here.change_acl("!room")
    assert here.woken == ["there"]
    first = done(next_batch())
    done(here.callbacks["on_refused"]("there", {"!room"}, first.event_ids))
    here.clock_ms += 700
    second = done(next_batch())
    done(here.callbacks["on_acknowledged"]("there", [("!room", second.event_ids[0])]))
    assert {*second.event_ids, *done(next_batch()).event_ids} == {"$12", "$13"}


@pytest.mark.requirement("H3", "H7")
def test_whom_an_acl_denies_is_looked_at_ever_less_often() -> None:
    here = Here(NOW_MS + HOUR_MS, [12])
    here.denied = {"there"}
    start(here)
    looks = 0
    until_ms = NOW_MS + HOUR_MS // 2
    while here.clock_ms < until_ms:
        looks += 1
        assert done(here.callbacks["serve_backlog_from"]("there", 50)) is None
        here.clock_ms += max(here.timers[0].delay_ms, 1)
        # New events change nothing.
        here.callbacks["on_new_events"](["!room"])
    assert looks <= 15
    assert here.asked["!room"] <= 1, "nothing is read before it may be sent"


@pytest.mark.requirement("H3", "H7")
def test_whom_an_acl_denies_is_forgotten_once_all_has_expired() -> None:
    here = Here(NOW_MS - 1, [12])
    here.denied = {"there"}
    here.in_database = 10
    start(here)
    assert done(here.callbacks["serve_backlog_from"]("there", 50)) is None
    here.clock_ms += HOUR_MS // 2
    done(here.timers[0].function("there"))
    assert here.settled == []
    here.clock_ms += HOUR_MS
    here.index.expire(here.clock_ms, 100)
    done(here.timers[0].function("there"))
    assert here.settled == [False]


@pytest.mark.requirement("H7", "P2")
def test_what_waits_for_a_server_goes_out_once_it_can_be_reached() -> None:
    here = Here(NOW_MS + HOUR_MS, [12, 13])
    start(here)
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    for _ in range(8):  # none of them gets through
        assert len(done(next_batch()).event_ids) == 1
        assert done(next_batch()) is None
        here.clock_ms += 360_000
    assert done(next_batch()) is not None
    assert done(next_batch()) is None
    here.woken.clear()
    here.callbacks["on_reachable"]("there")
    assert here.woken == ["there"]
    sent = done(next_batch()).event_ids
    assert done(next_batch()) is None, "it may not know the room"
    done(here.callbacks["on_acknowledged"]("there", [("!room", sent[0])]))
    assert {*sent, *done(next_batch()).event_ids} == {"$12", "$13"}


@pytest.mark.requirement("H7", "P2", "E4")
def test_what_a_server_lacks_that_was_never_reached_becomes_a_push() -> None:
    """Synapse has nothing to catch up from, and forgets what it has in memory."""
    here = Here(NOW_MS + HOUR_MS, [10, 11])
    start(here)
    here.in_database = 11
    here.woken.clear()
    here.callbacks["on_reachable"]("elsewhere")
    assert here.woken == ["elsewhere"]
    assert done(here.callbacks["serve_backlog_from"]("elsewhere", 50)).event_ids == ["$10"]


@pytest.mark.requirement("H7", "E4")
@pytest.mark.parametrize("first_load_fails", [False, True])
def test_before_it_is_known_who_may_get_it_nothing_goes_out(*, first_load_fails: bool) -> None:
    """Synapse's own selection knows of no ACL. It has to do if the first load fails."""
    here = Here(NOW_MS + HOUR_MS, [12])
    handler = install(here)
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    assert done(next_batch()) is None

    def fail() -> None:
        raise OSError("the connection is lost")

    if first_load_fails:
        here.before_newcomers = fail
        with pytest.raises(OSError, match="lost"):
            done(handler.load())
        with pytest.raises(LeftToSynapseError):
            done(next_batch())
        here.before_newcomers = lambda: None
    done(handler.load())
    assert here.woken == ["there"]
    assert done(next_batch()).event_ids == ["$12"]


@pytest.mark.requirement("P3", "H7")
def test_while_this_server_may_not_send_the_push_waits() -> None:
    here = Here(NOW_MS + HOUR_MS, [12])
    start(here)
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    here.gone = {"here"}
    assert done(next_batch()) is None
    assert here.settled == []
    assert here.timers[0].delay_ms <= 60_001, "it looks again"
    here.gone = set()
    here.clock_ms += 1_000
    assert done(next_batch()).event_ids == ["$12"]


def with_others(rooms: int = 2) -> Here:
    """Something is left to push of ``!room``, which cannot be read, and of others after it."""
    here = Here(NOW_MS + HOUR_MS, [12])
    here.failing["!room"] = ValueError("what is stored of it makes no sense")
    start(here)
    for number in range(rooms):
        here.backlogged.append((f"!good{number}", 0))
        event = (13 + number, "here", f"!good{number}", f"$good{number}", "@alice:here")
        here.index.insert([(*event, NOW_MS + HOUR_MS)])
        here.in_database = 13 + number
    return here


@pytest.mark.requirement("H1", "H2", "P7")
def test_one_room_that_fails_does_not_spoil_its_destination(
    caplog: pytest.LogCaptureFixture,
) -> None:
    here = with_others()
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    assert done(next_batch()).event_ids == ["$good0"]
    assert done(next_batch()).event_ids == ["$good1"]
    # Whoever asks, it is left alone meanwhile, and Synapse sends nothing of the others anew.
    for _ in range(5):
        assert done(next_batch()) is None
    assert here.asked["!room"] == 1
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "!room" in line.message
    here.clock_ms += 1_201
    for _ in range(3):
        done(next_batch())
    assert here.asked["!room"] == 2
    here.clock_ms += 1_201
    for _ in range(3):
        done(next_batch())
    assert here.asked["!room"] == 2, "later each time"
    here.failing.clear()
    here.clock_ms += 1_201
    assert "$12" in [e for _ in range(3) if (b := done(next_batch())) for e in b.event_ids]


@pytest.mark.requirement("H1")
def test_where_all_rooms_fail_the_selection_is_synapses() -> None:
    here = with_others(0)
    for _ in range(3):
        with pytest.raises(LeftToSynapseError):
            done(here.callbacks["serve_backlog_from"]("there", 50))
    assert here.asked["!room"] == 1
    assert here.timers[0].delay_ms >= 800, "not at once"


@pytest.mark.requirement("H1")
def test_a_room_that_finds_the_database_away_is_not_in_front_any_more() -> None:
    here = with_others()
    here.failing["!room"] = sqlite3.OperationalError("database is locked")
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    with pytest.raises(sqlite3.OperationalError):
        done(next_batch())
    assert done(next_batch()).event_ids == ["$good0"]


@pytest.mark.requirement("H1")
def test_one_room_that_fails_does_not_keep_the_others_from_being_checked() -> None:
    here = with_others()
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    done(next_batch())
    here.callbacks["on_skipped"]("there")  # all of them are dirty
    here.clock_ms += 2_000
    here.asked.clear()
    done(here.timers[0].function("there"))
    assert here.asked == {"!room": 1, "!good0": 1, "!good1": 1}
    assert here.woken == ["there"]


@pytest.mark.requirement("H1")
def test_one_room_that_fails_does_not_keep_the_others_from_their_end() -> None:
    here = with_others()
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    done(next_batch())
    # The back-off of the destination is longer than anything is sticky.
    here.clock_ms += 3 * HOUR_MS
    here.in_database = 10
    here.callbacks["on_skipped"]("there")
    done(here.timers[0].function("there"))
    assert here.settled == [False, False]


@pytest.mark.requirement("H1", "H2", "P7")
@pytest.mark.parametrize("still_watched", [False, True])
def test_an_end_that_cannot_be_written_is_written_again(still_watched: bool) -> None:
    here = Here(NOW_MS + HOUR_MS if still_watched else NOW_MS, [])
    start(here)
    here.failures_to_settle = [sqlite3.IntegrityError("for the test")]
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    with pytest.raises(LeftToSynapseError):
        done(next_batch())
    assert here.settled == []
    assert here.timers[0].delay_ms <= 1_201, "it looks again"
    here.clock_ms += 1_201
    assert done(next_batch()) is None
    assert here.settled == [still_watched]


@pytest.mark.requirement("F3")
def test_a_newcomer_that_cannot_be_reached_is_left_to_the_ordinary_queue() -> None:
    here = Here(NOW_MS + HOUR_MS, [])
    start(here)
    (timer,) = here.timers
    done(timer.function(*timer.args))
    here.index.insert([(12, "here", "!room", "$12", "@alice:here", NOW_MS + HOUR_MS)])
    here.callbacks["on_new_events"](["!room"])
    here.in_database = 12
    assert done(here.callbacks["serve_backlog_from"]("there", 50)) is None
    assert here.timers[0].delay_ms == GRACE_MS + 1


@pytest.mark.requirement("P3")
def test_traffic_does_not_put_off_the_next_check() -> None:
    here = Here(NOW_MS + HOUR_MS, [])
    here.in_database = 11
    start(here)
    (timer,) = here.timers
    done(timer.function(*timer.args))
    assert here.timers[0].delay_ms == 1_000
    check = here.timers[0]
    here.clock_ms += 900
    done(here.callbacks["on_acknowledged"]("there", [("!elsewhere", "$any")]))
    here.callbacks["on_catch_up_recorded"]("there")
    assert here.timers[0] is check, "it is set for the same time"
    # Less and less often, until there is progress.
    here.clock_ms += 101
    done(here.timers[0].function("there"))
    assert here.timers[0].delay_ms == 2_000
    here.in_database = 12
    here.index.insert([(12, "here", "!room", "$12", "@alice:here", NOW_MS + HOUR_MS)])
    here.callbacks["on_skipped"]("there")
    assert done(here.callbacks["serve_backlog_from"]("there", 50)).event_ids == ["$12"]
    here.clock_ms += 500
    done(here.timers[0].function("there"))
    assert here.timers[0].delay_ms == 1_000


@pytest.mark.requirement("E3", "P3")
def test_what_was_confirmed_is_pushed_again_by_an_order_only() -> None:
    """The server has all up to 10. It is pushed that once more, with what it lacks."""
    here = Here(NOW_MS + HOUR_MS, [8, 9, 12])
    start(here)
    next_batch = functools.partial(here.callbacks["serve_backlog_from"], "there", 50)
    assert done(next_batch()).event_ids == ["$12"]
    here.woken.clear()
    order = PushAgain("an order", "there", "!room")
    # This process does not send to that one.
    here.orders.set(pushes=[order, PushAgain("another's", "not mine", "!room")])
    assert here.recorded_again == [("there", "!room")]
    assert (here.ended_orders, here.woken) == (["an order"], ["there"])
    sent: list[str] = []
    while batch := done(next_batch()):
        sent += batch.event_ids
        done(here.callbacks["on_acknowledged"]("there", [("!room", e) for e in batch.event_ids]))
    assert sent == ["$8", "$9", "$12"]
    # It is done once, although it is there until the next read.
    here.orders.set(pushes=[order])
    assert here.recorded_again == [("there", "!room")]
    # Whoever orders it again and again has it wait longer each time.
    here.orders.set(pushes=[PushAgain("the next", "there", "!room")])
    assert done(next_batch()) is None
    here.clock_ms += 7_000
    assert done(next_batch()).event_ids == ["$8"]


@pytest.mark.requirement("E3", "H1")
def test_who_is_not_in_the_room_is_pushed_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    here = Here(NOW_MS + HOUR_MS, [8])
    start(here)
    here.gone = {"there"}
    here.orders.set(pushes=[PushAgain("an order", "there", "!room")])
    assert (here.recorded_again, here.ended_orders) == ([], ["an order"])
    assert "there is not in !room: nothing is pushed (an order)" in caplog.text


@pytest.mark.requirement("E3", "H1")
def test_an_order_that_cannot_be_noted_is_begun_once() -> None:
    """And it keeps no other from its turn."""
    here = Here(NOW_MS + HOUR_MS, [8])
    start(here)
    here.failures_to_end = [ValueError("for the test")]
    orders = [PushAgain(name, "there", room) for name, room in (("a", "!room"), ("b", "!other"))]
    here.orders.set(pushes=orders)
    assert here.recorded_again == [("there", "!room"), ("there", "!other")]
    assert here.ended_orders == ["b"]
    (timer,) = here.timers
    done(timer.function(*timer.args))
    assert here.recorded_again == [("there", "!room"), ("there", "!other")]
    assert "a" in here.ended_orders


@pytest.mark.requirement("E3")
def test_what_was_ordered_while_this_process_was_down_is_done() -> None:
    here = Here(NOW_MS + HOUR_MS, [8])
    here.orders.set(pushes=[PushAgain("an order", "there", "!room")])
    handler = install(here)
    assert here.ended_orders == []
    done(handler.load())
    assert here.ended_orders == ["an order"]
