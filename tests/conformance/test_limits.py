"""Floods of sticky events (L1 to L7, E1, E3)."""

from typing import Any

import pytest

from tests.conformance.conftest import TargetWith
from tests.conformance.target import Options, Target
from tests.lab import Peer, wait_until
from tests.lab.client import STICKY_FIELD, WITHOUT_TIMELINE, ApiError, sticky_events
from tests.lab.scene import Scene, enter

_NONE = dict.fromkeys(("per_server", "per_server_in_room", "per_sender", "per_room"))
_BURST = 5


def federation(per_second: float, **options: Any) -> Options:
    """Few of one server at once, and then so many a second."""
    per_server = {"per_second": per_second, "burst_count": _BURST}
    return Options(module={"federation": {**_NONE, "per_server": per_server, **options}})


_FAST = federation(1)
"""But slower than any machine takes events in, so that some wait."""
_NEVER = federation(0.001)
"""So slow that nothing is released within a test."""
_REFUSING = federation(0.2, mode="reject")


def delivered(scene: Scene[Target]) -> list[str]:
    """All of the room that /sync gives to a new client, page by page."""
    seen: list[str] = []
    since = None
    while True:
        answer = scene.alice.sync(since, filter_=WITHOUT_TIMELINE)
        since = answer["next_batch"]
        page = sticky_events(answer, scene.room_id)
        if not page:
            return seen
        seen += page


def wait_until_delivered(scene: Scene[Target], event_ids: list[str]) -> None:
    wait_until(lambda: set(event_ids) <= set(delivered(scene)), "all to be delivered", 240)


def send_until_refused(scene: Scene[Target]) -> tuple[list[str], str, Any]:
    """The peer, which one receiving process takes no more of, sends one event after another.

    Each other process takes a burst at most. Gives the IDs of what they took, and the ID and the
    PDU of what was refused; its transaction ID is the event's ID without the sigil.
    """
    taken: list[str] = []
    for _ in range((scene.server.receivers - 1) * _BURST + 1):
        event_id, pdu = scene.peer.sticky(scene.room, scene.eve)
        answer = scene.peer.to(scene.server).send(event_id[1:], [pdu])
        if answer.status_code == 429:
            assert answer.json()["errcode"] == "M_LIMIT_EXCEEDED"
            return taken, event_id, pdu
        assert (answer.status_code, answer.json()["pdus"]) == (200, {event_id: {}})
        scene.peer.advance(scene.room, event_id)
        taken.append(event_id)
    raise AssertionError("nothing was refused")


@pytest.mark.requirement("L1")
def test_other_servers_are_limited(scene: Scene[Target]) -> None:
    """With what the homeserver has by default."""
    flood = scene.flood(300)
    scene.wait_until_there(flood[-1])
    assert set(delivered(scene)) < set(flood)


@pytest.mark.requirement("L2")
def test_refusing(target_with: TargetWith, peer: Peer) -> None:
    scene = enter(target_with(_REFUSING), peer)
    first = scene.flood(_BURST)
    more, event_id, pdu = send_until_refused(scene)
    scene.wait_until_there(first[-1])
    assert not scene.is_there(event_id)
    # What is not sticky passes, and so does the same again after a time.
    plain_id, plain = peer.make(scene.room, scene.eve)
    assert scene.send(plain) == {plain_id: {}}
    send = peer.to(scene.server).send
    wait_until(lambda: send(event_id[1:], [pdu]).status_code == 200, "the event to be taken")
    wait_until_delivered(scene, [*first, *more, event_id])


@pytest.mark.requirement("L3")
def test_nothing_that_was_acknowledged_is_dropped(scene: Scene[Target]) -> None:
    flood = scene.flood(400)
    scene.wait_until_there(*flood)
    for event_id in flood:
        assert STICKY_FIELD in scene.alice.event(scene.room_id, event_id)


@pytest.mark.requirement("L4")
def test_deferring(target_with: TargetWith, peer: Peer) -> None:
    scene = enter(target_with(_FAST), peer)
    flood = scene.flood(60)
    scene.wait_until_there(flood[-1])
    assert len(set(flood) - set(delivered(scene))) > 0
    wait_until_delivered(scene, flood)
    assert sorted(delivered(scene)) == sorted(flood)


