"""Sticky events that were acknowledged are never pruned (L3)."""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
import requests

from tests.conftest import Servers
from tests.integration.rooms import (
    NO_LIMITS,
    entered,
    has_event,
    in_thread,
    room_of,
    send_old_events,
    wait_until_gone,
)
from tests.lab import Client, Homeserver, Peer, wait_until
from tests.lab.client import ApiError
from tests.lab.scene import Scene, enter
from tests.lab.spam import JOIN_HOLDER, hold_joins, holds_a_join, release_joins


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


@pytest.mark.slow
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


@pytest.mark.slow
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


def parked(server: Homeserver) -> set[str]:
    return {
        event_id for (event_id,) in server.query("SELECT event_id FROM synapse_sticky_incomplete")
    }


def withhold(scene: Scene[Homeserver]) -> str:
    """What the peer sends next comes on top of a sticky event that nobody has. Gives its ID."""
    withheld_id, _ = scene.peer.sticky(scene.room, scene.eve)
    scene.peer.advance(scene.room, withheld_id)
    return withheld_id


def send_on_top_of_what_is_withheld(scene: Scene[Homeserver], count: int) -> list[str]:
    """Gives the event IDs of all, first that of the withheld one."""
    return [withhold(scene), *scene.flood(count)]


@pytest.mark.requirement("L3", "F1", "P7")
@pytest.mark.parametrize("end", [None, "kill", "stop"])
def test_events_before_cannot_be_fetched_for_now(
    servers: Servers, peer: Peer, end: str | None
) -> None:
    """Who has them went away after it was told that these were taken. It need not send again."""
    (server,) = servers({})
    scene = enter(server, peer)
    peer.override = lambda method, path: (502, {}) if "/get_missing_events/" in path else None
    withheld_id, *sent = send_on_top_of_what_is_withheld(scene, 5)
    wait_until(lambda: parked(server) == set(sent), "all to be parked")
    assert not any(has_event(server, event_id) for event_id in (withheld_id, *sent))
    # The others of the room need not wait.
    scene.wait_for_sections(scene.alice.send_sticky(scene.room_id))
    if end == "kill":
        server.kill()
    elif end == "stop":
        server.stop()
    peer.override = lambda method, path: None
    if end is not None:
        server.start()
        server.wait_until_ready()
    wait_until(
        lambda: all({withheld_id, *sent} <= set(section) for section in scene.sections()),
        "all to be taken in",
    )
    wait_until(lambda: not parked(server), "nothing to be left")


def begin_to_join(
    user: Client, room_id: str, resident: Homeserver, *, held_by: Homeserver | None = None
) -> Callable[[], None]:
    """The resident holds the join up before it answers, or ``held_by`` as it reads the answer. The
    result waits for its end, whether it went well or not."""
    holder = held_by or resident
    hold_joins(holder.folder)

    def join() -> None:
        with suppress(requests.RequestException, ApiError):
            user.join(room_id, resident.name)

    finish = in_thread(join)
    wait_until(lambda: holds_a_join(holder.folder), "the room to be being joined")
    return finish


@pytest.mark.requirement("L3", "P3", "P7")
@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_while_the_room_is_being_joined(servers: Servers, peer: Peer, killed: bool) -> None:
    """What comes then is in memory only, or ignored. Who sent it was told that it was taken."""
    resident, server = servers(
        {"module": False, "extra": {"modules": [{"module": JOIN_HOLDER}]}}, {"config": NO_LIMITS}
    )
    scene = enter(resident, peer)
    bob = server.user("bob")
    # For a room that is not known at all see below.
    bob.join(scene.room_id, resident.name)
    bob.leave(scene.room_id)
    wait_until_gone(scene.alice, scene.room_id, bob)
    finish = begin_to_join(bob, scene.room_id, resident)
    kept = Scene(server, peer, scene.alice, scene.eve, scene.room).sticky()
    wait_until(lambda: kept in parked(server), "it to be parked")
    # Receiving processes do not know of the join.
    assert server.log_has("Queuing PDU" if server.receivers == 1 else "Ignoring PDU")
    if killed:
        server.kill()
    release_joins(resident.folder)
    finish()
    if killed:
        server.start()
        server.wait_until_ready()
        bob.join(scene.room_id, resident.name)
    wait_until(lambda: kept in entered(server, scene.room_id), "it to be taken in")
    wait_until(lambda: not parked(server), "nothing to be left")


