"""Who arrives late is given the present first: all there is, or the newest of each key (D4, D5)."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import attr
import pytest

from tests.integration.rooms import NO_LIMITS, room_of
from tests.lab import Client, Homeserver, Lab
from tests.lab.client import WITHOUT_TIMELINE, sliding_sticky_events, sticky_events

USERS = 10
KEYS = 5
"""So many of each user."""
FIRST = 1_000
"""So many events fit into a first response."""
MOST_KEYS = 20
MOST_OLDEST = 50
"""Of a sender, and of the oldest events, if not all fit."""
ORDINARY = 100
"""So many a response has in any case that goes on from where its client was."""
RESPONSES = 20

Pages = Iterator[list[str]]
"""What each response has of the room."""
Arrival = Callable[[Client], Callable[[str], Pages]]
"""How a user arrives: what its client has got before, and then, of the room that it joins."""


def by_sync(user: Client, room_id: str, since: str | None) -> Pages:
    user.join(room_id)
    while True:
        answer = user.sync(since, filter_=WITHOUT_TIMELINE)
        since = answer["next_batch"]
        yield sticky_events(answer, room_id)


def by_sliding_sync(user: Client, room_id: str, answer: object) -> Pages:
    user.join(room_id)
    while True:
        answer = user.sliding_sync(answer)
        yield sliding_sticky_events(answer, room_id)


def first_sync(user: Client) -> Callable[[str], Pages]:
    return lambda room_id: by_sync(user, room_id, None)


def next_sync(user: Client) -> Callable[[str], Pages]:
    since = user.sync()["next_batch"]
    return lambda room_id: by_sync(user, room_id, since)


def first_sliding_sync(user: Client) -> Callable[[str], Pages]:
    return lambda room_id: by_sliding_sync(user, room_id, None)


def next_sliding_sync(user: Client) -> Callable[[str], Pages]:
    user.send_sticky(user.create_room())
    answer = user.sliding_sync()
    return lambda room_id: by_sliding_sync(user, room_id, answer)


ARRIVALS = (first_sync, next_sync, first_sliding_sync, next_sliding_sync)


@attr.s(auto_attribs=True)
class Call:
    """A room with many events: of each key, in the order in which they were sent."""

    server: Homeserver
    room_id: str
    users: list[Client]
    sent: dict[tuple[str, str], list[str]] = attr.Factory(dict)
    arrivals: dict[Arrival, Callable[[str], Pages]] = attr.Factory(dict)
    """Of users whose clients are from before the events."""

    def prepare(self) -> None:
        self.arrivals = {arrive: arrive(self.server.user()) for arrive in ARRIVALS}

    def send(self, rounds: int) -> None:
        """So many events of each key, the users side by side."""

        def send(user: Client) -> None:
            for number in range(rounds * KEYS):
                key = str(number % KEYS)
                event_id = user.send_sticky(self.room_id, content={"sticky_key": key, "n": number})
                self.sent.setdefault((user.user_id, key), []).append(event_id)

        with ThreadPoolExecutor(USERS) as pool:
            list(pool.map(send, self.users))
        self.users[0].collect_sticky(self.room_id, self.all, filter_=WITHOUT_TIMELINE)

    @property
    def all(self) -> set[str]:
        return {event_id for of_key in self.sent.values() for event_id in of_key}

    @property
    def newest(self) -> set[str]:
        return {of_key[-1] for of_key in self.sent.values()}

    def pages(self, arrive: Arrival, *, is_early: bool) -> list[list[str]]:
        """What a user gets who joins now, from the first response on that has anything."""
        make = self.arrivals[arrive] if is_early else arrive(self.server.user())
        found = [page for page in islice(make(self.room_id), RESPONSES) if page]
        seen = Counter(event_id for page in found for event_id in page)
        assert seen.keys() == self.all, "none is missing"
        assert max(seen.values()) <= 2, "at most once more"
        assert all(len(page) == len(set(page)) for page in found)
        return found


@pytest.fixture(scope="module")
def call(lab: Lab) -> Iterator[Call]:
    (server,) = lab.servers({"config": NO_LIMITS})
    users = [server.user() for _ in range(USERS)]
    made = Call(server, room_of(*users, via=server), users)
    made.prepare()
    made.send(FIRST // (USERS * KEYS))
    yield made
    lab.close_servers([server])


@pytest.mark.requirement("D4", "D5")
@pytest.mark.parametrize("is_early", [False, True])
@pytest.mark.parametrize("arrive", ARRIVALS)
def test_the_first_response_has_all_there_is(call: Call, arrive: Arrival, is_early: bool) -> None:
    assert len(call.all) == FIRST
    first, *more = call.pages(arrive, is_early=is_early)
    assert {*first} == call.all
    # Only /v3/sync has one position for all rooms, and cannot say that it is past these.
    assert not more or (arrive is next_sync and is_early)


@pytest.fixture(scope="module")
def larger(call: Call) -> Call:
    """The same with more than fits, the last of them by one who floods the room without keys."""
    call.prepare()
    call.send(1)
    mallory = call.server.user()
    mallory.join(call.room_id)
    for number in range(4 * MOST_KEYS):
        event_id = mallory.send_sticky(call.room_id)
        call.sent[mallory.user_id, str(number)] = [event_id]
    call.users[0].collect_sticky(call.room_id, call.all, filter_=WITHOUT_TIMELINE)
    return call


@pytest.mark.requirement("D4", "D5", "D7")
@pytest.mark.parametrize("is_early", [False, True])
@pytest.mark.parametrize("arrive", ARRIVALS)
def test_what_does_not_fit_follows_the_newest_of_each_key(
    larger: Call, arrive: Arrival, is_early: bool
) -> None:
    assert len(larger.all) > FIRST
    first, *more = larger.pages(arrive, is_early=is_early)
    calls_own = {user.user_id for user in larger.users}
    of_users = {ids[-1] for (user_id, _), ids in larger.sent.items() if user_id in calls_own}
    assert of_users <= {*first}, "the whole call"
    if arrive is next_sync and not is_early:
        assert not more, "all that is older than the client's token comes at once"
        return
    # One more of the oldest would be the flood's: it is the newest of all.
    flood = [ids[-1] for (user_id, _), ids in larger.sent.items() if user_id not in calls_own]
    assert {*flood[-MOST_KEYS:]} <= {*first}
    assert arrive is next_sync or len({*flood} & {*first}) == MOST_KEYS
    # The client's token is past what there was before.
    in_any_case = FIRST + ORDINARY if arrive is next_sync else 0
    assert len(first) <= len(of_users) + MOST_KEYS + MOST_OLDEST + in_any_case
    assert all(len(page) <= ORDINARY for page in more)


@pytest.mark.one_process
@pytest.mark.requirement("D4")
def test_without_the_index_the_database_chooses_the_same(larger: Call) -> None:
    arrivals = (first_sync, first_sliding_sync)
    by_index = [larger.pages(arrive, is_early=False) for arrive in arrivals]
    larger.server.configure_module({**NO_LIMITS, "index": {"enabled": False}})
    larger.server.restart()
    assert [larger.pages(arrive, is_early=False) for arrive in arrivals] == by_index
