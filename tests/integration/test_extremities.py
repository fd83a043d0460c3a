"""Forward extremities that sticky events leave are brought down within a minute (F2)."""

from typing import Any

import attr
import pytest

from tests.conftest import Servers
from tests.integration.rooms import NO_LIMITS, entered, room_of, send_old_events
from tests.lab import Client, Homeserver, Peer, wait_until
from tests.lab.scene import Scene, enter
from tests.lab.spam import DUMMY_RULE, allow_dummy_events, refuse_dummy_events

DUMMY = "org.matrix.dummy_event"

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


def refused_events(server: Homeserver) -> int:
    """How many dummy events Synapse has made and then refused, whatever the cause: users' lack of
    power, or a rule of the operator's."""
    return sum(
        DUMMY in line and ("Denying new event" in line or "forbidden by third-party rules" in line)
        for line in server.output().splitlines()
    )


NOBODY = "Nobody here can send a dummy event to"


def forked_room_where_nobody_may_send(
    server: Homeserver, peer: Peer, absent: Client, *members: Client
) -> Scene[Any]:
    """None of its local members may. The peer's user could allow it, and the absent one might."""
    scene = enter(server, peer)
    for user in members:
        user.join(scene.room_id)
    power = scene.alice.request("GET", f"rooms/{scene.room_id}/state/m.room.power_levels/")
    power["events"][DUMMY] = 1_000
    power["users"] |= {scene.eve: 1_000, absent.user_id: 1_000}
    scene.alice.send_state(scene.room_id, "m.room.power_levels", power)
    # She made the room, and so may do all.
    scene.alice.leave(scene.room_id)
    room = peer.join(server, scene.room_id, scene.eve)
    forks = [peer.sticky(room, scene.eve) for _ in range(40)]
    scene.send(*(pdu for _, pdu in forks))
    wait_until(lambda: len(entered(server, scene.room_id)) == 40, "the flood to be taken in")
    return attr.evolve(scene, room=room)


@pytest.mark.slow
@pytest.mark.requirement("F2", "H2", "H7")
def test_where_nobody_may_send(servers: Servers, peer: Peer) -> None:
    """Nothing is tried; and all is as it should be at once when it is mended in the room."""
    (server,) = servers(UNLIMITED)
    bob, dan = server.user("bob"), server.user("dan")
    others = [server.user() for _ in range(2)]
    mended_by_power = forked_room_where_nobody_may_send(server, peer, dan, bob, *others)
    mended_by_join = forked_room_where_nobody_may_send(server, peer, dan, bob)
    rooms = [mended_by_power.room_id, mended_by_join.room_id]
    for room_id in rooms:
        wait_until(lambda r=room_id: server.log_has(f"{NOBODY} {r}"), "a look")  # type: ignore[misc]
        assert extremities(server, room_id) == 40
        assert dummy_events(server, room_id) == 0
        assert len(set(bob.collect_sticky(room_id, set(entered(server, room_id))))) == 40

    dan.join(mended_by_join.room_id)
    room = mended_by_power.room
    content = peer.events[room.state["m.room.power_levels", ""]]["content"]
    _, mended = peer.make(
        room,
        mended_by_power.eve,
        {**content, "events": {**content["events"], DUMMY: 0}},
        kind="m.room.power_levels",
        state_key="",
    )
    mended_by_power.send(mended)
    for room_id in rooms:
        wait_until(lambda r=room_id: extremities(server, r) <= THRESHOLD, "few extremities")  # type: ignore[misc]
        told = [line for line in server.output().splitlines() if f"{NOBODY} {room_id}" in line]
        assert len(told) == 1
    assert refused_events(server) == 0


@pytest.mark.slow
@pytest.mark.requirement("H2", "H7")
def test_where_a_rule_refuses_them(servers: Servers, peer: Peer) -> None:
    """One event is made, however many members there are and whatever else happens."""
    (server,) = servers({**UNLIMITED, "extra": {"modules": [{"module": DUMMY_RULE}]}})
    scene = enter(server, peer)
    room_id = scene.room_id
    for _ in range(20):
        server.user().join(room_id)
    refuse_dummy_events(server.folder, room_id)
    room = peer.join(server, room_id, scene.eve)
    forks = [peer.sticky(room, scene.eve) for _ in range(60)]
    scene.send(*(pdu for _, pdu in forks[:50]))
    wait_until(lambda: refused_events(server) > 0, "the try")

    # While dummy events bring this one down, several rounds go by.
    scene.alice.send_state(room_id, "m.room.topic", {"topic": "of no interest"})
    scene.send(*(pdu for _, pdu in forks[50:]))
    other_id = flood_with_forks(server, peer, 100)
    wait_until(lambda: extremities(server, other_id) <= THRESHOLD, "few extremities", 60)
    assert refused_events(server) == 1

    power = scene.alice.request("GET", f"rooms/{room_id}/state/m.room.power_levels/")
    scene.alice.send_state(room_id, "m.room.power_levels", {**power, "invite": 1})
    wait_until(lambda: refused_events(server) == 2, "another try")
    allow_dummy_events(server.folder)
    scene.alice.send_state(room_id, "m.room.power_levels", {**power, "invite": 2})
    wait_until(lambda: extremities(server, room_id) <= THRESHOLD, "few extremities", 60)
    assert refused_events(server) == 2
