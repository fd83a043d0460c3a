"""What newcomers are asked, how often, and what their answers lead to (P7, H2, H4).

The clock, the timers and the other server are made up; the bookkeeping is the real one.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import attr
import pytest
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from synapse_sticky.backoff import Backoff
from synapse_sticky.handlers.joins.confirmation.asking import Answer, AnswerKind, Place
from synapse_sticky.handlers.joins.confirmation.confirmation import Confirmation
from synapse_sticky.handlers.joins.confirmation.places import (
    MOST_AT_ONCE,
    MOST_SLOW,
    SLOW_MS,
    Places,
)
from synapse_sticky.handlers.joins.confirmation.questions import OVERDUE_MS, Questions
from synapse_sticky.handlers.joins.push import Push
from synapse_sticky.handlers.joins.sent import MOST_SENDS, PACE_MS, PATIENCE_MS
from tests.unit.pushes import choose
from tests.unit.settable import Settable
from tests.unit.test_limits import done
from tests.unit.test_limits_in_synapse import begin

HOUR_MS = 3_600_000
BEGIN_MS = 1_800_000_000_000
BACKOFF = Backoff(500, 300_000)


@attr.s(auto_attribs=True, eq=False)
class Timer:
    function: Callable[[], Any]
    is_active: bool = True

    def active(self) -> bool:
        return self.is_active

    def cancel(self) -> None:
        self.is_active = False


class Clock(Settable):
    """A homeserver's time, which passes by ``run`` only."""

    def __init__(self) -> None:
        self.clock_ms = BEGIN_MS
        self.fired = 0
        self._timers: list[tuple[int, int, Timer]] = []
        self._numbers = itertools.count()

    def now_ms(self) -> int:
        return self.clock_ms + self.set_by_ms

    def steady_ms(self) -> int:
        return self.clock_ms

    def call_later(self, delay_ms: int, what: str, function: Any, *args: Any) -> Timer:
        timer = Timer(lambda: done(function(*args)))
        heapq.heappush(self._timers, (self.clock_ms + delay_ms, next(self._numbers), timer))
        return timer

    def in_background(self, what: str, function: Any, *args: Any) -> None:
        for result in begin(function(*args)):
            if isinstance(result, Failure):
                result.raiseException()

    def pending(self) -> int:
        return sum(timer.is_active for _, _, timer in self._timers)

    def run(self, until_ms: int) -> None:
        while self._timers and self._timers[0][0] <= until_ms:
            self.clock_ms, _, timer = heapq.heappop(self._timers)
            if timer.is_active:
                timer.is_active = False
                self.fired += 1
                timer.function()
        self.clock_ms = until_ms


