"""What becomes of a room's graph of events, and of the server itself (F1 to F3, L3, E2, E4)."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import requests

from tests.conformance.conftest import TargetWith
from tests.conformance.target import Options, Target
from tests.lab import Peer, wait, wait_until
from tests.lab.client import ApiError, sliding_sticky_events
from tests.lab.peer import Answer
from tests.lab.resident import Resident
from tests.lab.scene import Scene, enter

_NONE = dict.fromkeys(("per_server", "per_server_in_room", "per_sender", "per_room"))
_SLOW = {"federation": {**_NONE, "per_server": {"per_second": 3, "burst_count": 5}}}
_THRESHOLD = 10
"""From so many forward extremities on Synapse sends dummy events."""


@pytest.mark.requirement("F1")
def test_on_top_of_unknown_events(scene: Scene[Target]) -> None:
    unknown, _ = scene.peer.sticky(scene.room, scene.eve)
    scene.peer.advance(scene.room, unknown)
    known = scene.sticky()
    scene.wait_for_sections(unknown, known)


@pytest.mark.requirement("F2")
@pytest.mark.timeout(300)
def test_forward_extremities_are_brought_down(scene: Scene[Target]) -> None:
    events = [scene.peer.sticky(scene.room, scene.eve) for _ in range(45)]
    assert all(not said for said in scene.send(*(pdu for _, pdu in events)).values())
    scene.wait_until_there(*(event_id for event_id, _ in events))

    def extremities() -> list[str]:
        """At most ten of them are told: fewer than that are all."""
        made = scene.peer.to(scene.server).make_join(scene.room_id, scene.peer.user("guest"))
        made.raise_for_status()
        found: list[str] = made.json()["event"]["prev_events"]
        return found

    wait_until(
        lambda: len(extremities()) < _THRESHOLD, "fewer forward extremities", 3 * wait.patience_s
    )
    # There were more, however soon they were brought down: one event refers to as many.
    answers = [scene.peer.to(scene.server).event(event_id).json() for event_id in extremities()]
    assert _THRESHOLD in [len(answer["pdus"][0]["prev_events"]) for answer in answers]


def sent_by(resident: Resident, target: Target, sender: str) -> str:
    """The peer sends a sticky event, which is acknowledged. Gives its ID."""
    event_id, pdu = resident.peer.sticky(resident.room, sender)
    answer = resident.peer.to(target).send(event_id[1:], [pdu])
    assert (answer.status_code, answer.json()["pdus"]) == (200, {event_id: {}}), answer.text
    return event_id


@pytest.mark.requirement("F3", "L3")
@pytest.mark.parametrize("is_killed", [False, True])
def test_the_only_event_while_the_room_is_joined(
    target: Target, peer: Peer, is_killed: bool
) -> None:
    """The server has never been in the room. What is sent has the join before it, so that whoever
    sent it has taken the join; the answer to the join comes later, or never."""
    resident, bob = Resident(peer), target.user("bob")
    sent: list[str] = []
    may_answer, is_sent = threading.Event(), threading.Event()

    def joining() -> None:
        if not sent:
            event_id, pdu = peer.sticky(resident.room, resident.eve)
            sent.append(event_id)
            said = peer.to(target).send(event_id[1:], [pdu])
            assert said.status_code == 200, said.text
            is_sent.set()
            may_answer.wait(50)

    def join() -> None:
        with suppress(requests.RequestException, ApiError):
            bob.again().join(resident.room_id, peer.name)

    resident.joining = joining
    with ThreadPoolExecutor(1) as executor:
        joined = executor.submit(join)
        wait_until(is_sent.is_set, "the event to be sent")
        if is_killed:
            target.kill_and_restart()
        may_answer.set()
        joined.result()
    if is_killed:
        bob.join(resident.room_id, peer.name)
    assert set(bob.collect_sticky(resident.room_id, set(sent), 2 * wait.patience_s)) == set(sent)


@pytest.mark.requirement("L3", "H7")
def test_auth_events_are_not_to_be_had_for_a_while(target: Target, peer: Peer) -> None:
    """The answer to the join left out who else is in the room, and so what allows them to send."""
    resident, bob = Resident(peer), target.user("bob")
    dora = peer.user("dora")
    resident.bring(dora)
    resident.omitted = {dora}
    is_over = threading.Event()
    failed: list[str] = []

    def answer(method: str, path: str) -> Answer | None:
        if "/state_ids/" in path:
            is_over.wait(50)
        elif "/event_auth/" in path and not is_over.is_set():
            failed.append(path)
            return 502, {}
        return None

    resident.override = answer
    bob.join(resident.room_id, peer.name)
    event_id = sent_by(resident, target, dora)
    wait_until(lambda: failed, "what allows it to be asked for")
    # A room's events are taken in in order.
    behind = sent_by(resident, target, resident.eve)

    def is_unknown(asked_for: str) -> bool:
        """Else it is there, whether the server says so to this one by now or not."""
        return peer.to(target).event(asked_for).status_code == 404

    wait_until(lambda: not is_unknown(behind), "the server to go on")
    assert is_unknown(event_id)
    is_over.set()
    wait_until(lambda: not is_unknown(event_id), "it to be taken in", 2 * wait.patience_s)


@pytest.mark.requirement("L3", "H7")
@pytest.mark.timeout(400)
def test_events_before_are_not_to_be_had_for_a_while(scene: Scene[Target]) -> None:
    """Then the peer answers again, about most of them: these need not wait for the others."""
    peer, room = scene.peer, scene.room
    peer.override = lambda method, path: (
        (404, {}) if "/get_missing_events/" in path or "/state_ids/" in path else None
    )
    extremities, depth = room.extremities, room.depth
    sent = list[str]()
    for _ in range(21):
        room.extremities, room.depth = extremities, depth
        withheld_id, _ = peer.sticky(room, scene.eve)
        peer.advance(room, withheld_id)
        sent.append(scene.sticky())
    lost = {
        before: peer.events.pop(before)
        for event_id in sent[:4]
        for before in peer.events[event_id]["prev_events"]
    }
    asked = "/get_missing_events/"
    wait_until(lambda: sum(asked in path for path in peer.requests) >= len(sent), "the questions")
    peer.override = lambda method, path: None

    def left(*event_ids: str) -> set[str]:
        return {*event_ids} - {*scene.sections()[0]}

    soon_s = wait.patience_s  # is the goal
    wait_until(lambda: not left(*sent[4:]), "most", 2 * soon_s, look=lambda: left(*sent))
    peer.events.update(lost)
    wait_until(lambda: not left(*sent), "all", 2 * soon_s, look=lambda: left(*sent))


@pytest.mark.requirement("E4")
def test_killed_while_events_wait(target_with: TargetWith, peer: Peer) -> None:
    scene = enter(target_with(Options(module=_SLOW)), peer)
    flood = scene.flood(60)
    newcomer_missed = scene.alice.send_sticky(scene.room_id)
    scene.server.kill_and_restart()
    last = scene.sticky()
    expected = {*flood, newcomer_missed, last}
    seen = scene.alice.collect_sticky(scene.room_id, expected, timeout_s=180)
    assert set(seen) == expected


@pytest.mark.requirement("E2")
@pytest.mark.timeout(900)
def test_with_postgres(postgres_target: Target, peer: Peer, other_peer: Peer) -> None:
    scene = enter(postgres_target, peer, "joined")
    old = [scene.alice.send_sticky(scene.room_id) for _ in range(3)]
    flood = scene.flood(100)
    scene.wait_until_there(flood[-1])
    of_bob_server = other_peer.join(scene.server, scene.room_id, other_peer.user("bob"))
    assert of_bob_server.room_id == scene.room_id
    wait_until(lambda: set(old) <= other_peer.events.keys(), "the newcomer to be sent them")
    bob = scene.server.user()
    bob.send_sticky(bob.create_room())
    answer = bob.sliding_sync()
    bob.join(scene.room_id)
    assert set(old) <= set(sliding_sticky_events(bob.sliding_sync(answer), scene.room_id))
    seen = bob.collect_sticky(scene.room_id, {*old, *flood}, timeout_s=180)
    assert set(seen) == {*old, *flood}
