"""Whom a user ignored and takes back (H7, D6), with Synapse's own account data."""

from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import pytest

from synapse_sticky._core import StickyIndex
from synapse_sticky.handlers.delivery.unignored import handler, tables
from synapse_sticky.handlers.delivery.unignored.handler import Unignored
from synapse_sticky.handlers.delivery.unignored.synapse import SynapseIgnoring
from synapse_sticky.handlers.delivery.unignored.tables import UnignoredTable
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.layout import NewerLayoutError
from synapse_sticky.homeserver.sections import together
from synapse_sticky.index import EventsOfSenders, Position
from synapse_sticky.index.stream import StickyRow
from tests.unit.test_limits_in_synapse import done, homeserver, hs, run_sql  # noqa: F401  # fixtures

HOUR_MS = 3_600_000
TABLE = "synapse_sticky_unignored"


class Syncs:
    """The syncs of one user: each finds whom the user has taken back since some position."""

    def __init__(self, homeserver: Homeserver, user_id: str) -> None:  # noqa: F811
        self.user_id = user_id
        self.homeserver = homeserver
        self.store: Any = homeserver.store
        self.begin()

    def begin(self, events_of: Any = None) -> None:
        """As a process does at its start, or another one."""
        here = self.homeserver
        parts = (SynapseIgnoring(here), UnignoredTable(here))
        self.unignored = Unignored(here, *parts, events_of or self._events_of)
        self.unignored.install(serves_clients=True)
        done(self.unignored._load())

    async def _events_of(
        self, senders: Collection[str], room_ids: Collection[str], after: Position, up_to: Position
    ) -> dict[str, list[str]]:
        return {room_id: sorted(senders) for room_id in room_ids}

    def ignore(self, *user_ids: str) -> int:
        """The user ignores these, and nobody else. Gives the position after that."""
        content: Any = {"ignored_users": {user_id: {} for user_id in user_ids}}
        return self.change("m.ignored_user_list", content)

    def change(self, kind: str, content: Any) -> int:
        done(self.store.add_account_data_for_user(self.user_id, kind, content))
        return self.now()

    def now(self) -> int:
        position: int = self.store.get_max_account_data_stream_id()
        return position

    def sync(self, after: int | None, up_to: int | None = None) -> list[str]:
        now = self.now() if up_to is None else up_to
        return sorted(done(self.unignored.senders(self.user_id, after, now)))

    def rows(self) -> list[str]:
        sql = f"SELECT sender FROM {TABLE} WHERE user_id = ? ORDER BY sender"
        return [sender for (sender,) in run_sql(self.homeserver, sql, self.user_id)]


@pytest.fixture
def syncs(homeserver: Homeserver, request: pytest.FixtureRequest) -> Syncs:  # noqa: F811
    return Syncs(homeserver, f"@{request.node.name.replace('[', '-').strip(']')}:here")


@pytest.mark.requirement("H7", "D6", "D4")
def test_who_is_taken_back_is_found_by_each_sync_of_before(syncs: Syncs) -> None:
    first = syncs.ignore("@a:there", "@b:there")
    assert syncs.sync(first) == []
    last = syncs.ignore("@b:there")
    assert syncs.sync(first) == ["@a:there"]
    assert syncs.sync(last) == [], "it was in the response that this token is from"
    # Another client of the user, or an answer that was lost.
    assert syncs.sync(first) == syncs.sync(first - 1) == ["@a:there"]
    assert syncs.sync(first - 1, up_to=first) == [], "the next response has it"
    # What else changes in the account data is no change of this.
    syncs.change("m.other", {})
    assert syncs.sync(last) == []
    later = syncs.ignore()
    assert syncs.sync(first) == syncs.sync(None) == ["@a:there", "@b:there"]
    assert syncs.sync(last) == ["@b:there"]
    assert syncs.sync(later) == []


@pytest.mark.requirement("H7", "E4")
def test_a_restart_forgets_nobody(syncs: Syncs) -> None:
    first = syncs.ignore("@a:there", "@b:there")
    last = syncs.ignore("@b:there")
    syncs.begin()
    assert syncs.sync(first) == ["@a:there"]
    syncs.ignore()
    syncs.begin()
    assert syncs.sync(last) == ["@b:there"]


@pytest.mark.requirement("H7", "D6")
def test_who_is_ignored_again_is_not_found(syncs: Syncs) -> None:
    first = syncs.ignore("@a:there")
    second = syncs.ignore()
    assert syncs.sync(first) == ["@a:there"]
    syncs.ignore("@a:there")
    assert syncs.sync(first) == syncs.rows() == []
    syncs.ignore()
    assert syncs.sync(first) == syncs.sync(second) == ["@a:there"]


