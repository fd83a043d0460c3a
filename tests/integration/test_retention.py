"""A room's retention ends what is sticky in all parts of the server alike (S2)."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Servers
from tests.integration.rooms import (
    NO_LIMITS,
    entered,
    has_event,
    wait_until_all_pushed,
    wait_until_sticky,
)
from tests.lab import Client, Homeserver, wait_until
from tests.lab.client import WITHOUT_TIMELINE, sliding_sticky_events, sticky_events

LIFETIME_MS = 12_000
POLICY = {"max_lifetime": LIFETIME_MS}
TTL = "msc4354_sticky_duration_ttl_ms"

Order = Callable[[Client, str], list[str]]


def keeping(**retention: Any) -> dict[str, Any]:
    """The options of a server that enforces retention."""
    return {"config": NO_LIMITS, "extra": {"retention": {"enabled": True, **retention}}}


def section(user: Client, room_id: str) -> list[Any]:
    """The room's sticky section of a new client."""
    rooms = user.sync(filter_=WITHOUT_TIMELINE).get("rooms", {}).get("join", {})
    found: list[Any] = rooms.get(room_id, {}).get("msc4354_sticky", {}).get("events", [])
    return found


def wait_until_over(user: Client, room_id: str, event_ids: list[str]) -> None:
    def left() -> set[str]:
        sync, sliding = user.sync(filter_=WITHOUT_TIMELINE), user.sliding_sync()
        found = {*sticky_events(sync, room_id), *sliding_sticky_events(sliding, room_id)}
        return found & set(event_ids)

    wait_until(lambda: not left(), "the sections to be empty")


def policy_first(alice: Client, room_id: str) -> list[str]:
    alice.send_state(room_id, "m.room.retention", POLICY)
    return [alice.send_sticky(room_id) for _ in range(3)]


def policy_last(alice: Client, room_id: str) -> list[str]:
    sent = [alice.send_sticky(room_id) for _ in range(3)]
    alice.send_state(room_id, "m.room.retention", POLICY)
    return sent


@pytest.mark.slow
@pytest.mark.requirement("S2", "S4", "P3", "D1", "D2")
@pytest.mark.parametrize("order", [policy_first, policy_last])
def test_all_parts_have_one_answer(servers: Servers, order: Order) -> None:
    a, c = servers(keeping(), {"module": False})
    check_all_parts(a, c, order)


def check_all_parts(a: Homeserver, c: Homeserver, order: Order) -> None:
    """Of what ``a`` keeps for less than an hour ``c``, which joins later, gets nothing."""
    alice, carol = a.user(), c.user()
    room_id = alice.create_room()
    old = order(alice, room_id)
    shown = section(alice, room_id)
    assert [event["event_id"] for event in shown] == old

    def left_ms() -> list[int]:
        return [event["unsigned"][TTL] for event in section(alice, room_id)]

    wait_until(lambda: all(ms <= LIFETIME_MS for ms in left_ms()), "its processes to know")
    wait_until_over(alice, room_id, old)
    carol.join(room_id, a.name)
    new = alice.send_sticky(room_id)
    wait_until_sticky(c, new)
    wait_until_all_pushed(a, room_id)
    # Its own rows would be sticky for an hour.
    assert set(entered(c, room_id)) == {new}
    assert [event["event_id"] for event in section(alice, room_id)] == [new]


@pytest.mark.slow
@pytest.mark.requirement("S2", "P3")
def test_the_default_policy(servers: Servers) -> None:
    config = {"default_policy": {"max_lifetime": "12s"}}
    a, c = servers(keeping(**config), {"module": False})
    alice, carol = a.user(), c.user()
    room_id = alice.create_room()
    old = [alice.send_sticky(room_id) for _ in range(3)]
    wait_until_over(alice, room_id, old)
    a.restart()
    carol.join(room_id, a.name)
    new = alice.send_sticky(room_id)
    wait_until_sticky(c, new)
    wait_until_all_pushed(a, room_id)
    assert set(entered(c, room_id)) == {new}


@pytest.mark.slow
@pytest.mark.requirement("S2")
def test_no_row_stays_after_the_purge(servers: Servers) -> None:
    (a,) = servers(keeping(purge_jobs=[{"interval": "1s"}]))
    alice = a.user()
    room_id = alice.create_room()
    old = policy_first(alice, room_id)
    # The purge leaves the room's last event.
    wait_until_over(alice, room_id, old)
    new = alice.send_sticky(room_id)
    wait_until(lambda: not any(has_event(a, event_id) for event_id in old), "the purge", 120)
    wait_until(lambda: set(entered(a, room_id)) <= {new}, "the rows to be gone")
