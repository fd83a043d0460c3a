"""Pages of sliding sync, against a naive stream: each event once, whatever is lost on the way."""

import asyncio
import json
from collections.abc import Collection, Set
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from synapse_sticky.handlers.sliding.handler import (
    SlidingHandler,
    SlidingPage,
    position_of_page,
    token_of_page,
)
from synapse_sticky.index import Position

WRITERS = ("first", "second")


class FakePages:
    """What was stored, and whether that can be done."""

    duty = "sliding"
    migrations: tuple[tuple[str, ...], ...] = ()

    def __init__(self) -> None:
        self.stored: dict[tuple[tuple[str, str, str], str], str] = {}
        self.fails = False

    async def store(self, connection: tuple[str, str, str], token: str, older: str) -> None:
        if self.fails:
            raise OSError("no database")
        self.stored[connection, token] = older

    async def read(self, connection: tuple[str, str, str], token: str) -> str | None:
        return self.stored.get((connection, token))


class FakeSlidingSync:
    writers = WRITERS


class FakeHomeserver:
    async def transact_alone(self, what: str, function: object) -> None:
        assert what == "migrate_sliding"


def new_handler(pages: FakePages) -> SlidingHandler:
    return SlidingHandler(FakeHomeserver(), FakeSlidingSync(), pages)  # type: ignore[arg-type]


