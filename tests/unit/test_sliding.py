"""Pages of sliding sync, against a naive stream: each event once, whatever is lost on the way."""

import asyncio
import itertools
from collections.abc import Collection, Iterator, Set
from typing import Any

import attr
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from synapse_sticky.handlers.sliding import handler
from synapse_sticky.handlers.sliding.handler import SlidingHandler, SlidingPage
from synapse_sticky.handlers.sliding.pages import (
    Older,
    Page,
    Shown,
    dumped,
    dumped_older,
    dumped_shown,
    loaded,
    loaded_older,
    loaded_shown,
    position_of_page,
    shown_by,
    token_of_page,
)
from synapse_sticky.index import Position

WRITERS = ("first", "second")
PRESENT = 5
"""Who takes so many gets the present first."""
Connection = tuple[str, str, str]


@pytest.fixture(scope="module", autouse=True)
def _present() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(handler, "MOST_IN_SECTION", PRESENT)
        yield


class FakePages:
    """What was stored, and whether that can be done."""

    duty = "sliding"
    migrations: tuple[tuple[str, ...], ...] = ()

    def __init__(self) -> None:
        self.stored: dict[tuple[Connection, str], Page] = {}
        self.fails = False
        self.asked = 0

    async def store(self, connection: Connection, token: Position, page: Page) -> None:
        if self.fails:
            raise OSError("no database")
        # The latest is the last.
        self.stored.pop((connection, dumped(token)), None)
        self.stored[connection, dumped(token)] = page

    async def read(self, connection: Connection, token: Position) -> Page | None:
        self.asked += 1
        if (page := self.stored.get((connection, dumped(token)))) is not None:
            return page
        others = (page for (_, at), page in self.stored.items() if at == dumped(token))
        return next(others, None)

    async def latest(self, connection: Connection) -> list[Page]:
        self.asked += 1
        return list(reversed(self.stored.values()))


class FakeSlidingSync:
    writers = WRITERS


class FakeHomeserver:
    async def transact_alone(self, what: str, function: object) -> None:
        assert what == "migrate_sliding"


def new_handler(pages: FakePages) -> SlidingHandler:
    return SlidingHandler(FakeHomeserver(), FakeSlidingSync(), pages)  # type: ignore[arg-type]


class Server:
    """Rooms with events of two writers, one of which may be behind."""

    def __init__(self, position: int = 0) -> None:
        self.rows: dict[int, tuple[str, str, int]] = {}
        """By stream ID: the writer, the room, and the event."""
        self.held: list[tuple[str, str, int]] = []
        """Deferred or soft-failed: they get a row later."""
        self.joined: dict[str, int] = {}
        """The rooms of the user, with the position of the events stream of each join."""
        self.hour_ago = 0
        self.changes = 0
        self.is_ignoring = False
        self.unignored = 0
        """When the user stopped ignoring another one last."""
        self.positions = dict.fromkeys(WRITERS, position)
        self._ids = itertools.count(position + 1)
        self._events = itertools.count(1)

    def send(self, room_id: str, writer: str) -> None:
        self._enter(writer, room_id, next(self._events))

    def hold(self, room_id: str, writer: str) -> None:
        self.held.append((writer, room_id, next(self._events)))

    def release(self) -> None:
        """As a new row, though the event is old."""
        if self.held:
            self._enter(*self.held.pop(0))

    def _enter(self, writer: str, room_id: str, event: int) -> None:
        stream_id = next(self._ids)
        self.rows[stream_id] = writer, room_id, event
        self.positions[writer] = stream_id

    def lose(self, number: int) -> None:
        """A row is gone: redacted, purged or expired."""
        if self.rows:
            del self.rows[sorted(self.rows)[number % len(self.rows)]]

    def join(self, room_id: str) -> None:
        # One who comes back gets all of it again.
        if room_id not in self.joined:
            self.changes += 1
            self.joined[room_id] = self.changes

    def leave(self, room_id: str) -> None:
        self.joined.pop(room_id, None)

    def ignore(self) -> None:
        self.is_ignoring = True

    def stop_ignoring(self) -> None:
        if self.is_ignoring:
            self.is_ignoring = False
            self.changes += 1
            self.unignored = self.changes

    def pass_an_hour(self) -> None:
        self.rows.clear()
        self.held.clear()
        self.hour_ago = self.changes

    def now(self) -> Position:
        # As Synapse has it: at least 1, and a writer is named only if it is ahead.
        low = max(min(self.positions.values()), 1)
        return Position(low, {w: at for w, at in self.positions.items() if at > low})