class World:
    """Pushes of some rooms to one newcomer, which takes one event of a room each ``takes_ms``.

    many, one: what it answers in place of the truth.
    had: what a newcomer that comes back got before, of this server's own events.
    loses: what it acknowledges and does not take.
    outliers: what it takes once it is sent to it again; until then it has only fetched it.
    """

    def __init__(self, rooms: int, events: int, *, takes_ms: int = 50, window: int = 48) -> None:
        self.clock = Clock()
        self.takes_ms = takes_ms
        self.many: Callable[[], Answer | None] = lambda: None
        self.one: Callable[[], Answer | None] = lambda: None
        self.loses: set[str] = set()
        self.outliers: set[str] = set()
        self.own = {
            f"!{r}": [(r * 1_000 + n, f"${r}.{n}", "@user:here") for n in range(1, events + 1)]
            for r in range(rooms)
        }
        self.window = window
        self.times_sent: Counter[str] = Counter()
        self.asked: list[tuple[int, str, tuple[str, ...]]] = []
        self.taken_ms: dict[str, int] = {}
        self.ended: list[str] = []
        self.had: list[str] = []
        self.pushes: dict[str, Push] = {}
        self.held: dict[str, Push] = {}
        self.unanswered: list[Deferred[None]] = []
        for room_id in self.own:
            self.pushes[room_id] = self.push("there", room_id)
        hs: Any = self.clock
        asking: Any = self
        self.confirmation = Confirmation(
            hs,
            asking,
            is_on=True,
            find=lambda destination, room_id: self.pushes.get(room_id) or self.held.get(room_id),
            retry_at_ms=self.retry_at_ms,
            servers=lambda room_id: 1,
            done=lambda push, limit: self.had[-limit:],
            update=self.update,
            on_progress=self.send,
            on_end=lambda push: self.ended.append(push.room_id),
        )

    def push(self, destination: str, room_id: str) -> Push:
        push = Push(
            destination,
            room_id,
            position=0,
            watch_until_ms=BEGIN_MS + HOUR_MS,
            backoff=BACKOFF,
        )
        push.take_in_last_rows({"here": 10**9}, push.dirty_marks, BEGIN_MS)
        return push

    def hold_a_place(self, destination: str) -> None:
        """Another newcomer is asked for a room of its own, and never answers."""
        room_id = f"!{destination}"
        self.held[room_id] = push = self.push(destination, room_id)
        self.own[room_id] = [(n, f"${destination}.{n}", "@user:here") for n in (1, 2)]
        self.update(push)
        for event_id in [*choose(push, 50, BEGIN_MS), *choose(push, 50, BEGIN_MS)]:
            push.acknowledge(event_id, BEGIN_MS)
        self.confirmation.begin(push, 0)

    def begin(self) -> "World":
        for push in self.pushes.values():
            self.update(push)
            self.send(push)
        return self

    def run(self, ms: int) -> "World":
        """Time passes; what is due is sent, as the timer of the destination sees to."""
        until_ms = self.clock.clock_ms + ms
        while self.clock.clock_ms < until_ms:
            self.clock.run(min(self.clock.clock_ms + 1_000, until_ms))
            for push in self.pushes.values():
                self.update(push)
                if not push.is_open and push.restart_if_lost():
                    self.update(push)
                if push.worth_sending(self.clock.clock_ms):
                    self.send(push)
        return self

    def update(self, push: Push) -> None:
        own = [event for event in self.own[push.room_id] if event[0] >= push.position]
        push.update(own, self.clock.clock_ms, self.window)

    def send(self, push: Push) -> None:
        """Sends a batch, which is acknowledged at once."""
        now_ms = self.clock.clock_ms
        chosen = choose(push, 50, now_ms)
        self.times_sent.update(chosen)
        last_ms = max([now_ms, *(t for e, t in self.taken_ms.items() if e in self._ids(push))])
        for event_id in chosen:
            if self.times_sent[event_id] > 1:
                self.outliers.discard(event_id)
            if event_id not in self.loses:
                last_ms += self.takes_ms
                self.taken_ms.setdefault(event_id, last_ms)
            push.acknowledge(event_id, now_ms)
        if chosen:
            self.confirmation.begin(push)
        if push.worth_sending(now_ms):  # the first transaction has one event only
            self.send(push)

    def _ids(self, push: Push) -> set[str]:
        return {event_id for _, event_id, _ in self.own[push.room_id]}

    def has(self, event_id: str) -> bool:
        return self.taken_ms.get(event_id, 1 << 62) <= self.clock.clock_ms

    # Asking

    async def retry_at_ms(self, destination: str) -> int:
        return 0

    async def referenced(self, event_ids: Collection[str]) -> set[str]:
        return set(event_ids)

    async def has_events(
        self, destination: str, room_id: str, event_ids: Collection[str], limit: int
    ) -> Answer:
        if destination != "there":
            self.unanswered.append(Deferred())
            await self.unanswered[-1]
        self.asked.append((self.clock.clock_ms, "many", tuple(event_ids)))
        return self.many() or self.backfill(room_id, event_ids, limit)

    def backfill(self, room_id: str, event_ids: Collection[str], limit: int) -> Answer:
        """As Synapse does it: the latest events of the room's chain first."""
        found: list[str] = []
        walks = False
        for event_id in reversed([event_id for _, event_id, _ in self.own[room_id]]):
            is_walked_to = walks and event_id not in self.outliers
            walks = self.has(event_id) and (is_walked_to or event_id in event_ids)
            if walks and len(found) < limit:
                found.append(event_id)
        down_to = int(found[-1].partition(".")[2]) if len(found) == limit else 0
        return Answer(AnswerKind.SAYS, found, down_to)

    async def places(self, event_ids: Collection[str]) -> dict[str, Place]:
        found = {}
        for event_id in event_ids:
            room, _, number = event_id.partition(".")
            is_last = int(number) == len(self.own[f"!{room[1:]}"])
            next_ids = [] if is_last else [f"{room}.{int(number) + 1}"]
            found[event_id] = Place(int(number), next_ids)
        return found

    async def has_event(self, destination: str, event_id: str) -> Answer:
        self.asked.append((self.clock.clock_ms, "one", (event_id,)))
        if (answer := self.one()) is not None:
            return answer
        return (
            Answer(AnswerKind.SAYS, [event_id]) if self.has(event_id) else Answer(AnswerKind.LACKS)
        )

    def questions(self) -> int:
        return len(self.asked)

    def everything(self) -> int:
        return sum(len(events) for events in self.own.values())

    def is_over(self) -> bool:
        return not any(push.is_open for push in self.pushes.values()) and not self.clock.pending()


