"""Whom a user ignored and takes back (H7, D6), with Synapse's own account data."""

from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import pytest

from synapse_sticky._core import StickyIndex
from synapse_sticky.homeserver import Homeserver, unignored
from synapse_sticky.homeserver.unignored import Unignored, together
from synapse_sticky.index import EventsOfSenders, Position
from tests.unit.test_limits_in_synapse import done, homeserver, hs  # noqa: F401  # fixtures

HOUR_MS = 3_600_000


class Syncs:
    """The syncs of one user: each finds whom the user has taken back since some position."""

    def __init__(self, homeserver: Homeserver, user_id: str) -> None:  # noqa: F811
        self.user_id = user_id
        self.store: Any = homeserver.store
        self.unignored = Unignored(homeserver, self._events_of)

    async def _events_of(
        self, senders: Collection[str], room_ids: Collection[str], up_to: Position
    ) -> dict[str, list[str]]:
        return {"!room": sorted(senders)}

    def ignore(self, *user_ids: str) -> int:
        """The user ignores these, and nobody else. Gives the position after that."""
        content: Any = {"ignored_users": {user_id: {} for user_id in user_ids}}
        done(self.store.add_account_data_for_user(self.user_id, "m.ignored_user_list", content))
        return self.now()

    def now(self) -> int:
        position: int = self.store.get_max_account_data_stream_id()
        return position

    def sync(self, after: int) -> list[str]:
        token = SimpleNamespace(account_data_key=after)
        events = self.unignored.events(self.user_id, token, {"!room"}, Position(5))
        found: dict[str, list[str]] = done(events)
        return found.get("!room", [])


@pytest.fixture
def syncs(homeserver: Homeserver, request: pytest.FixtureRequest) -> Syncs:  # noqa: F811
    return Syncs(homeserver, f"@{request.node.name.replace('[', '-').strip(']')}:here")


@pytest.mark.requirement("H7", "D6")
def test_who_is_taken_back_is_found_by_each_sync_of_before(syncs: Syncs) -> None:
    first = syncs.ignore("@a:there", "@b:there")
    assert syncs.sync(first) == []
    last = syncs.ignore("@b:there")
    assert syncs.sync(first) == ["@a:there"]
    assert syncs.sync(last) == [], "it was in the response that this token is from"
    # Another client of the user, or an answer that was lost.
    assert syncs.sync(first) == ["@a:there"]
    assert syncs.sync(first - 1) == ["@a:there"]
    # What else changes in the account data is no change of this.
    done(syncs.store.add_account_data_for_user(syncs.user_id, "m.other", {}))
    assert syncs.sync(last) == []
    later = syncs.ignore()
    assert syncs.sync(first) == ["@a:there", "@b:there"]
    assert syncs.sync(last) == ["@b:there"]
    assert syncs.sync(later) == []


@pytest.mark.requirement("H7", "D6")
def test_who_is_ignored_again_is_not_found(syncs: Syncs) -> None:
    first = syncs.ignore("@a:there")
    assert syncs.sync(first) == []
    syncs.ignore()
    assert syncs.sync(first) == ["@a:there"]
    syncs.ignore("@a:there")
    assert syncs.sync(first) == []
    syncs.ignore()
    assert syncs.sync(first) == ["@a:there"]