IGNORED = "@ignored:server"


def is_of_the_ignored(event: int) -> bool:
    """Every other event is of the user who is ignored at times."""
    return event % 2 == 0


class Request:
    """What the handler is asked with, and the response."""

    def __init__(
        self,
        server: Server,
        since: Position | None,
        limit: int,
        shown_before: Shown | None = None,
        name: str = "",
    ) -> None:
        self._server = server
        self.connection = ("@user:server", "DEVICE", name)
        self.room_ids: Set[str] = frozenset(server.joined)
        self.limit = limit
        self.since = since
        self.up_to = server.now()
        self.shown = Shown(Position(server.changes), 0, server.changes)
        self.shown_before = shown_before
        self.events: list[tuple[str, int]] = []
        self.of_senders: list[tuple[str, int]] = []

    async def newly_joined_rooms(self, after: Shown | None) -> Set[str]:
        at = self._server.hour_ago if after is None else after.rooms.stream_id
        return {room_id for room_id, joined in self._server.joined.items() if joined > at}

    async def unignored_users(self, after: Shown | None) -> Set[str]:
        at = self._server.hour_ago if after is None else after.ignoring
        is_new = self._server.unignored > at and not self._server.is_ignoring
        return {IGNORED} if is_new else set()

    async def read_of(
        self, senders: Collection[str], room_ids: Collection[str], after: Position, up_to: Position
    ) -> int:
        assert {*senders} == {IGNORED}
        found = [
            (room_id, event)
            for stream_id, (writer, room_id, event) in sorted(self._server.rows.items())
            if room_id in room_ids and after.of(writer) < stream_id <= up_to.of(writer)
            if is_of_the_ignored(event)
        ]
        self.of_senders += found
        return len(found)

    async def read(
        self, room_ids: Collection[str], after: Position, up_to: Position, limit: int | None
    ) -> tuple[int, Position]:
        if limit == 0:
            return 0, after
        found = [
            (stream_id, (room_id, event))
            for stream_id, (writer, room_id, event) in sorted(self._server.rows.items())
            if room_id in room_ids and after.of(writer) < stream_id <= up_to.of(writer)
        ]
        newest: list[tuple[int, tuple[str, int]]] = []
        if after == Position(0) and limit is not None and PRESENT <= limit < len(found):
            # Some of the oldest, and beside them what is to be known first.
            newest, limit = found[2 - limit :], 2
        found = found[:limit]
        self.events += [
            (room_id, event)
            for _, (room_id, event) in [*found, *newest]
            if not (self._server.is_ignoring and is_of_the_ignored(event))
        ]
        # As the section has it: once, where it is in the stream.
        self.events = [*dict.fromkeys(self.events[::-1])][::-1]
        if limit is not None and len(found) == limit:
            last = found[-1][0]
            low = max(after.stream_id, min(last, up_to.stream_id))
            ends = {w: max(after.of(w), min(last, up_to.of(w))) for w in WRITERS}
        else:
            low = max(after.stream_id, up_to.stream_id)
            ends = {w: max(after.of(w), up_to.of(w)) for w in WRITERS}
        count = len(found) + len(newest)
        return count, Position(low, {w: at for w, at in ends.items() if at > low})


@attr.s(auto_attribs=True, slots=True)
class State:
    """What an app remembers: its token, and what it has got of each room by when it was joined, and
    when its user stopped ignoring the sender."""

    token: Position | None = None
    pos: Shown | None = None
    seen: dict[tuple[str, int, int], list[int]] = attr.Factory(dict)

    def copy(self) -> "State":
        return State(self.token, None, {joined: [*seen] for joined, seen in self.seen.items()})