@pytest.mark.requirement("H7", "D6")
def test_a_list_that_is_removed_ignores_nobody(syncs: Syncs) -> None:
    done(syncs.store.remove_account_data_for_user(syncs.user_id, "m.ignored_user_list"))
    first = syncs.ignore("@a:there")
    syncs.change("m.other", {"some": "thing"})
    done(syncs.store.remove_account_data_for_user(syncs.user_id, "m.other"))
    assert syncs.sync(first) == []
    done(syncs.store.remove_account_data_for_user(syncs.user_id, "m.ignored_user_list"))
    assert syncs.sync(first) == ["@a:there"]
    assert syncs.sync(syncs.now()) == []
    assert not done(syncs.store.ignored_users(syncs.user_id))


@pytest.mark.requirement("H7", "D6", "E2")
def test_whom_a_process_still_takes_for_ignored(syncs: Syncs) -> None:
    """Another process has told of the position, and not yet of what it changed."""
    first = syncs.ignore("@a:there")
    syncs.ignore()
    key = (syncs.user_id,)
    syncs.store.ignored_users.prefill(key, frozenset({"@a:there"}))
    assert syncs.sync(first) == ["@a:there"]
    assert not done(syncs.store.ignored_users(syncs.user_id))


@pytest.mark.requirement("H3", "C2")
def test_nothing_is_asked_where_nothing_changed(
    syncs: Syncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    run = syncs.store.db_pool.runInteraction

    def count(what: str, *args: Any, **options: Any) -> Any:
        asked.append(what)
        return run(what, *args, **options)

    monkeypatch.setattr(syncs.store.db_pool, "runInteraction", count)
    first = syncs.ignore("@a:there")
    last = syncs.ignore()
    asked.clear()
    for _ in range(5):
        assert syncs.sync(last) == []
    assert not asked
    assert syncs.sync(first) == ["@a:there"]
    assert "synapse_sticky_unignored" in asked
    # Most users ignore nobody, whatever else of theirs changes.
    syncs.user_id = "@without:here"
    later = syncs.now()
    syncs.change("m.other", {})
    assert syncs.sync(later) == []
    asked.clear()
    assert syncs.sync(later) == []
    assert not asked


@pytest.mark.requirement("H7", "H3")
def test_it_is_forgotten_after_an_hour(
    syncs: Syncs,
    homeserver: Homeserver,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = syncs.ignore("@a:there", "@b:there")
    syncs.ignore("@b:there")
    assert syncs.sync(first) == syncs.rows() == ["@a:there"]
    later_ms = homeserver.now_ms() + HOUR_MS + 6 * 60_000
    monkeypatch.setattr(homeserver, "now_ms", lambda: later_ms)
    assert syncs.sync(first) == []
    syncs.ignore()
    done(syncs.unignored._table.forget())
    assert syncs.rows() == ["@b:there"]


@pytest.mark.requirement("H3")
def test_a_bounded_number_is_remembered(syncs: Syncs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MOST_OF_A_USER", 3)
    for number in range(4):
        syncs.ignore(*(f"@{number}{letter}:there" for letter in "abcd"[: 1 + number]))
        syncs.ignore()
        assert len(syncs.rows()) == min(1 + number + sum(range(number + 1)), 3)
    assert syncs.rows() == ["@3a:there", "@3b:there", "@3c:there"], "the last ones"


@pytest.mark.parametrize("content", [{}, {"ignored_users": []}, {"ignored_users": "@a:there"}])
def test_what_is_no_list_ignores_nobody(syncs: Syncs, content: Any) -> None:
    first = syncs.ignore("@a:there")
    syncs.change("m.ignored_user_list", content)
    assert syncs.sync(first) == ["@a:there"]


@pytest.mark.requirement("H1")
def test_what_cannot_be_read_fails_no_sync(
    syncs: Syncs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*args: object) -> dict[str, list[str]]:
        raise ValueError("a bug")

    first = syncs.ignore("@a:there")
    syncs.ignore()
    syncs.begin(fail)
    nowhere, there = Position(0), Position(5)
    assert done(syncs.unignored.events_of({"@a:there"}, {"!room"}, nowhere, there)) == {}
    assert "Could not find the events" in caplog.text
    monkeypatch.setattr(syncs.unignored._table, "senders", fail)
    assert syncs.sync(first) == []
    assert "Could not find whom" in caplog.text


@pytest.mark.requirement("H1")
def test_what_cannot_be_noted_fails_no_change(
    syncs: Syncs, caplog: pytest.LogCaptureFixture
) -> None:
    first = syncs.ignore("@a:there")
    run_sql(syncs.homeserver, f"ALTER TABLE {TABLE} RENAME TO kept")
    try:
        syncs.ignore()
    finally:
        run_sql(syncs.homeserver, f"ALTER TABLE kept RENAME TO {TABLE}")
    assert not done(syncs.store.ignored_users(syncs.user_id))
    assert "Could not note whom" in caplog.text
    assert syncs.sync(first) == []


@pytest.mark.requirement("E4", "H1")
def test_a_table_of_a_later_version(
    syncs: Syncs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def migrate(*args: object) -> None:
        raise NewerLayoutError("it has layout 9")

    monkeypatch.setattr(handler, "migrate", migrate)
    syncs.begin()
    assert "delivery (unignored) is off: it has layout 9" in caplog.text
    first = syncs.ignore("@a:there")
    syncs.ignore()
    assert syncs.sync(first) == []


def test_each_event_is_there_once() -> None:
    by_room = {"!a": ["$3", "$4"], "!b": ["$5"]}
    more = {"!a": ["$1", "$3"], "!c": ["$2"]}
    assert together(by_room, more) == {"!a": ["$1", "$3", "$4"], "!c": ["$2"], "!b": ["$5"]}


def whole(index: StickyIndex, give_way: Callable[[], Any]) -> Any:
    """A homeserver and its follower, whose index has everything."""

    async def catch_up(find: Callable[[], Any]) -> Any:
        return find()

    return SimpleNamespace(
        now_ms=lambda: 9_000,
        give_way=give_way,
        index=index,
        holds=lambda up_to: True,
        catch_up=catch_up,
    )


@pytest.mark.requirement("H3", "H7")
def test_the_events_of_senders_are_looked_for_in_steps() -> None:
    index = StickyIndex("here")
    rows = [
        (n, "here", f"!{n % 50}", f"${n}", f"@{n % 4}:there", 10_000 - n) for n in range(1, 4_001)
    ]
    index.insert(rows)
    turns = 0

    async def give_way() -> None:
        nonlocal turns
        turns += 1

    here = whole(index, give_way)
    find: Callable[..., Any] = EventsOfSenders(here, here).find
    rooms = {f"!{n}" for n in range(25)}
    found = done(find({"@1:there", "@2:there"}, rooms, Position(100), Position(700)))
    expected = {
        event_id
        for n, _, room_id, event_id, sender, until_ms in rows
        if 100 < n <= 700
        and int(room_id[1:]) < 25
        and sender in {"@1:there", "@2:there"}
        and until_ms > 9_000
    }
    assert {e for ids in found.values() for e in ids} == expected
    done(find({"@1:there"}, {f"!{n}" for n in range(5_000)}, Position(0), Position(4_000)))
    assert turns >= 10


@pytest.mark.requirement("H3", "D2")
def test_of_a_flooder_the_newest_events_are_given() -> None:
    index = StickyIndex("here")
    numbers = range(1, 20_001)
    index.insert([(n, "here", f"!{n % 3}", f"${n}", "@a:there", 10_000) for n in numbers])

    async def give_way() -> None:
        pass

    here = whole(index, give_way)
    rooms = ["!2", "!0", "!1"]
    find = EventsOfSenders(here, here).find
    found = done(find({"@a:there"}, rooms, Position(0), Position(19_000)))
    newest = range(18_001, 19_001)
    assert found == {f"!{room}": [f"${n}" for n in newest if n % 3 == room] for room in range(3)}


@pytest.mark.requirement("H7", "E4")
def test_what_the_index_does_not_have_yet_the_table_has() -> None:
    """In pages; no event that is soft-failed, expired or after the position of its writer."""
    rows = [
        StickyRow(n, f"w{n % 2}", f"!{n % 3}", f"${n}", f"@{n % 2}:there", 10_000, n % 5 > 0)
        for n in range(1, 1_201)
    ]

    async def read(after: int, up_to: int, limit: int) -> list[StickyRow]:
        return [row for row in rows if after < row.stream_id <= up_to][:limit]

    here = whole(StickyIndex("here"), lambda: None)
    here.holds = lambda up_to: False
    here.stream = SimpleNamespace(rows=read)
    after, up_to = Position(50, {"w1": 100}), Position(900, {"w1": 1_100})
    find = EventsOfSenders(here, here).find
    found = done(find({"@1:there"}, {"!0", "!1"}, after, up_to))
    assert found == {
        room_id: [
            row.event_id
            for row in rows
            if row.room_id == room_id and row.deliverable and row.sender == "@1:there"
            if 100 < row.stream_id <= 1_100
        ]
        for room_id in ("!0", "!1")
    }
