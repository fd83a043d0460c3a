"""Forward extremities that sticky events leave are brought down within a minute (F2)."""

import pytest

from tests.conftest import Servers
from tests.integration.rooms import NO_LIMITS, entered, room_of, send_old_events
from tests.lab import Homeserver, Peer, wait_until
from tests.lab.scene import enter

THRESHOLD = 10
UNLIMITED = {"config": NO_LIMITS}


def extremities(server: Homeserver, room_id: str) -> int:
    sql = "SELECT count(*) FROM event_forward_extremities WHERE room_id = ?"
    ((count,),) = server.query(sql, room_id)
    return int(count)


def dummy_events(server: Homeserver, room_id: str) -> int:
    sql = "SELECT count(*) FROM events WHERE room_id = ? AND type = 'org.matrix.dummy_event'"
    ((count,),) = server.query(sql, room_id)
    return int(count)


def flood_with_forks(server: Homeserver, peer: Peer, count: int) -> str:
    """Sticky events on top of one and the same event. Gives the room's ID."""
    scene = enter(server, peer)
    forks = [peer.sticky(scene.room, scene.eve) for _ in range(count)]
    for first in range(0, count, 50):
        scene.send(*(pdu for _, pdu in forks[first : first + 50]))
    wait_until(
        lambda: len(entered(server, scene.room_id)) == count, "the flood to be taken in", 180
    )
    return scene.room_id


@pytest.mark.slow
@pytest.mark.requirement("F2")
def test_after_260_old_events(servers: Servers) -> None:
    a, b, c = servers(UNLIMITED, UNLIMITED, UNLIMITED)
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a)
    old = send_old_events(room_id, [alice, bob], 130)
    carol.join(room_id, a.name)
    assert set(carol.collect_sticky(room_id, old, timeout_s=180)) == old
    for server in (a, b, c):
        wait_until(lambda s=server: extremities(s, room_id) <= THRESHOLD, "few extremities", 60)  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.requirement("F2", "L1")
def test_after_a_flood_of_forks(servers: Servers, peer: Peer) -> None:
    (server,) = servers(UNLIMITED)
    room_id = flood_with_forks(server, peer, 250)
    wait_until(lambda: extremities(server, room_id) <= THRESHOLD, "few extremities", 60)
    # Ten become one each time: no more than needed were sent.
    assert 0 < dummy_events(server, room_id) <= 27


@pytest.mark.slow
@pytest.mark.requirement("F2")
def test_no_more_than_are_allowed(servers: Servers, peer: Peer) -> None:
    """One in each round of five seconds."""
    (server,) = servers({"config": {**NO_LIMITS, "dummy_events": {"per_minute": 12}}})
    room_id = flood_with_forks(server, peer, 40)
    wait_until(lambda: extremities(server, room_id) <= THRESHOLD, "few extremities", 60)
    told = [line for line in server.output().splitlines() if "dummy events to" in line]
    assert len(told) == dummy_events(server, room_id) == 4
    assert all(f"Sent 1 dummy events to {room_id}" in line for line in told)


@pytest.mark.requirement("F2")
def test_where_nobody_may_send(servers: Servers, peer: Peer) -> None:
    (server,) = servers(UNLIMITED)
    scene = enter(server, peer)
    bob = server.user("bob")
    bob.join(scene.room_id)
    power = scene.alice.request("GET", f"rooms/{scene.room_id}/state/m.room.power_levels/")
    power["events"]["org.matrix.dummy_event"] = 1_000
    scene.alice.send_state(scene.room_id, "m.room.power_levels", power)
    # She made the room, and so may do all.
    scene.alice.leave(scene.room_id)
    room = peer.join(server, scene.room_id, scene.eve)
    forks = [peer.sticky(room, scene.eve) for _ in range(20)]
    scene.send(*(pdu for _, pdu in forks))
    wait_until(
        lambda: server.log_has(f"Nobody here can send a dummy event to {scene.room_id}"), "the try"
    )
    assert extremities(server, scene.room_id) == 20
    assert dummy_events(server, scene.room_id) == 0
    sent = {event_id for event_id, _ in forks}
    assert set(bob.collect_sticky(scene.room_id, sent)) == sent