@pytest.mark.requirement("H7", "H3")
def test_it_is_forgotten_after_an_hour(
    syncs: Syncs,
    homeserver: Homeserver,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = syncs.ignore("@a:there")
    syncs.sync(first)
    syncs.ignore()
    assert syncs.sync(first) == ["@a:there"]
    later_ms = homeserver.steady_ms() + HOUR_MS
    monkeypatch.setattr(homeserver, "steady_ms", lambda: later_ms)
    assert syncs.sync(first) == []
    assert not syncs.unignored._users


@pytest.mark.requirement("H3")
def test_a_bounded_number_of_users_is_remembered(
    syncs: Syncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unignored, "_MOST_REMEMBERED", 3)
    for number in range(9):
        syncs.user_id = f"@many{number}:here"
        syncs.sync(syncs.ignore("@a:there"))
    assert len(syncs.unignored._users) == 3
    # Nor is anybody who ignores nobody.
    syncs.user_id = "@nobody:here"
    assert syncs.sync(syncs.ignore()) == []
    syncs.sync(syncs.now())
    assert len(syncs.unignored._users) <= 3


@pytest.mark.parametrize("content", [{}, {"ignored_users": []}, {"ignored_users": "@a:there"}])
def test_what_is_no_list_ignores_nobody(syncs: Syncs, content: Any) -> None:
    first = syncs.ignore("@a:there")
    assert syncs.sync(first) == []
    done(syncs.store.add_account_data_for_user(syncs.user_id, "m.ignored_user_list", content))
    assert syncs.sync(first) == ["@a:there"]


@pytest.mark.requirement("H1")
def test_a_failure_fails_no_sync(
    homeserver: Homeserver,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(*args: object) -> dict[str, list[str]]:
        raise ValueError("a bug")

    syncs = Syncs(homeserver, "@failing:here")
    syncs.unignored = Unignored(homeserver, fail)
    first = syncs.ignore("@a:there")
    syncs.sync(first)
    syncs.ignore()
    assert syncs.sync(first) == []
    assert "Could not find what" in caplog.text


@pytest.mark.requirement("H5")
def test_a_synapse_that_does_not_fit_is_told_of_once(
    homeserver: Homeserver,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("synapse.handlers.sync.SyncHandler.sticky_events_by_room")
    syncs = Syncs(homeserver, "@unfit:here")
    syncs.unignored.add_to_sync()
    first = syncs.ignore("@a:there")
    syncs.sync(first)
    syncs.ignore()
    assert syncs.sync(first) == []
    (line,) = [r for r in caplog.records if r.name == unignored.__name__]
    assert line.levelname == "ERROR"
    assert "sticky_events_by_room" in line.getMessage()
    assert "does not get the sticky events that were kept back" in line.getMessage()


def test_each_event_is_there_once() -> None:
    by_room = {"!a": ["$3", "$4"], "!b": ["$5"]}
    more = {"!a": ["$1", "$3"], "!c": ["$2"]}
    assert together(by_room, more) == {"!a": ["$1", "$3", "$4"], "!c": ["$2"], "!b": ["$5"]}


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

    here: Any = SimpleNamespace(now_ms=lambda: 9_000, give_way=give_way, index=index)
    find: Callable[..., Any] = EventsOfSenders(here, here).find
    found = done(find({"@1:there", "@2:there"}, {f"!{n}" for n in range(25)}, Position(700)))
    expected = {
        event_id
        for n, _, room_id, event_id, sender, until_ms in rows
        if n <= 700
        and int(room_id[1:]) < 25
        and sender in {"@1:there", "@2:there"}
        and until_ms > 9_000
    }
    assert {e for ids in found.values() for e in ids} == expected
    done(find({"@1:there"}, {f"!{n}" for n in range(5_000)}, Position(4_000)))
    assert turns >= 10


@pytest.mark.requirement("H3", "D2")
def test_of_a_flooder_the_newest_events_are_given() -> None:
    index = StickyIndex("here")
    numbers = range(1, 20_001)
    index.insert([(n, "here", f"!{n % 3}", f"${n}", "@a:there", 10_000) for n in numbers])

    async def give_way() -> None:
        pass

    here: Any = SimpleNamespace(now_ms=lambda: 9_000, give_way=give_way, index=index)
    rooms = ["!2", "!0", "!1"]
    found = done(EventsOfSenders(here, here).find({"@a:there"}, rooms, Position(19_000)))
    newest = range(18_001, 19_001)
    assert found == {f"!{room}": [f"${n}" for n in newest if n % 3 == room] for room in range(3)}