class App:
    """A client of the user's device, with a connection of its own."""

    def __init__(self, server: Server, handlers: list[SlidingHandler], name: str) -> None:
        self._server = server
        self._handlers = handlers
        self._name = name
        self._begun = 0
        self.state = State()
        self._before: list[State] = []

    def begin_anew(self, back: int) -> None:
        """The connection is forgotten; and the app may have an older state than the last."""
        self._begun += 1
        if self._before:
            self.state = self._before[-1 - back % len(self._before)].copy()
        self.state.pos = None

    def ask(self, limit: int, worker: int = 0) -> tuple[Request, SlidingPage]:
        name = f"{self._name}{self._begun}"
        request = Request(self._server, self.state.token, limit, self.state.pos, name)
        handler = self._handlers[worker % len(self._handlers)]
        return request, asyncio.run(handler.page(request))

    def sync(self, limit: int, worker: int = 0) -> Request | None:
        """The request, if there was anything to tell, as Synapse only then tells the token."""
        request, page = self.ask(limit, worker)
        self.state.pos = request.shown
        for room_id, event in (*request.events, *request.of_senders):
            seen = self.state.seen.setdefault(self._since_when(room_id, event), [])
            assert seen.count(event) < 2, "once, or once more after what was to be known first"
            seen.append(event)
        if not request.events and not request.of_senders and not page.is_due:
            return None
        self.state.token = page.next_batch
        self._before.append(self.state.copy())
        return request

    def _since_when(self, room_id: str, event: int) -> tuple[str, int, int]:
        unignored = self._server.unignored if is_of_the_ignored(event) else 0
        return room_id, self._server.joined[room_id], unignored

    def has_got_all(self) -> None:
        """What the rooms have now."""
        now = self._server.now()
        for stream_id, (writer, room_id, event) in self._server.rows.items():
            is_there = room_id in self._server.joined and stream_id <= now.of(writer)
            if not is_there or (self._server.is_ignoring and is_of_the_ignored(event)):
                continue
            seen = self.state.seen.get(self._since_when(room_id, event), [])
            assert event in seen, "none is missing"


rooms = st.sampled_from(["!a", "!b", "!c"])
numbers = st.integers(0, 7)
happenings = st.one_of(
    st.tuples(st.just("send"), rooms, st.sampled_from(WRITERS)),
    st.tuples(st.just("hold"), rooms, st.sampled_from(WRITERS)),
    st.tuples(st.just("release")),
    st.tuples(st.just("lose"), numbers),
    st.tuples(st.just("join"), rooms),
    st.tuples(st.just("leave"), rooms),
    st.tuples(st.just("ignore")),
    st.tuples(st.just("stop_ignoring")),
)
syncs = st.tuples(st.just("sync"), numbers, st.integers(0, 5), numbers, st.booleans())
with_pos = st.lists(st.one_of(happenings, syncs), min_size=8, max_size=60)
without_pos = st.lists(
    st.one_of(
        happenings,
        syncs,
        st.tuples(st.just("begin anew"), numbers, numbers),
        st.tuples(st.just("restart"), numbers),
        st.tuples(st.just("an hour")),
    ),
    min_size=8,
    max_size=60,
)


def run(actions: list[Any], apps: list[App], server: Server, pages: FakePages) -> None:
    for action in actions:
        match action:
            case ("an hour",):
                server.pass_an_hour()
                pages.stored.clear()
            case ("begin anew", number, back):
                apps[number % len(apps)].begin_anew(back)
            case ("restart", number):
                handlers = apps[0]._handlers
                handlers[number % len(handlers)] = loaded_handler(pages)
            case ("sync", number, limit, worker, lost):
                app = apps[number % len(apps)]
                if lost and app.state.token is not None:
                    first, page = app.ask(limit, worker)
                    again, same = app.ask(limit, worker)
                    assert (first.events, page) == (again.events, same)
                    assert first.of_senders == again.of_senders
                request = app.sync(limit, worker)
                most = limit if limit < PRESENT else limit + limit // 2
                assert pages.fails or request is None or len(request.events) <= most
            case (name, *arguments):
                getattr(server, name)(*arguments)
    for app in apps:
        for _ in range(100):
            if app.sync(5) is None:
                break
        else:
            pytest.fail("ends")
        app.has_got_all()