@pytest.mark.requirement("P7", "H4")
def test_far_fewer_questions_than_events() -> None:
    world = World(1, 260).begin().run(30_000)
    assert world.is_over()
    assert set(world.times_sent.values()) == {1}
    assert len(world.times_sent) == 260
    assert world.questions() <= 26
    assert all(kind == "many" for _, kind, _ in world.asked)


@pytest.mark.requirement("P7", "H4")
def test_questions_follow_one_another_whatever_the_number_of_rooms() -> None:
    world = World(80, 5, takes_ms=1_000).begin().run(120_000)
    assert world.is_over()
    assert set(world.times_sent.values()) == {1}
    times_ms = [asked_ms for asked_ms, _, _ in world.asked]
    assert min(b - a for a, b in itertools.pairwise(times_ms)) >= 250
    assert world.questions() <= 200 < world.everything()


@pytest.mark.requirement("P7", "L3")
def test_of_the_last_event_the_acknowledgement_suffices() -> None:
    world = World(3, 5, takes_ms=2_000)
    world.loses = {"$0.5", "$1.5", "$2.5"}
    world.begin().run(60_000)
    assert world.is_over()
    assert set(world.times_sent.values()) == {1}
    assert not any(kind == "one" for _, kind, _ in world.asked)


@pytest.mark.requirement("P7", "H4")
def test_what_no_other_event_references_is_not_asked_for() -> None:
    world = World(1, 20)

    async def nothing(event_ids: Collection[str]) -> set[str]:
        return set()

    world.referenced = nothing  # type: ignore[method-assign]
    assert world.begin().run(10_000).is_over()
    assert world.asked == []


@pytest.mark.requirement("P7", "L3")
def test_what_was_pruned_is_sent_again_once() -> None:
    world = World(1, 40)
    world.loses = {f"$0.{n}" for n in range(1, 31)}
    world.begin().run(PATIENCE_MS - 1_000)
    assert set(world.times_sent.values()) == {1}
    world.loses = set()
    world.run(PATIENCE_MS)
    assert world.is_over()
    # With all of it, as what was not pruned may have been fetched only.
    assert set(world.times_sent.values()) == {2}
    assert len(world.times_sent) == 40
    assert world.questions() <= 30