@pytest.mark.slow
@pytest.mark.requirement("F3", "L3", "P3")
@pytest.mark.parametrize("killed", [False, True])
def test_a_room_never_seen_before(servers: Servers, killed: bool) -> None:
    """The resident has answered, and sends its only sticky event before the answer is processed."""
    options = {"config": NO_LIMITS, "extra": {"modules": [{"module": JOIN_HOLDER}]}}
    resident, server = servers({"module": False}, options)
    alice, bob = resident.user("alice"), server.user("bob")
    room_id = alice.create_room()
    finish = begin_to_join(bob, room_id, resident, held_by=server)
    wait_until(lambda: bob.user_id in alice.members(room_id), "the resident to have him")
    only = alice.send_sticky(room_id)
    wait_until(lambda: only in parked(server), "it to be parked")
    assert not has_event(server, only)
    if killed:
        server.kill()
    release_joins(server.folder)
    finish()
    if killed:
        server.start()
        server.wait_until_ready()
        bob.join(room_id, resident.name)
    joined_s = time.monotonic()
    seen = bob.collect_sticky(room_id, {only}, timeout_s=120)
    assert seen[only] - joined_s < 4 * 30
    wait_until(lambda: not parked(server), "nothing to be left")
    # Administrators see who made it, as if Synapse had entered the room.
    creators = server.query("SELECT creator FROM rooms WHERE room_id = ?", room_id)
    assert creators == [(alice.user_id,)]


@pytest.mark.requirement("L3", "L6")
def test_what_is_too_large_is_not_kept(servers: Servers, peer: Peer) -> None:
    """Synapse says so only after the prev_events have been fetched."""
    (server,) = servers({})
    scene = enter(server, peer)
    peer.override = lambda method, path: (502, {}) if "/get_missing_events/" in path else None
    withhold(scene)
    too_large, pdu = peer.sticky(scene.room, scene.eve, content={"body": "x" * 70_000})
    assert scene.send(pdu) == {too_large: {}}
    kept = scene.sticky()
    wait_until(lambda: kept in parked(server), "the other to be parked")
    assert parked(server) == {kept}


@pytest.mark.slow
@pytest.mark.one_process
@pytest.mark.requirement("L3", "P7")
def test_while_another_user_joins_by_another_server(servers: Servers, peer: Peer) -> None:
    """Then it is in memory only, although this server is in the room."""
    resident, server = servers(
        {"module": False, "extra": {"modules": [{"module": JOIN_HOLDER}]}}, {"config": NO_LIMITS}
    )
    scene = enter(resident, peer)
    bob, dora = server.user("bob"), server.user("dora")
    bob.join(scene.room_id, resident.name)
    # Whoever is in another room may join; but nobody here may say so.
    other = scene.alice.create_room()
    dora.join(other, resident.name)
    allow = [{"type": "m.room_membership", "room_id": other}]
    join_rules = {"join_rule": "restricted", "allow": allow}
    latest = [
        scene.alice.send_state(scene.room_id, "m.room.join_rules", join_rules),
        scene.alice.send_state(scene.room_id, "m.room.power_levels", {"invite": 50}),
        scene.alice.send_sticky(scene.room_id),
    ]
    assert bob.collect_sticky(scene.room_id, {latest[-1]}), "so that this server knows the state"
    wait_until(lambda: peer.events.keys() >= set(latest), "the peer to know it, too")
    for event_id in latest:
        peer.advance(scene.room, event_id)
    finish = begin_to_join(dora, scene.room_id, resident)
    kept = Scene(server, peer, scene.alice, scene.eve, scene.room).sticky()
    wait_until(lambda: kept in parked(server), "it to be parked")
    assert server.log_has("Queuing PDU")
    server.kill()
    release_joins(resident.folder)
    finish()
    server.start()
    server.wait_until_ready()
    wait_until(lambda: kept in entered(server, scene.room_id), "it to be taken in")
    wait_until(lambda: not parked(server), "nothing to be left")


@pytest.mark.slow
@pytest.mark.requirement("F3", "H3", "L6")
def test_few_are_kept_for_rooms_that_nobody_here_is_in(servers: Servers, peer: Peer) -> None:
    """This server might be joining them, as far as the process knows that receives these PDUs."""
    (server,) = servers({"config": NO_LIMITS})
    scene = enter(server, peer)
    scene.alice.leave(scene.room_id)
    sent = scene.flood(120)
    full = "Too many sticky PDUs of"
    wait_until(lambda: server.log_has(f"{full} {peer.name} are parked"), "the places to be taken")
    staged = "SELECT 1 FROM federation_inbound_events_staging"
    wait_until(lambda: not server.query(staged), "all to be processed", 120)
    assert len(parked(server)) == 100
    assert parked(server) <= set(sent)


@pytest.mark.requirement("L3")
def test_expired_while_parked(servers: Servers, peer: Peer) -> None:
    (server,) = servers({})
    scene = enter(server, peer)
    peer.override = lambda method, path: (502, {}) if "/get_missing_events/" in path else None
    withhold(scene)
    event_id = scene.sticky(duration_ms=3_000)
    wait_until(lambda: parked(server) == {event_id}, "it to be parked")
    wait_until(lambda: not parked(server), "it to expire")
    assert not has_event(server, event_id)