def loaded_handler(pages: FakePages) -> SlidingHandler:
    handler = new_handler(pages)
    asyncio.run(handler.load())
    return handler


@pytest.mark.requirement("D2", "D4", "D5")
@settings(max_examples=400)
@example(  # who comes back in the middle of a page
    actions=[
        *[("send", "!a", WRITERS[0])] * 4,
        *[("send", "!a", WRITERS[1])] * 4,
        *[("sync", 0, 5, 0, False), ("join", "!a"), ("sync", 0, 1, 0, False)],
        *[("leave", "!a"), ("join", "!a"), ("sync", 0, 2, 0, True)],
    ],
    fails=False,
)
@given(actions=with_pos, fails=st.booleans())
def test_each_event_once_and_none_lost(actions: list[Any], fails: bool) -> None:
    # Each token of a page is below the one before.
    server, pages = Server(100), FakePages()
    pages.fails = fails
    server.send("!elsewhere", WRITERS[0])
    run(actions, [App(server, [loaded_handler(pages)], "")], server, pages)


SENT = [("send", "!a", WRITERS[0])] * 3


@pytest.mark.requirement("D2", "D4", "D5")
@settings(max_examples=600)
@example(  # the same position before a join and after it
    actions=[
        *[*SENT, ("sync", 0, 5, 0, False), ("join", "!a"), ("sync", 0, 5, 0, False)],
        *[("begin anew", 0, 0), ("sync", 0, 5, 0, False), ("begin anew", 0, 1)],
    ]
)
@example(  # one at a time, each by a connection of its own
    actions=[
        ("join", "!a"),
        *SENT,
        *[("sync", 0, 1, 0, False), ("begin anew", 0, 0)] * 2,
        *[("sync", 0, 0, 0, False), ("begin anew", 0, 0)],
    ]
)
@example(  # a room without events is joined, and then gets one, by way of another process
    actions=[
        *[("join", "!b"), ("send", "!b", WRITERS[0]), ("sync", 0, 5, 0, False)],
        *[("join", "!a"), ("sync", 0, 5, 0, False), ("send", "!a", WRITERS[0])],
        *[("sync", 0, 5, 0, False), ("begin anew", 0, 0), ("sync", 0, 5, 1, False)],
    ]
)
@example(  # the same position before somebody is ignored no more, and after it
    actions=[
        *[("join", "!a"), ("an hour",), ("ignore",), *SENT, ("sync", 0, 5, 0, False)],
        *[("stop_ignoring",), ("sync", 0, 0, 0, False), ("sync", 0, 5, 0, True)],
        *[("begin anew", 0, 0), ("sync", 0, 5, 1, True), ("begin anew", 0, 1)],
    ]
)
@example(  # who takes no events gets them later
    actions=[
        *[("join", "!a"), ("an hour",), ("ignore",), *SENT, ("sync", 0, 5, 0, False)],
        *[("stop_ignoring",), ("sync", 0, 0, 0, False)],
    ]
)
@example(  # who is ignored no more has sent nothing before, and does now
    actions=[
        *[("join", "!a"), ("an hour",), *SENT, ("sync", 0, 5, 0, False), ("lose", 1), ("lose", 2)],
        *[("ignore",), ("stop_ignoring",), ("sync", 0, 5, 0, False), *SENT],
        *[("sync", 0, 5, 0, False), ("begin anew", 0, 0), ("sync", 0, 5, 1, False)],
    ]
)
@example(  # who is ignored sends while a room's older events are read page by page
    actions=[
        *[("join", "!b"), ("an hour",), *SENT, *SENT, *[("send", "!b", WRITERS[0])] * 2],
        *[("sync", 0, 5, 0, False), ("join", "!a"), ("ignore",), ("sync", 0, 2, 0, False), *SENT],
        *[("sync", 0, 2, 0, False), ("stop_ignoring",), ("sync", 0, 1, 0, True)],
    ]
)
@given(actions=without_pos)
def test_each_event_once_and_none_lost_whatever_pos_is(actions: list[Any]) -> None:
    """Two apps on one device, two processes; connections begin anew, from any state of before."""
    # Each token of a page is below the one before.
    server, pages = Server(100), FakePages()
    server.send("!elsewhere", WRITERS[0])
    handlers = [loaded_handler(pages) for _ in range(2)]
    run(actions, [App(server, handlers, name) for name in "xy"], server, pages)


