"""What watching for newcomers costs (H1, H3): as counts, with the real index and bookkeeping.

The homeserver, its clock and the other servers are made up.
"""

import functools
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twisted.internet import defer

from synapse_sticky.backoff import Backoff
from synapse_sticky.config import JoinsConfig
from synapse_sticky.handlers.joins.destinations import Destinations
from synapse_sticky.handlers.joins.due import DueTimes
from synapse_sticky.handlers.joins.finished import Finished
from synapse_sticky.handlers.joins.handler import JoinsHandler
from synapse_sticky.handlers.joins.push import Push
from synapse_sticky.handlers.joins.rooms import PushedRooms
from synapse_sticky.handlers.joins.sent import GRACE_MS, Sent
from synapse_sticky.handlers.joins.tables import Newcomer
from synapse_sticky.handlers.joins.watch_quota import WatchQuota
from tests.unit.test_joins import HOUR_MS, NOW_MS, Here
from tests.unit.test_limits import done
from tests.unit.test_questions import Clock, Timer

MOST_IN_A_STEP = 20


class CountedIndex:
    """The real index. Counts what is read of rooms' own events."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self.reads = self.rows = 0

    def own_events(self, *args: Any) -> Any:
        found = self._index.own_events(*args)
        self.reads += 1
        self.rows += len(found)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)


class Crowd(Here):
    """So many servers have newly joined each of some rooms, and take part in nothing else.

    steps: how many reads of the index there were from one turn of the others to the next.
    """

    def __init__(self, servers: int, rooms: int = 1, **options: Any) -> None:
        super().__init__(NOW_MS + HOUR_MS, [])
        self.clock = Clock()
        self.index: Any = CountedIndex(self.index)
        self.keys = [(f"server{s}", f"!room{r}") for s in range(servers) for r in range(rooms)]
        self.position = 10
        self.in_database = 0
        self.confirmed = 0
        self.looks: list[str] = []
        self.steps: list[int] = []
        self._before = 0
        hs: Any = self
        self.handler = JoinsHandler(
            *(hs, hs, hs, hs, hs, hs, hs, JoinsConfig(**options)),
            *(self.orders, self.end_order),
        )
        self.handler.install()
        done(self.handler.load())

    def now_ms(self) -> int:
        return self.clock.clock_ms if hasattr(self, "clock") else NOW_MS

    def steady_ms(self) -> int:
        return self.now_ms()

    def call_later(self, delay_ms: int, what: str, function: Any, *args: Any) -> Timer:  # type: ignore[override]
        return self.clock.call_later(delay_ms, what, function, *args)

    async def give_way(self) -> None:
        self.steps.append(self.index.reads - self._before)
        self._before = self.index.reads
        done(defer.succeed(None))

    def begin_steps(self) -> None:
        self.steps, self._before = [], self.index.reads

    async def newcomers(self) -> list[Newcomer]:
        return [Newcomer(server, room, 10, NOW_MS + HOUR_MS) for server, room in self.keys]

    async def may_receive(self, room_id: str, destination: str) -> bool:
        self.looks.append(room_id)
        return True

    def positions(self) -> dict[str, int]:
        return {"here": self.position}

    async def referenced(self, event_ids: Any) -> set[str]:
        self.confirmed += 1
        return set()

    def batch(self, server: str = "server0") -> Any:
        return done(self.callbacks["serve_backlog_from"](server, 50))

    def settle_all(self) -> None:
        """Each lacks nothing, which has been stored."""
        for server, _ in self.keys:
            assert self.batch(server) is None
        assert len(self.settled) == len(self.keys)
        self.looks.clear()

    def send(self, sender: str = "@alice:here", room_id: str = "!room0") -> str:
        """A new sticky event, which the index has taken in."""
        self.position += 1
        event_id = f"${self.position}"
        row = (self.position, "here", room_id, event_id, sender, self.now_ms() + HOUR_MS)
        self.index.insert([row])
        self.callbacks["on_new_events"]({room_id})
        self.index.advance("here", self.position)
        self.in_database = self.position if sender == "@alice:here" else self.in_database
        return event_id

    def acknowledge(self, event_id: str, server: str = "server0", room_id: str = "!room0") -> None:
        done(self.callbacks["on_acknowledged"](server, [(room_id, event_id)]))

    def run(self, for_ms: int) -> None:
        self.clock.run(self.now_ms() + for_ms)

    def reads_of(self, act: Callable[[], object]) -> tuple[int, int]:
        """How often the index is read meanwhile, and how many rows that gives."""
        before = self.index.reads, self.index.rows
        act()
        return self.index.reads - before[0], self.index.rows - before[1]


@pytest.fixture
def no_garbage() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()


@pytest.mark.requirement("H1", "H3")
def test_events_of_others_cost_nothing() -> None:
    crowd = Crowd(200)
    crowd.settle_all()
    for _ in range(50):
        crowd.send()
    crowd.run(2 * GRACE_MS)
    crowd.send("@bob:there")
    pending = crowd.clock.pending()
    reads, rows = crowd.reads_of(lambda: [crowd.send("@bob:there") for _ in range(10)])
    assert (reads, rows) == (10, 0), "one look at the room each, and not at its own events"
    assert crowd.clock.pending() == pending


@pytest.mark.requirement("H1", "H3")
def test_an_own_event_is_not_looked_at_for_each_newcomer_before_it_may_be_lost() -> None:
    crowd = Crowd(200)
    crowd.settle_all()
    reads, rows = crowd.reads_of(crowd.send)
    assert (reads, rows) == (1, 1)
    assert crowd.reads_of(lambda: crowd.run(GRACE_MS)) == (0, 0)
    crowd.begin_steps()
    reads, _ = crowd.reads_of(lambda: crowd.run(100))
    assert reads == 200
    assert max(crowd.steps) <= MOST_IN_A_STEP, "others have their turn in between"
    assert len(set(crowd.woken)) == 200, "and each is pushed the event"


@pytest.mark.requirement("H1", "H3", "F3")
def test_who_does_not_answer_costs_nothing_more_with_each_event() -> None:
    crowd = Crowd(100)
    crowd.settle_all()
    first = crowd.send()
    crowd.run(GRACE_MS + 100)
    events = 20
    sent = [first, *(crowd.send() for _ in range(events))]
    reads, _ = crowd.reads_of(lambda: crowd.run(GRACE_MS + 100))
    assert reads == 0
    # All of it is there once the server is back.
    server, found = "server7", []
    while (batch := crowd.batch(server)) is not None:
        found += batch.event_ids
        for event_id in batch.event_ids:
            crowd.acknowledge(event_id, server)
    assert found == sent


@pytest.mark.requirement("H1", "H3")
def test_an_event_is_not_even_compared_with_who_is_known_to_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = Counter[str]()
    is_behind = Destinations.is_behind

    def counting(self: Destinations, push: Push) -> bool:
        compared[push.destination] += 1
        return is_behind(self, push)

    monkeypatch.setattr(Destinations, "is_behind", counting)
    crowd = Crowd(100)
    crowd.settle_all()
    first = crowd.send()
    crowd.run(GRACE_MS + 100)  # they lack it
    crowd.send()
    crowd.run(GRACE_MS + 100)  # and are found to wait
    compared.clear()
    for _ in range(20):
        crowd.send()
        crowd.run(GRACE_MS + 100)
    assert compared.total() == 0
    assert first in crowd.batch("server7").event_ids
    crowd.acknowledge(first, "server7")
    crowd.send()
    crowd.run(GRACE_MS + 100)
    assert compared == {"server7": 1}, "something has changed for this one"


@pytest.mark.requirement("F3", "P7")
def test_who_has_acknowledged_by_then_is_not_looked_at() -> None:
    crowd = Crowd(1, confirm=False)
    crowd.settle_all()
    crowd.woken.clear()
    for _ in range(5):
        crowd.acknowledge(crowd.send())
        crowd.run(GRACE_MS + 100)
        while (batch := crowd.batch()) is not None:
            pytest.fail(f"sent again: {batch}")
    assert crowd.settled.count(True) >= 2, "it lacks nothing, and that is stored"


@pytest.mark.requirement("H1", "H3")
@pytest.mark.usefixtures("no_garbage")
@pytest.mark.parametrize("is_asked_for", [False, True])
def test_memory_is_not_the_product_of_events_and_newcomers(*, is_asked_for: bool) -> None:
    before = sum(isinstance(thing, Sent) for thing in gc.get_objects())
    crowd = Crowd(20)
    crowd.settle_all()
    counts = []
    for _ in range(3):
        for _ in range(300):
            crowd.send()
        crowd.run(GRACE_MS + 100)
        if is_asked_for:
            for server, _ in crowd.keys:
                crowd.batch(server)
        counts.append(sum(isinstance(thing, Sent) for thing in gc.get_objects()) - before)
    assert counts[2] <= 20 * 130
    assert counts[2] <= counts[1] + 20 * 2, "it does not grow with the events"


@pytest.mark.requirement("H3", "P7")
def test_one_event_that_is_left_open_does_not_make_the_others_remembered() -> None:
    crowd = Crowd(1, confirm=False)
    crowd.settle_all()
    crowd.send()
    sent = [crowd.send() for _ in range(300)]
    for event_id in sent:
        crowd.acknowledge(event_id)
    crowd.run(GRACE_MS + 3_000)
    batch = crowd.batch()
    assert batch.event_ids == ["$11"], "whatever was acknowledged, however late in the order"
    assert crowd.reads_of(crowd.batch)[1] <= 2 * 64


@pytest.mark.requirement("H3")
def test_a_batch_looks_at_the_rooms_with_something_to_send() -> None:
    crowd = Crowd(1, rooms=500)
    crowd.settle_all()
    crowd.send(room_id="!room7")
    crowd.send(room_id="!room9")
    crowd.run(GRACE_MS + 1)
    crowd.looks.clear()
    assert [crowd.batch().room_id, crowd.batch().room_id] == ["!room7", "!room9"]
    assert crowd.batch() is None
    assert crowd.looks == ["!room7", "!room9"]
    crowd.looks.clear()
    reads, _ = crowd.reads_of(lambda: crowd.acknowledge("$11", room_id="!room7"))
    assert reads == 0, "work follows the answer"
    crowd.callbacks["on_catch_up_recorded"]("server0")
    assert crowd.batch() is None
    assert len(crowd.looks) <= 2


@pytest.mark.requirement("P2", "H3")
def test_synapses_backlog_is_read_once_and_after_it_has_grown() -> None:
    crowd = Crowd(1)
    reads = 0

    async def backlog(destination: str) -> list[tuple[str, int]]:
        nonlocal reads
        reads += 1
        return crowd.backlogged

    crowd.backlog = backlog  # type: ignore[method-assign]
    crowd.settle_all()
    event_id = crowd.send(room_id="!other")
    crowd.run(GRACE_MS + 1)
    assert crowd.batch() is None
    assert reads == 1
    crowd.backlogged = [("!other", 11)]
    crowd.callbacks["on_skipped"]("server0")
    assert crowd.batch().event_ids == [event_id]
    assert crowd.batch() is None
    assert reads == 2


@pytest.mark.requirement("H1", "P3")
def test_too_many_newcomers_are_pushed_everything_and_not_watched() -> None:
    crowd = Crowd(3, watched=2)
    first = crowd.send()
    for server, _ in crowd.keys:
        assert crowd.batch(server).event_ids == [first], "each gets what was there at its join"
        crowd.acknowledge(first, server)
    crowd.run(60_000)
    for server, _ in crowd.keys:
        crowd.batch(server)
    assert crowd.confirmed == 2, "the acknowledgement of the third one has to do"
    assert sorted(crowd.settled) == [False, True, True]
    later = crowd.send()
    crowd.run(GRACE_MS + 1)
    sent = {s: batch.event_ids for s, _ in crowd.keys if (batch := crowd.batch(s))}
    assert sent == {"server0": [later], "server1": [later]}


@pytest.mark.requirement("H1", "P7")
def test_while_the_index_is_made_anew_the_look_at_newcomers_waits() -> None:
    crowd = Crowd(3)
    crowd.settle_all()
    event_id = crowd.send()
    crowd.is_whole = False
    crowd.run(2 * GRACE_MS)
    crowd.is_whole = True
    crowd.run(GRACE_MS + 1)
    assert [crowd.batch(server).event_ids for server, _ in crowd.keys] == [[event_id]] * 3


@pytest.mark.requirement("H1")
def test_newcomers_are_counted_by_room_and_hour(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    quota = WatchQuota(2)
    admit = functools.partial(quota.admit, "!room")
    for _ in range(10):
        assert admit("0", NOW_MS), "one that joins again and again is one"
    joining = [admit(f"{n}", NOW_MS + n) for n in range(1, 4)]
    assert joining == [True, False, False]
    assert quota.admit("!other", "0", NOW_MS)
    assert len(caplog.records) == 1, "it is said once an hour"
    assert not admit("4", NOW_MS + HOUR_MS - 1)
    assert admit("1", NOW_MS + HOUR_MS - 1), "it is watched already"
    assert admit("4", NOW_MS + HOUR_MS)
    assert admit("5", NOW_MS - HOUR_MS), "the clock was set back"
    assert not WatchQuota(0).admit("!room", "0", NOW_MS)


@pytest.mark.requirement("H1", "H3")
def test_what_is_remembered_of_newcomers_is_bounded() -> None:
    quota = WatchQuota(30_000)
    for room in range(5):
        for n in range(30_000):
            assert quota.admit(f"!{room}", f"{n}", NOW_MS)
    assert sum(len(hour.admitted) for hour in quota._hours.values()) == 90_000
    for room in range(20_000):
        quota.admit(f"!more{room}", "0", NOW_MS)
    assert len(quota._hours) == 10_000


@pytest.mark.requirement("H3")
def test_what_is_due_first_comes_first_and_nothing_piles_up() -> None:
    times = DueTimes()
    for number in range(1_000):
        times.set("a", 50 + number % 2)
        times.set("b", 50)
        times.set(f"c{number % 3}", 100)
    times.set("a", None)
    assert times.first() == (50, "b")
    assert times.due(50) == ["b"]
    assert sorted(times.due(100)) == ["b", "c0", "c1", "c2"]
    assert times.get("a") is None
    times.set("b", 200)
    assert times.first() == (100, "c1"), "of those due at once, the one that was set first"
    assert len(times._heap) <= 2 * len(times) + 64
    assert len(times) == 4


@pytest.mark.requirement("P7", "F3")
def test_what_was_not_read_is_not_finished() -> None:
    """Behind the page, the newcomer has acknowledged some events and lacks one in between."""
    crowd = Crowd(0)
    rooms = PushedRooms(crowd, crowd, 48)  # type: ignore[arg-type]
    push = Push(
        "server0", "!room0", position=0, watch_until_ms=NOW_MS + HOUR_MS, backoff=Backoff(1, 2)
    )
    for _ in range(150):
        crowd.send()
    rooms.update(push)
    late = [crowd.send() for _ in range(4)]
    acknowledged = [late[0], late[2], late[3]]
    rooms.take_in_named(push, acknowledged)
    for event_id in acknowledged:
        assert push.acknowledge(event_id, NOW_MS)
    push.mark_delivered(late[0])
    push.mark_delivered(late[2])
    rooms.update(push)
    lacks, has = int(late[1][1:]), int(late[0][1:])
    assert has in push.finished
    assert lacks not in push.finished


@pytest.mark.requirement("H3")
def test_runs_follow_the_gaps() -> None:
    finished = Finished()
    for stream_id in (3, 9, 5, 7, 20):
        finished.add(stream_id)
    finished.join([6], 10)
    assert [n for n in range(25) if n in finished] == [3, 4, 5, 7, 8, 9, 20]
    assert finished.end_of(3) == 5
    finished.add(6)
    finished.join([], 100)
    assert (len(finished), finished.last) == (1, 20)
    assert 2 not in finished.after(2)
    assert len(finished.after(21)) == 0
