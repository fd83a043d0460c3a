"""Parked PDUs: what is parked, and when it comes back (L3, S2, H7)."""

import time
from collections.abc import Collection

import pytest

from tests.conftest import Servers
from tests.integration.rooms import entered
from tests.integration.test_staging import parked, withhold
from tests.lab import Homeserver, Peer, wait_until
from tests.lab.faults import FAULTY_MODULE, set_clock
from tests.lab.scene import Scene, enter
from tests.lab.spam import PARTIAL_STATE

LONG_BACK_OFF = {
    "federation": {
        "destination_min_retry_interval": "10m",
        "destination_max_retry_interval": "1h",
    }
}
"""As Synapse has it by default."""

GOAL_S = 60
HOUR_MS, AHEAD_MS = 3_600_000, 3 * 3_600_000


def wait_until_entered(server: Homeserver, room_id: str, event_ids: Collection[str]) -> None:
    wait_until(
        lambda: {*event_ids} <= {*entered(server, room_id)},
        f"{len(event_ids)} events to be sticky",
        GOAL_S,
        look=lambda: len({*event_ids} & {*entered(server, room_id)}),
    )


@pytest.mark.slow
@pytest.mark.requirement("L3", "H7")
def test_auth_events_cannot_be_fetched_for_now(servers: Servers, peer: Peer) -> None:
    """The answer to the join left out who else is in the room. So what they send first makes this
    server ask theirs, which answers with an error for a moment, and sends nothing by itself."""
    partial = {"modules": [{"module": PARTIAL_STATE}], **LONG_BACK_OFF}
    resident, server = servers({"module": False}, {"extra": partial})
    scene = enter(resident, peer)
    # Of a room without a name the answer has some members.
    scene.alice.send_state(scene.room_id, "m.room.name", {"name": "a room"})
    bob = server.user("bob")
    bob.join(scene.room_id, resident.name)
    (join_id,) = wait_until(
        lambda: [e for e, pdu in peer.events.items() if pdu.get("state_key") == bob.user_id],
        "the peer to know of it",
    )
    peer.advance(scene.room, join_id)
    peer.override = lambda method, path: (502, {}) if "/event_auth/" in path else None
    here = Scene(server, peer, scene.alice, scene.eve, scene.room)
    sent = [here.sticky() for _ in range(5)]
    wait_until(lambda: parked(server) == {*sent}, "all to be parked")
    assert server.log_has("its auth_events cannot be fetched")
    peer.override = lambda method, path: None
    wait_until_entered(server, scene.room_id, sent)
    wait_until(lambda: not parked(server), "nothing to be left")


@pytest.mark.slow
@pytest.mark.requirement("L3", "H7", "H4")
@pytest.mark.parametrize("long_back_off", [False, True])
def test_all_come_back_once_it_answers(servers: Servers, peer: Peer, long_back_off: bool) -> None:
    """What some lack is with a server that stays away."""
    (server,) = servers({"extra": LONG_BACK_OFF} if long_back_off else {})
    scene = enter(server, peer)
    fails = 502 if long_back_off else 404
    peer.override = lambda method, path: (fails, {}) if "/state_ids/" in path else None
    extremities, depth = scene.room.extremities, scene.room.depth
    sent, before = list[str](), set[str]()
    peer.leaves_out = before.__contains__
    for _ in range(21):
        # Of what is missing the peer gives only the last event. The state before that is asked for.
        scene.room.extremities, scene.room.depth = extremities, depth
        before.add(withhold(scene))
        withhold(scene)
        sent.append(scene.sticky())
    stay_away = {sent[number] for number in (0, 1, 7, 20)}
    lost = {prev for event_id in stay_away for prev in peer.events[event_id]["prev_events"]}
    lost_pdus = {event_id: peer.events.pop(event_id) for event_id in lost}
    wait_until(lambda: parked(server) == {*sent}, "all to be parked")
    asked = sum("/state_ids/" in request for request in peer.requests)
    peer.override = lambda method, path: None
    wait_until_entered(server, scene.room_id, {*sent} - stay_away)
    assert asked <= 200
    peer.events.update(lost_pdus)
    wait_until_entered(server, scene.room_id, sent)


@pytest.mark.requirement("S2", "L3", "E4")
@pytest.mark.parametrize("restarts", [False, True])
def test_received_is_when_it_was_received(servers: Servers, peer: Peer, restarts: bool) -> None:
    """It is dated three hours ahead, and what is before it is withheld for long."""
    (server,) = servers({"module_name": FAULTY_MODULE})
    scene = enter(server, peer)
    peer.override = lambda method, path: (404, {}) if "/get_missing_events/" in path else None
    withheld_id = withhold(scene)
    before_ms = time.time() * 1000
    event_id, pdu = peer.sticky(scene.room, scene.eve, origin_server_ts=int(before_ms) + AHEAD_MS)
    scene.send(pdu)
    wait_until(lambda: parked(server) == {event_id}, "it to be parked")
    after_ms = time.time() * 1000
    if restarts:
        server.restart()
    set_clock(server, 50 * 60)
    fetched_ms = time.time() * 1000 + 50 * 60_000
    peer.override = lambda method, path: None
    wait_until_entered(server, scene.room_id, [withheld_id, event_id])
    sql = "SELECT event_id, expires_at FROM sticky_events WHERE room_id = ?"
    ends_ms = dict(server.query(sql, scene.room_id))
    assert before_ms + HOUR_MS <= ends_ms[event_id] <= after_ms + HOUR_MS
    # What was fetched was not dated ahead.
    assert ends_ms[withheld_id] <= fetched_ms + HOUR_MS