@pytest.mark.requirement("P7", "H2")
def test_being_slow_is_no_loss() -> None:
    """It is busy with one event, or with each, for longer than it is given time."""
    world = World(1, 10, takes_ms=PATIENCE_MS - 5_000).begin().run(HOUR_MS // 4)
    assert world.is_over()
    assert set(world.times_sent.values()) == {1}
    assert world.questions() <= 80


ANSWERS = {
    "lacks": Answer(AnswerKind.LACKS),
    "has": Answer(AnswerKind.SAYS, ["$0.1"]),
    "silent": Answer(AnswerKind.SILENT, reason="404 to /event"),
    "refuses": Answer(AnswerKind.REFUSES),
    "too large": Answer(AnswerKind.TOO_LARGE),
    "busy": Answer(AnswerKind.BUSY),
    "unreachable": Answer(AnswerKind.UNREACHABLE),
    "says nothing": Answer(AnswerKind.SAYS),
}


@pytest.mark.requirement("P7", "H2", "H3")
@pytest.mark.parametrize("one", ANSWERS)
@pytest.mark.parametrize("many", [name for name in ANSWERS if name not in {"lacks", "has"}])
def test_whatever_it_answers_nothing_is_sent_more_than_twice(many: str, one: str) -> None:
    world = World(2, 60)
    world.many = lambda: ANSWERS[many]
    world.one = lambda: ANSWERS[one]
    world.begin().run(HOUR_MS // 2)
    assert max(world.times_sent.values()) <= MOST_SENDS
    # An hour later all has expired, and nobody asks any more.
    for events in world.own.values():
        events.clear()
    asked = world.run(HOUR_MS // 2).questions()
    assert world.run(HOUR_MS).questions() == asked
    assert asked <= 300
    assert world.clock.pending() == 0


@pytest.mark.requirement("P7")
@pytest.mark.parametrize("kind", [AnswerKind.SILENT, AnswerKind.REFUSES])
def test_without_an_answer_acknowledgements_are_believed_at_a_pace(
    kind: AnswerKind, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(2, 260)
    world.many = lambda: Answer(kind, reason="404 to /backfill")
    world.begin().run(10_000 if kind is AnswerKind.SILENT else 40_000)
    assert world.is_over()
    assert set(world.times_sent.values()) == {1}
    warnings = [r for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == (kind is AnswerKind.SILENT)
    if kind is AnswerKind.SILENT:
        assert world.questions() == 1
        # A plain Synapse that takes 40 a second never has a hundred of a room staged.
        world = World(1, 260, takes_ms=25)
        world.many = lambda: Answer(kind, reason="404 to /backfill")
        world.begin()
        for _ in range(100):
            world.run(100)
            staged = [e for e in world.taken_ms if not world.has(e)]
            assert len(staged) < 100
        assert world.is_over()
        assert PACE_MS * 260 / 48 < 10_000


@pytest.mark.requirement("P7", "H2")
def test_who_cannot_be_reached_is_asked_ever_less_often() -> None:
    world = World(20, 10)
    world.many = lambda: Answer(AnswerKind.UNREACHABLE)
    world.begin().run(HOUR_MS // 2)
    assert world.questions() <= 50
    assert set(world.times_sent.values()) == {1}
    # It may have lost what it had in memory only: all of it goes out once more.
    world.many = lambda: None
    assert world.run(120_000).is_over()
    assert max(world.times_sent.values()) <= MOST_SENDS


@pytest.mark.requirement("P7", "H7")
def test_who_can_be_reached_again_is_asked_soon() -> None:
    world = World(2, 60)
    world.many = lambda: Answer(AnswerKind.UNREACHABLE)
    world.begin().run(600_000)
    asked = len(world.asked)
    world.many = lambda: None
    world.confirmation.reachable("there")
    for push in world.pushes.values():
        world.confirmation.hasten(push)
    world.run(1_500)
    assert len(world.asked) >= asked + 2
    assert world.run(120_000).is_over()


@pytest.mark.requirement("P7", "H2")
def test_who_is_busy_has_lost_nothing() -> None:
    world = World(20, 10)
    world.many = lambda: Answer(AnswerKind.BUSY)
    world.begin().run(300_000)
    world.many = lambda: None
    assert world.run(120_000).is_over()
    assert set(world.times_sent.values()) == {1}


@pytest.mark.requirement("P7", "H1")
def test_who_waits_in_line_for_too_long_is_believed(caplog: pytest.LogCaptureFixture) -> None:
    world = World(1, 260)
    for number in range(MOST_AT_ONCE):
        world.hold_a_place(f"slow{number}")
    caplog.set_level("INFO")
    world.run(1_000).begin().run(OVERDUE_MS)
    assert len(world.times_sent) <= 48
    world.run(15_000)
    assert world.is_over()
    assert set(world.times_sent.values()) == {1}
    assert len([r for r in caplog.records if "Too many servers" in r.message]) == 1
    assert world.asked == []


@pytest.mark.requirement("P7", "H2")
def test_who_waited_in_line_for_too_long_is_still_asked_what_it_had_before() -> None:
    world = World(1, 3)
    for number in range(MOST_AT_ONCE):
        world.hold_a_place(f"slow{number}")
    world.clock.run(BEGIN_MS + 10)
    world.pushes["!0"].is_back = True
    world.had = ["$0.1"]
    world.taken_ms["$0.1"] = BEGIN_MS
    world.begin().run(OVERDUE_MS + 5_000)
    assert not world.pushes["!0"].is_open
    assert world.asked == []
    for room_id in world.held:
        world.own[room_id].clear()
    for unanswered in world.unanswered:
        unanswered.callback(None)
    world.run(2 * OVERDUE_MS)
    # And for what shows that this is no outlier.
    assert [asked for _, _, asked in world.asked if "$0.1" in asked] == [("$0.1",)]
    assert world.asked[-1][2] == ("$0.2",)
    assert not world.pushes["!0"].is_back


class Rejoined(World):
    """A newcomer that was in the room before, and was found to have all of its events."""

    def __init__(self, events: int) -> None:
        super().__init__(1, events)
        own = self.own["!0"]
        self.taken_ms = {event_id: BEGIN_MS for _, event_id, _ in own}
        self.again = self.pushes["!0"]
        self.again.continue_from(own[-1][0] + 1, None, BEGIN_MS)
        self.again.is_back = True
        self.had = [event_id for _, event_id, _ in own]
        self.confirmation.begin(self.again, 0)


@pytest.mark.requirement("P7", "H2", "H4")
def test_who_comes_back_and_has_everything_is_asked_two_questions() -> None:
    world = Rejoined(300).run(60_000)
    assert world.is_over()
    assert world.times_sent == {}
    assert world.questions() == 2
    assert [len(asked) for _, _, asked in world.asked] == [50, 1]


@pytest.mark.requirement("P3", "P7")
@pytest.mark.parametrize("kept", [1, 10])
def test_what_a_join_fetches_by_itself_does_not_hide_that_the_rest_is_lost(kept: int) -> None:
    world = Rejoined(60)
    for _, event_id, _ in world.own["!0"][:-kept]:
        del world.taken_ms[event_id]
    world.run(60_000)
    assert world.is_over()
    assert world.times_sent == Counter(event_id for _, event_id, _ in world.own["!0"])
    assert world.questions() <= 10


@pytest.mark.requirement("P3", "P7")
def test_who_comes_back_and_has_lost_everything_is_asked_for_one() -> None:
    world = Rejoined(20)
    world.taken_ms.clear()
    world.run(60_000)
    assert world.is_over()
    assert set(world.times_sent.values()) == {1}
    assert [asked for _, kind, asked in world.asked if kind == "one"] == [("$0.1",)]


@pytest.mark.requirement("P7", "H2")
def test_who_cannot_say_yet_what_it_has_lacks_nothing() -> None:
    """Synapse's /backfill says nothing while it has partial state, and its /event fails."""
    world = Rejoined(20)
    world.many = lambda: Answer(AnswerKind.SAYS)
    world.one = lambda: Answer(AnswerKind.BUSY)
    world.run(60_000)
    assert world.times_sent == {}
    assert world.again.is_back
    world.many = world.one = lambda: None
    world.run(120_000)
    assert world.is_over()
    assert world.times_sent == {}


@pytest.mark.requirement("L3", "P7")
@pytest.mark.parametrize("outlier", [1, 25, 59])
def test_what_it_has_only_fetched_is_sent_again_once(outlier: int) -> None:
    world = World(1, 60)
    world.outliers = {f"$0.{outlier}"}
    world.begin().run(60_000)
    assert world.is_over()
    assert world.outliers == set()
    # With all of it, as what could not be asked for may be an outlier, too.
    assert set(world.times_sent.values()) == {2}
    assert world.questions() <= 30


@pytest.mark.requirement("P7", "H2")
def test_an_outlier_that_stays_one_is_sent_no_more_than_twice() -> None:
    world = World(2, 60)
    world.outliers = Stubborn(f"$0.{n}" for n in range(1, 60))
    world.begin().run(HOUR_MS // 2)
    assert world.is_over()
    assert max(world.times_sent.values()) == MOST_SENDS
    assert {times for event, times in world.times_sent.items() if event[1] == "1"} == {1}


class Stubborn(set[str]):
    def discard(self, event_id: object, /) -> None:
        """It stays as it is."""


@pytest.mark.requirement("P7", "H2")
def test_what_is_only_fetched_of_before_is_sent_again() -> None:
    world = Rejoined(60)
    world.outliers = {"$0.30"}
    world.times_sent.update(event_id for _, event_id, _ in world.own["!0"])
    world.run(60_000)
    assert world.is_over()
    assert world.outliers == set()
    assert set(world.times_sent.values()) == {2}


@pytest.mark.requirement("P7", "H2", "H4")
@pytest.mark.parametrize("between", [1, 20])
def test_where_others_write_a_cut_answer_tells_of_part_only(between: int) -> None:
    """So many events of others are after each own one; the answer has a hundred in all."""
    world = Rejoined(400)
    world.had = world.had[:: between + 1]
    world.run(60_000)
    assert world.is_over()
    assert world.times_sent == {}
    assert world.questions() <= 8


class Asked:
    """Destinations that are to be asked again and again; each answers in its own time."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.takes_ms: dict[str, int] = {}
        self.under_way = self.most = 0
        self.overdue: set[str] = set()
        self.believed: dict[str, int] = {}
        self.asked: Counter[str] = Counter()
        hs: Any = self.clock
        self.questions = Questions(
            hs,
            self.ask,
            is_believed=self.is_believed,
            on_overdue=self.believe,
        )

    def is_believed(self, destination: str) -> bool:
        return self.believed.get(destination, 0) > self.clock.now_ms()

    def believe(self, destination: str) -> None:
        self.overdue.add(destination)
        self.believed[destination] = self.clock.now_ms() + 2 * OVERDUE_MS

    def add(self, destination: str, takes_ms: int) -> None:
        self.takes_ms[destination] = takes_ms
        self.questions.add(destination, "!room", 0)

    async def ask(self, destination: str, room_id: str) -> int | None:
        if self.is_believed(destination):
            return PACE_MS
        self.asked[destination] += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        answered = Deferred[None]()
        self.clock.call_later(self.takes_ms[destination], "answer", answered_later, answered)
        await answered
        self.under_way -= 1
        return 0

    def run(self, ms: int) -> None:
        self.clock.run(self.clock.clock_ms + ms)


async def answered_later(answered: "Deferred[None]") -> None:
    answered.callback(None)


@pytest.mark.requirement("H3")
def test_few_destinations_are_asked_at_once_each_in_its_turn() -> None:
    asked = Asked()
    for number in range(200):
        asked.add(f"there{number}", 500)
    asked.run(20 * 500)
    assert asked.most == MOST_AT_ONCE
    assert len(asked.asked) == 200
    assert max(asked.asked.values()) - min(asked.asked.values()) <= 1
    assert asked.overdue == set()


@pytest.mark.requirement("H1", "H3")
def test_slow_servers_leave_half_of_the_places_to_others() -> None:
    asked = Asked()
    for number in range(100):
        asked.add(f"slow{number}", 9_900)
    asked.run(60_000)
    asked.asked.clear()
    asked.add("newcomer", 50)
    asked.run(10_000)
    assert asked.asked["newcomer"] >= 30
    assert 5 <= sum(asked.asked.values()) - asked.asked["newcomer"] <= 2 * MOST_SLOW
    assert "newcomer" not in asked.overdue


@pytest.mark.requirement("H3")
def test_who_waits_in_line_takes_no_work() -> None:
    asked = Asked()
    for number in range(5_000):
        asked.add(f"there{number}", 9_900)
    asked.run(10)
    fired = asked.clock.fired
    asked.run(OVERDUE_MS - 1_000)
    assert asked.clock.fired - fired <= 5 * MOST_AT_ONCE
    asked.run(10_000)
    assert len(asked.overdue) >= 5_000 - 5 * MOST_AT_ONCE, "they are told once, and leave the line"


@pytest.mark.requirement("H1", "H3")
def test_places() -> None:
    places = Places()
    for number in range(MOST_AT_ONCE + 2):
        places.wait(f"first{number}")
    places.stop_waiting("first1")
    taken = [places.take(BEGIN_MS) for _ in range(MOST_AT_ONCE + 1)]
    assert taken == [f"first{n}" for n in range(MOST_AT_ONCE + 1) if n != 1] + [None]
    for destination in taken[:-1]:
        assert destination is not None
        places.leave(destination, BEGIN_MS + SLOW_MS)
        places.wait(destination)
    # Of those who were slow, half are asked; the others come later, and are not in front.
    places.wait("new")
    slow = [places.take(BEGIN_MS) for _ in range(MOST_SLOW + 1)]
    assert slow == ["first21", *taken[:MOST_SLOW]]
    assert places.take(BEGIN_MS) == "new"
    assert places.take(BEGIN_MS) is None
    # Who answers in time is slow no more.
    assert slow[1] is not None
    places.leave(slow[1], BEGIN_MS + SLOW_MS - 1)
    places.wait(slow[1])
    assert places.take(BEGIN_MS) == taken[MOST_SLOW]
    assert places.take(BEGIN_MS) == slow[1]