@pytest.mark.requirement("D4")
def test_without_pos_one_at_a_time_and_then_nothing() -> None:
    """Nothing is new: there is no section, and the token is not changed."""
    server, pages = Server(), FakePages()
    server.join("!a")
    for _ in range(4):
        server.send("!a", WRITERS[0])
    app, got = App(server, [loaded_handler(pages)], ""), []
    for limit in (1, 1, 0, 2):
        app.begin_anew(0)
        before = app.state.token
        request = app.sync(limit)
        got.append([event for _, event in request.events] if request else None)
        if limit == 0:
            assert app.state.token == before
    assert got == [[1], [2], None, [3, 4]]
    for limit in (0, 100):
        app.begin_anew(0)
        request, page = app.ask(limit)
        assert request.since is not None
        assert (request.events, page) == ([], SlidingPage(request.since, is_due=False))


@pytest.mark.requirement("H3")
def test_a_connection_that_goes_on_asks_for_nothing_that_is_stored() -> None:
    server, pages = Server(), FakePages()
    app = App(server, [loaded_handler(pages)], "")
    server.join("!a")
    for _ in range(2):
        server.send("!a", WRITERS[0])
        assert app.sync(100)
    asked = pages.asked
    for _ in range(3):
        assert app.sync(100) is None
        server.send("!a", WRITERS[0])
        assert app.sync(100)
    server.join("!b")
    for _ in range(3):
        assert app.sync(100) is None, "there is nothing in it"
    assert pages.asked == asked


@pytest.mark.requirement("C2", "H3")
def test_an_idle_connection_asks_for_nothing_that_is_stored() -> None:
    server, pages = Server(), FakePages()
    app = App(server, [loaded_handler(pages) for _ in range(2)], "")
    server.join("!a")
    server.send("!a", WRITERS[0])
    assert app.sync(100)
    assert app.state.token is not None
    assert position_of_page(app.state.token, WRITERS), "it has just joined"
    for worker, asked in ((0, pages.asked), (1, pages.asked + 1)):
        for _ in range(3):
            server.join(f"!not-asked-for-{worker}")
            server.leave(f"!not-asked-for-{worker}")
            assert app.sync(100, worker) is None
        assert pages.asked == asked, worker


@pytest.mark.requirement("D4", "E2")
def test_a_page_that_another_process_has_stored_anew() -> None:
    server, pages = Server(), FakePages()
    app = App(server, [loaded_handler(pages) for _ in range(2)], "")
    for room_id in ("!a", "!b", "!elsewhere"):
        server.send(room_id, WRITERS[0])
    server.join("!elsewhere")
    server.pass_an_hour()
    server.send("!elsewhere", WRITERS[0])
    for room_id in ("!a", "!b"):
        server.send(room_id, WRITERS[0])
    assert app.sync(100)
    before = app.state.copy()
    server.join("!a")
    first = app.sync(100)
    assert first
    of_page = app.state.token
    server.join("!b")
    app.state = before
    again = app.sync(100, worker=1)
    assert again
    assert (app.state.token, len(again.events)) == (of_page, len(first.events) + 1)
    assert app.sync(100, worker=0) is None


