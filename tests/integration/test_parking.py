"""Parked PDUs: what is parked, and when it comes back (L3, S2, H7)."""

import time
from collections.abc import Callable, Collection

import pytest

from tests.conftest import Servers
from tests.integration.test_staging import parked, withhold
from tests.lab import Homeserver, Peer, wait_until
from tests.lab.client import WITHOUT_TIMELINE, sliding_sticky_events, sticky_events
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

AUTH_GOAL_S, PREV_GOAL_S = 30, 60
"""How soon all is there once who has what was missing answers again."""
HOUR_MS, AHEAD_MS = 3_600_000, 3 * 3_600_000


Sections = Callable[[], Collection[Collection[str]]]
"""What a new client is given, in /sync and in sliding sync."""


def wait_for_sections(sections: Sections, event_ids: Collection[str], goal_s: float) -> None:
    """Waits until both sections have the events; four times as long as it may take."""
    left = {*event_ids}

    def look() -> int:
        return min(len(left & {*section}) for section in sections())

    wait_until(lambda: look() == len(left), f"{len(left)} events", 4 * goal_s, look=look)


@pytest.mark.slow
@pytest.mark.requirement("L3", "H7")
def test_auth_events_cannot_be_fetched_for_now(servers: Servers, peer: Peer) -> None:
    partial = {"modules": [{"module": PARTIAL_STATE}], **LONG_BACK_OFF}
    resident, server = servers({"module": False}, {"extra": partial})
    check_auth_events(resident, server, peer)


def check_auth_events(resident: Homeserver, server: Homeserver, peer: Peer) -> None:
    """The answer to the join left out who else is in the room. So what they send first makes this
    server ask theirs, which answers with an error for a moment, and sends nothing by itself."""
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
    here = Scene(server, peer, bob, scene.eve, scene.room)
    # Other clients do not see the room while its state is partial.
    lazy = {"room": {**WITHOUT_TIMELINE["room"], "state": {"lazy_load_members": True}}}

    def sections() -> tuple[list[str], list[str]]:
        in_sync = sticky_events(bob.sync(filter_=lazy), scene.room_id)
        return in_sync, sliding_sticky_events(bob.sliding_sync(), scene.room_id)

    sent = [here.sticky() for _ in range(5)]
    wait_until(lambda: parked(server) == {*sent}, "all to be parked")
    assert server.log_has("its auth_events cannot be fetched")
    assert not any({*sent} & {*section} for section in sections())
    peer.override = lambda method, path: None
    wait_for_sections(sections, sent, AUTH_GOAL_S)
    wait_until(lambda: not parked(server), "nothing to be left")


@pytest.mark.slow
@pytest.mark.requirement("L3", "H7", "H4")
@pytest.mark.parametrize("long_back_off", [False, True])
def test_all_come_back_once_it_answers(servers: Servers, peer: Peer, long_back_off: bool) -> None:
    (server,) = servers({"extra": LONG_BACK_OFF} if long_back_off else {})
    check_all_come_back(server, peer, 502 if long_back_off else 404)


def check_all_come_back(server: Homeserver, peer: Peer, fails: int) -> None:
    """What some lack is with a server that stays away."""
    scene = enter(server, peer)
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
    wait_for_sections(scene.sections, {*sent} - stay_away, PREV_GOAL_S)
    assert asked <= 200
    peer.events.update(lost_pdus)
    wait_for_sections(scene.sections, sent, PREV_GOAL_S)


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
    wait_for_sections(scene.sections, [withheld_id, event_id], PREV_GOAL_S)
    sql = "SELECT event_id, expires_at FROM sticky_events WHERE room_id = ?"
    ends_ms = dict(server.query(sql, scene.room_id))
    assert before_ms + HOUR_MS <= ends_ms[event_id] <= after_ms + HOUR_MS
    # What was fetched was not dated ahead.
    assert ends_ms[withheld_id] <= fetched_ms + HOUR_MS
