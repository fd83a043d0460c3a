"""What a newcomer is pushed first, and that all the rest follows (P3, P7, H3)."""

import random
from collections import Counter

import pytest

from synapse_sticky.backoff import Backoff
from synapse_sticky.handlers.joins.order import (
    MOST_FIRST,
    MOST_OF_SENDER,
    OwnEvent,
    places_of_first,
)
from synapse_sticky.handlers.joins.push import Push
from synapse_sticky.handlers.joins.rooms import PushedRooms
from tests.unit.pushes import choose
from tests.unit.test_joins import HOUR_MS, NOW_MS, Here
from tests.unit.test_limits import done

WINDOW = 48
ROOM = "!room"


def some_events(chance: random.Random, count: int, senders: int) -> list[OwnEvent]:
    """Some senders send much more than others."""
    return [
        (number * 2 + 1, f"${number * 2 + 1}", f"@u{int(senders * chance.random() ** 3)}:here")
        for number in range(count)
    ]


@pytest.mark.requirement("P3")
@pytest.mark.parametrize("seed", range(100))
def test_the_senders_take_turns_each_with_its_newest(seed: int) -> None:
    chance = random.Random(seed)
    own = some_events(chance, chance.randrange(400), chance.randint(1, 150))
    # Naively: whoever had the fewest turns and has the newest event left is next.
    left: dict[str, list[OwnEvent]] = {}
    for event in own:
        left.setdefault(event[2], []).append(event)
    expected: list[str] = []
    for _ in range(MOST_OF_SENDER):
        turn = sorted((events.pop() for events in left.values() if events), reverse=True)
        expected += [event_id for _, event_id, _ in turn]
    places = places_of_first(own)
    assert sorted(places, key=places.__getitem__) == expected[:MOST_FIRST]
    assert sorted(places.values()) == list(range(len(places)))


class Room:
    """A room with these own events, and a server that has just joined it."""

    def __init__(self, own: list[OwnEvent]) -> None:
        self.here = Here(NOW_MS + HOUR_MS, [])
        self.here.index.insert(
            (at, "here", ROOM, event_id, sender, NOW_MS + HOUR_MS) for at, event_id, sender in own
        )
        self.here.in_database = max((at for at, _, _ in own), default=0)
        self.here.index.advance("here", self.here.in_database)
        self.rooms = PushedRooms(self.here, self.here, WINDOW)  # type: ignore[arg-type]
        self.push = Push(
            "there", ROOM, position=0, watch_until_ms=NOW_MS + HOUR_MS, backoff=Backoff(500, 5_000)
        )
        self.rooms.add(self.push)
        self.push.acknowledge("$of-before", NOW_MS)
        done(self.rooms.ask_if_dirty(self.push))

    def batch(self) -> list[str]:
        self.rooms.update(self.push)
        return choose(self.push, 50, self.here.now_ms())

    def deliver(self, event_ids: list[str]) -> None:
        for event_id in event_ids:
            assert self.push.acknowledge(event_id, self.here.now_ms())
            self.push.mark_delivered(event_id)


@pytest.mark.requirement("P3", "D7")
def test_a_flood_is_not_in_front_of_who_is_there() -> None:
    """300 events of one user came after one each of 40 others."""
    others = [(at, f"${at}", f"@user{at}:here") for at in range(1, 41)]
    room = Room([*others, *((at, f"${at}", "@mallory:here") for at in range(100, 400))])
    first = room.batch()
    assert {event_id for _, event_id, _ in others} < set(first)
    assert "$399" in first
    assert "$100" not in first
    assert first == sorted(first, key=lambda e: int(e[1:])), "in one transaction, oldest first (P5)"


@pytest.mark.requirement("P3", "P7")
@pytest.mark.parametrize("seed", range(30))
def test_all_the_rest_follows_once(seed: int) -> None:
    chance = random.Random(seed)
    own = some_events(chance, chance.randrange(1, 600), chance.randint(1, 60))
    room, sent = Room(own), Counter[str]()
    places = dict(room.push.first)
    under_way: list[str] = []
    rounds = 0
    while room.push.is_open or not rounds:
        batch = room.batch()
        sent.update(batch)
        assert len(under_way) + len(batch) <= WINDOW
        chance.shuffle(under_way := under_way + batch)
        # It takes them in whatever order.
        count = chance.randint(1, len(under_way)) if under_way else 0
        room.deliver(under_way[:count])
        del under_way[:count]
        # Those that go first are not behind any other.
        if set(batch) - places.keys():
            assert places.keys() <= sent.keys()
        assert len(room.push.finished) <= MOST_FIRST + 2 * WINDOW, "memory follows the gaps"
        room.rooms.update(room.push)
        rounds += 1
        assert rounds <= 4 * len(own)
    assert sent == Counter(event_id for _, event_id, _ in own)


@pytest.mark.requirement("P7")
def test_after_a_loss_the_same_goes_first() -> None:
    own = [(at, f"${at}", "@mallory:here") for at in range(1, 301)]
    room = Room([*own, (400, "$400", "@alice:here")])
    first = room.batch()
    assert "$400" in first
    for event_id in first:
        assert room.push.acknowledge(event_id, NOW_MS)
    room.push.mark_lost([s for s in room.push.sent if s.event_id == "$400"], NOW_MS)
    for event_id in first:
        if event_id != "$400":
            room.push.mark_delivered(event_id)
    assert "$400" in room.batch()


@pytest.mark.requirement("H3")
def test_many_newcomers_at_once_look_once() -> None:
    room = Room([(at, f"${at}", "@alice:here") for at in range(1, 200)])
    first = room.push.first
    for number in range(5_000):
        push = Push(
            f"s{number}", ROOM, position=0, watch_until_ms=NOW_MS, backoff=Backoff(500, 5_000)
        )
        room.rooms.add(push)
        done(room.rooms.ask_if_dirty(push))
        assert push.first is first
    # A later one is told of what came meanwhile.
    room.here.index.insert([(500, "here", ROOM, "$500", "@alice:here", NOW_MS + HOUR_MS)])
    room.here.clock_ms += 200
    push = Push("late", ROOM, position=0, watch_until_ms=NOW_MS, backoff=Backoff(500, 5_000))
    room.rooms.add(push)
    done(room.rooms.ask_if_dirty(push))
    assert push.first["$500"] == 0
