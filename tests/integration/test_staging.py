"""Sticky events that were acknowledged are never pruned (L3)."""

from collections.abc import Callable
from functools import partial

import pytest

from tests.conftest import Servers
from tests.integration.rooms import NO_LIMITS, in_thread, room_of, send_old_events
from tests.lab import Homeserver, wait_until


def highest_staged(server: Homeserver, done: Callable[[], bool]) -> int:
    """The most PDUs that were seen staged until ``done``."""
    highest = 0

    def look() -> bool:
        nonlocal highest
        ((staged,),) = server.query("SELECT COUNT(*) FROM federation_inbound_events_staging")
        highest = max(highest, staged)
        return done()

    wait_until(look, "all to be taken in", timeout_s=240)
    return highest


def sticky_count(server: Homeserver, room_id: str) -> int:
    ((count,),) = server.query("SELECT COUNT(*) FROM sticky_events WHERE room_id = ?", room_id)
    return int(count)


@pytest.mark.requirement("L3")
def test_flood_of_sticky_events(servers: Servers) -> None:
    a, b, c = servers({"module": False}, {"module": False}, {"config": NO_LIMITS})
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, carol, via=a)
    c.pause()
    try:
        finish = in_thread(partial(send_old_events, room_id, [bob], 200))
        send_old_events(room_id, [alice], 200)
        finish()
    finally:
        c.resume()
    staged = highest_staged(c, lambda: sticky_count(c, room_id) == 400)
    assert staged > 100, "this many are needed for the case to be one"
    assert not c.log_has("Pruning")


@pytest.mark.requirement("L3")
def test_other_events_are_pruned_as_ever(servers: Servers) -> None:
    a, c = servers({"module": False}, {})
    alice, carol = a.user(), c.user()
    room_id = room_of(alice, carol, via=a)
    c.pause()
    try:
        sticky = [alice.send_sticky(room_id) for _ in range(20)]
        for _ in range(400):
            alice.send(room_id)
        sticky += [alice.send_sticky(room_id) for _ in range(20)]
    finally:
        c.resume()
    highest_staged(c, lambda: sticky_count(c, room_id) == len(sticky))
    assert c.log_has("Pruning")