class Server:
    """Rooms with events of two writers, one of which may be behind."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, str]] = []
        self.joined: set[str] = set()
        self.positions = dict.fromkeys(WRITERS, 0)

    def send(self, room_id: str, writer: str) -> None:
        stream_id = len(self.rows) + 1
        self.rows.append((stream_id, writer, room_id))
        self.positions[writer] = stream_id

    def now(self) -> Position:
        # As Synapse has it: at least 1, and a writer is named only if it is ahead.
        low = max(min(self.positions.values()), 1)
        return Position(low, {w: at for w, at in self.positions.items() if at > low})


class Request:
    """What the handler is asked with, and the response."""

    connection = ("@user:server", "DEVICE", "")

    def __init__(
        self, server: Server, since: Position | None, newly: set[str], limit: int, up_to: Position
    ) -> None:
        self._server = server
        self._newly = newly
        self.room_ids: Set[str] = frozenset(server.joined)
        self.limit = limit
        self.since = since
        self.up_to = up_to
        self.events: list[int] = []

    async def newly_joined_rooms(self) -> Set[str]:
        return self._newly

    async def read(
        self, room_ids: Collection[str], after: Position, up_to: Position, limit: int | None
    ) -> tuple[int, Position]:
        if limit == 0:
            return 0, after
        found = [
            stream_id
            for stream_id, writer, room_id in self._server.rows
            if room_id in room_ids and after.of(writer) < stream_id <= up_to.of(writer)
        ][:limit]
        self.events += found
        if limit is not None and len(found) == limit:
            last = found[-1]
            low = max(after.stream_id, min(last, up_to.stream_id))
            ends = {w: max(after.of(w), min(last, up_to.of(w))) for w in WRITERS}
        else:
            low = max(after.stream_id, up_to.stream_id)
            ends = {w: max(after.of(w), up_to.of(w)) for w in WRITERS}
        return len(found), Position(low, {w: at for w, at in ends.items() if at > low})


rooms = st.sampled_from(["!a", "!b", "!c"])
actions = st.lists(
    st.one_of(
        st.tuples(st.just("send"), rooms, st.sampled_from(WRITERS)),
        st.tuples(st.just("join"), rooms),
        st.tuples(st.just("leave"), rooms),
        st.tuples(st.just("sync"), st.integers(0, 5), st.booleans()),
    ),
    max_size=60,
)


@pytest.mark.requirement("D2", "D4", "D5")
@settings(max_examples=400)
@example(  # who comes back in the middle of a page
    actions=[
        *[("send", "!a", WRITERS[0])] * 4,
        *[("send", "!a", WRITERS[1])] * 4,
        *[("sync", 5, False), ("join", "!a"), ("sync", 1, False)],
        *[("leave", "!a"), ("join", "!a"), ("sync", 2, True)],
    ],
    fails=False,
)
@given(actions=actions, fails=st.booleans())
def test_each_event_once_in_order_and_none_lost(actions: list[Any], fails: bool) -> None:
    server, pages = Server(), FakePages()
    pages.fails = fails
    handler = new_handler(pages)
    asyncio.run(handler.load())
    seen: dict[str, list[int]] = {}
    token: Position | None = None
    newly: set[str] = set()

    def ask(since: Position | None, limit: int) -> tuple[Request, SlidingPage]:
        request = Request(server, since, set(newly), limit, server.now())
        return request, asyncio.run(handler.page(request))

    def sync(limit: int) -> bool:
        """Whether there was anything to tell, as Synapse only then tells the token."""
        nonlocal token
        request, page = ask(token, limit)
        for stream_id in request.events:
            seen[server.rows[stream_id - 1][2]].append(stream_id)
        newly.clear()  # the client has this response, so its position is past these joins
        if not fails:
            assert len(request.events) <= limit
        if request.events or page.is_due or token is None:
            token = page.next_batch
            return True
        return False

    server.send("!elsewhere", WRITERS[0])
    for action in actions:
        match action:
            case ("send", room_id, writer):
                server.send(room_id, writer)
            case ("join", room_id):
                if room_id not in server.joined:
                    server.joined.add(room_id)
                    newly.add(room_id)
                    seen[room_id] = []  # one who comes back gets all of it again
            case ("leave", room_id):
                server.joined.discard(room_id)
                newly.discard(room_id)
                seen.pop(room_id, None)
            case ("sync", limit, lost):
                if lost and token is not None:
                    first, page = ask(token, limit)
                    again, same = ask(token, limit)
                    assert (first.events, page) == (again.events, same)
                sync(limit)
    for _ in range(100):
        if not sync(5):
            break
    else:
        pytest.fail("ends")
    now = server.now()
    assert seen == {
        room_id: [
            stream_id
            for stream_id, writer, of in server.rows
            if of == room_id and stream_id <= now.of(writer)
        ]
        for room_id in server.joined
    }
    assert token is not None
    assert position_of_page(token, WRITERS) is None, "nothing is left to be read"


@pytest.mark.requirement("D5")
def test_before_the_table_is_there_everything_is_sent() -> None:
    server, pages = Server(), FakePages()
    server.send("!elsewhere", WRITERS[1])
    for _ in range(6):
        server.send("!a", WRITERS[0])
    server.joined.add("!a")
    asked = Position(1, {WRITERS[0]: 7})

    def ask(handler: SlidingHandler, since: Position, newly: set[str]) -> tuple[list[int], bool]:
        request = Request(server, since, newly, 4, server.now())
        page = asyncio.run(handler.page(request))
        ours = position_of_page(page.next_batch, WRITERS) is not None
        return request.events, ours

    starting, started = new_handler(pages), new_handler(pages)
    asyncio.run(started.load())
    assert ask(starting, asked, {"!a"}) == ([2, 3, 4, 5, 6, 7], False)
    assert not pages.stored
    assert ask(started, asked, {"!a"}) == ([2, 3, 4, 5], True)
    # Who comes with a token from before a restart: what was left then is not known yet.
    (page,) = (token for _, token in pages.stored)
    stream_id, writers = json.loads(page)
    token = Position(stream_id, dict(writers))
    assert ask(started, token, set()) == ([6, 7], False)
    assert ask(starting, token, set()) == ([2, 3, 4, 5], False)


positions = st.builds(
    lambda low, ahead: Position(low, {w: low + by for w, by in ahead.items() if by}),
    st.integers(1, 50),
    st.dictionaries(st.sampled_from([*WRITERS, "gone"]), st.integers(0, 9)),
).filter(lambda p: not all(w in p.writers for w in WRITERS))


@given(position=positions, previous=st.one_of(st.none(), positions))
def test_tokens_of_pages(position: Position, previous: Position | None) -> None:
    assert position_of_page(position, WRITERS) is None
    token = token_of_page(position, WRITERS, previous)
    assert 0 <= token.stream_id < position.stream_id
    assert all(token.of(writer) == position.of(writer) for writer in WRITERS)
    found = position_of_page(token, WRITERS)
    assert found is not None
    assert all(found.of(writer) == position.of(writer) for writer in WRITERS)
    if position.stream_id > 1:
        assert token_of_page(position, WRITERS, token) != token