@pytest.mark.requirement("L5")
def test_through_a_third_server(target_with: TargetWith, peer: Peer, other_peer: Peer) -> None:
    scene = enter(target_with(_NEVER), peer)
    room = other_peer.join(scene.server, scene.room_id, other_peer.user("bob"))
    wait_until(lambda: other_peer.user("bob") in scene.alice.members(scene.room_id), "bob")
    # Never sent by their own server: the other one has them, and refers to them.
    withheld = []
    for _ in range(_BURST + 3):
        event_id, pdu = peer.sticky(scene.room, scene.eve)
        peer.advance(scene.room, event_id)
        other_peer.events[event_id] = pdu
        withheld.append(event_id)
    of_bob, pdu = other_peer.sticky(
        room, other_peer.user("bob"), prev_events=[*room.extremities, withheld[-1]]
    )
    answer = other_peer.to(scene.server).send("third", [pdu])
    assert answer.json()["pdus"] == {of_bob: {}}
    scene.wait_until_there(of_bob, *withheld)
    wait_until_delivered(scene, [of_bob])
    assert len(set(withheld) & set(delivered(scene))) == _BURST


@pytest.mark.requirement("L6")
def test_claimed_senders(target_with: TargetWith, peer: Peer, other_peer: Peer) -> None:
    scene = enter(target_with(_REFUSING), peer)
    victim = other_peer.user("victim")
    room = other_peer.join(scene.server, scene.room_id, victim)
    claimed = [peer.sticky(scene.room, victim)[1] for _ in range(2 * _BURST)]
    assert peer.to(scene.server).send("claimed", claimed).status_code == 200
    # Who sent them has used up its own allowance ...
    send_until_refused(scene)
    # ... and not the victim's.
    event_id, pdu = other_peer.sticky(room, victim)
    answer = other_peer.to(scene.server).send("victim", [pdu])
    assert (answer.status_code, answer.json()["pdus"]) == (200, {event_id: {}})
    wait_until_delivered(scene, [event_id])


@pytest.mark.requirement("L7")
def test_start_of_a_call(scene: Scene[Target]) -> None:
    """With what the homeserver has by default."""
    members = [scene.bring(f"member{number}") for number in range(50)]
    sent = scene.flood(2 * len(members), *members)
    scene.wait_until_there(sent[-1])
    assert sorted(delivered(scene)) == sorted(sent)


@pytest.mark.requirement("L7")
def test_exempt_servers(target_with: TargetWith, peer: Peer) -> None:
    scene = enter(target_with(federation(0.001, exempt_servers=["localhost:*"])), peer)
    sent = scene.flood(3 * _BURST)
    scene.wait_until_there(sent[-1])
    assert sorted(delivered(scene)) == sorted(sent)


@pytest.mark.requirement("E1")
def test_local_users_are_told_to_wait(target: Target) -> None:
    alice = target.user()
    room_id = alice.create_room()

    def flood() -> None:
        for _ in range(200):
            alice.send_sticky(room_id)

    with pytest.raises(ApiError) as refused:
        flood()
    assert (refused.value.status, refused.value.errcode) == (429, "M_LIMIT_EXCEEDED")
    assert refused.value.body["retry_after_ms"] > 0
    alice.send(room_id)


@pytest.mark.requirement("E3")
def test_counters(target_with: TargetWith, peer: Peer) -> None:
    scene = enter(target_with(_FAST), peer)
    assert isinstance(scene.server, Target)

    def counted(name: str) -> float:
        return sum(
            value
            for found, value in scene.server.metrics().items()
            if found == name or found.startswith(name + "{")
        )

    deferred, released = "synapse_sticky_deferred_total", "synapse_sticky_released_total"
    before = counted(deferred), counted(released)
    flood = scene.flood(30)
    wait_until_delivered(scene, flood)
    assert counted(deferred) - before[0] > 0
    wait_until(
        lambda: counted(released) - before[1] == counted(deferred) - before[0], "all to be counted"
    )
    assert any('limit="per_server"' in name for name in scene.server.metrics())
