"""Who may see what history visibility hides: joined servers and users, what is unexpired (C1)."""

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import attr
import pytest

from synapse_sticky.config import VisibilityConfig
from synapse_sticky.handlers.visibility.handler import HiddenEvent, VisibilityHandler
from synapse_sticky.index import StickyRow
from synapse_sticky.metrics import Metrics
from tests.unit.coroutines import result_of

NOW_MS = 1_800_000_000_000


@attr.s(auto_attribs=True)
class Rooms:
    joined: set[tuple[str, str]]
    erased_users: Collection[str] = ()

    async def is_joined(self, room_id: str, server: str) -> bool:
        return (room_id, server) in self.joined

    async def is_user_joined(self, room_id: str, user_id: str) -> bool:
        return (room_id, user_id) in self.joined

    async def erased(self, user_ids: Collection[str]) -> set[str]:
        return set(user_ids) & set(self.erased_users)


@attr.s(auto_attribs=True)
class Follower:
    """Knows when these events expire, by event ID."""

    expire_ms: dict[str, int]

    async def rows_of(self, event_ids: Collection[str]) -> dict[str, StickyRow]:
        return {
            event_id: StickyRow(1, "master", "!a", event_id, "@u:there", expires_at_ms, True)
            for event_id, expires_at_ms in self.expire_ms.items()
            if event_id in event_ids
        }


class Installed:
    """What a handler was installed into."""

    servers: Any = None
    users: Any = None

    def allow(self, *, servers: Any, users: Any) -> None:
        self.servers, self.users = servers, users


@attr.s(auto_attribs=True)
class Retention:
    """Keeps no event for longer than this."""

    lifetime_ms: int = 24 * 3_600_000

    async def ends_ms(self, room_id: str, expires_at_ms: int, sent_ms: int) -> int:
        return min(expires_at_ms, sent_ms + self.lifetime_ms)


def installed(
    rooms: Rooms,
    follower: Follower,
    servers: bool = True,
    users: bool = True,
    lifetime_ms: int = 24 * 3_600_000,
) -> Installed:
    visibility = Installed()
    homeserver: Any = SimpleNamespace(
        server_name="here", now_ms=lambda: NOW_MS, metrics=Metrics("here")
    )
    config = VisibilityConfig(servers=servers, users=users)
    retention: Any = Retention(lifetime_ms)
    handler = VisibilityHandler(homeserver, rooms, follower, visibility, retention, config)  # type: ignore[arg-type]
    handler.install()
    return visibility


def hidden_event(
    event_id: str,
    sent_ms: int = NOW_MS,
    duration_ms: object = 60_000,
    room_id: str = "!a",
    sender: str = "@u:there",
) -> HiddenEvent:
    return HiddenEvent(event_id, room_id, sender, {"duration_ms": duration_ms}, sent_ms)


@pytest.mark.requirement("C1", "P6")
def test_what_a_joined_server_may_see() -> None:
    rooms = Rooms({("!a", "there"), ("!a", "here")}, {"@erased:there"})
    follower = Follower({"$unexpired": NOW_MS + 1, "$expired": NOW_MS})
    events = {
        "$unexpired": hidden_event("$unexpired", NOW_MS - 60_000),
        "$expired": hidden_event("$expired"),
        # Soft-failed, deferred, or known to nobody else.
        "$by claims": hidden_event("$by claims", NOW_MS - 59_999),
        "$expired by claims": hidden_event("$expired by claims", NOW_MS - 60_000),
        "$from the future": hidden_event("$from the future", NOW_MS + 1),
        "$not sticky": hidden_event("$not sticky", duration_ms="long"),
        "$elsewhere": hidden_event("$elsewhere", room_id="!b"),
        "$erased": hidden_event("$erased", sender="@erased:there"),
    }
    ask = installed(rooms, follower).servers
    assert result_of(ask("there", list(events.values()))) == {"$unexpired", "$by claims"}
    assert result_of(ask("elsewhere", list(events.values()))) == set()
    assert result_of(ask("here", list(events.values()))) == set(), "what it asks itself for"


@pytest.mark.requirement("C1", "S2")
def test_what_is_not_kept_any_more_is_not_sticky_by_its_claims() -> None:
    rooms = Rooms({("!a", "there"), ("!a", "here")}, set())
    events = [hidden_event(f"${age_ms}", NOW_MS - age_ms) for age_ms in (4_999, 5_000)]
    ask = installed(rooms, Follower({}), lifetime_ms=5_000).servers
    assert result_of(ask("there", events)) == {"$4999"}


@pytest.mark.requirement("C1", "D8")
def test_what_a_joined_user_may_see() -> None:
    rooms = Rooms({("!a", "@me:here")}, {"@erased:there"})
    unexpired = dict.fromkeys(("$unexpired", "$elsewhere", "$erased"), NOW_MS + 1)
    follower = Follower({**unexpired, "$expired": NOW_MS})
    events = [
        hidden_event("$unexpired"),
        hidden_event("$expired"),
        hidden_event("$soft-failed or deferred"),
        hidden_event("$elsewhere", room_id="!b"),
        hidden_event("$erased", sender="@erased:there"),
    ]
    ask = installed(rooms, follower).users
    assert result_of(ask("@me:here", events)) == {"$unexpired"}
    assert result_of(ask("@other:here", events)) == set()


@pytest.mark.parametrize(("servers", "users"), [(True, False), (False, True), (False, False)])
def test_what_is_switched_off_is_not_asked(servers: bool, users: bool) -> None:
    visibility = installed(Rooms(set()), Follower({}), servers, users)
    assert (visibility.servers is not None, visibility.users is not None) == (servers, users)