@pytest.mark.requirement("D4")
def test_the_token_of_a_page_is_not_kept_for_good() -> None:
    """Whoever remembers it goes on with it; another process would ask for it each time."""
    server, pages = Server(), FakePages()
    server.join("!a")
    server.send("!a", WRITERS[0])
    app = App(server, [loaded_handler(pages) for _ in range(2)], "")
    assert app.sync(100)
    token = app.state.token
    assert token is not None
    assert app.sync(100) is None
    server.pass_an_hour()
    pages.stored.clear()
    assert app.sync(100) is None
    assert app.sync(0, worker=1) is None
    assert app.sync(100, worker=1) is not None
    assert app.state.token == position_of_page(token, WRITERS)
    assert app.sync(100) is None


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synapse_sticky.handlers.sliding.handler._MOST_REMEMBERED", 10)
    server, pages = Server(), FakePages()
    server.join("!a")
    server.pass_an_hour()
    server.send("!a", WRITERS[0])
    handler = loaded_handler(pages)
    for name in map(str, range(30)):
        assert App(server, [handler], name).sync(100)
    assert [connection[2] for connection in handler._last] == [f"{n}0" for n in range(20, 30)]


@pytest.mark.requirement("D5")
def test_before_the_table_is_there_everything_is_sent() -> None:
    server, pages = Server(), FakePages()
    server.send("!elsewhere", WRITERS[1])
    before = Shown(Position(server.changes), 0)
    for _ in range(6):
        server.send("!a", WRITERS[0])
    server.join("!a")
    asked = Position(1, {WRITERS[0]: 7})

    def ask(
        handler: SlidingHandler, since: Position, shown: Shown | None
    ) -> tuple[list[int], bool, Shown]:
        request = Request(server, since, 4, shown)
        page = asyncio.run(handler.page(request))
        ours = position_of_page(page.next_batch, WRITERS) is not None
        return [event for _, event in request.events], ours, request.shown

    starting, started = new_handler(pages), loaded_handler(pages)
    events, ours, shown = ask(starting, asked, before)
    assert (events, ours) == ([2, 3, 4, 5, 6, 7], False)
    assert not pages.stored
    assert ask(starting, asked, shown)[:2] == ([], False), "pos says which rooms are new"
    assert ask(started, asked, before)[:2] == ([2, 3, 4, 5], True)
    # Who comes with a token from before a restart: what was left then is not known yet.
    ((_, page),) = pages.stored
    assert ask(started, loaded(page), shown)[:2] == ([6, 7], True)
    assert ask(starting, loaded(page), shown)[:2] == ([2, 3, 4, 5], False)


@pytest.mark.requirement("D4")
def test_a_page_of_an_earlier_version() -> None:
    """It says nothing of joins, so that ``pos`` does."""
    server, pages = Server(), FakePages()
    server.join("!a")
    for _ in range(4):
        server.send("!a", WRITERS[0])
    older = Older(frozenset({"!a"}), Position(2), Position(4))
    token = token_of_page(Position(4), WRITERS, None)
    pages.stored[("@user:server", "DEVICE", ""), dumped(token)] = Page((older,))
    request = Request(server, token, 100, Shown(Position(server.changes), 0))
    asyncio.run(loaded_handler(pages).page(request))
    assert [event for _, event in request.events] == [3, 4]


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


@given(position=positions, after=positions, whole=st.integers(0, 5))
def test_what_is_stored_is_what_is_read(position: Position, after: Position, whole: int) -> None:
    assert loaded(dumped(position)) == position
    older = (Older(frozenset({"!a", "!b"}), after, position),)
    assert loaded_older(dumped_older(older)) == older
    shown = Shown(after, whole, whole + 1)
    assert loaded_shown(dumped_shown(shown)) == shown


def test_which_page_a_bare_token_came_after() -> None:
    first, second = Shown(Position(1), 0), Shown(Position(2), 0)
    pages = [
        Page((), second, Position(5, {WRITERS[0]: 7})),
        Page((), first, Position(3)),
        Page((), None, None),
    ]
    assert shown_by(Position(6, {WRITERS[0]: 7}), pages) is second
    assert shown_by(Position(5, {WRITERS[0]: 7}), pages) is first, "it may be from before"
    assert shown_by(Position(6), pages) is first, "one writer is behind"
    assert shown_by(Position(3), pages) is None
