"""Who may see sticky events, and which are refused (C1 to C3)."""

import json
from typing import Any

import pytest
import requests

from tests.conformance.target import Target
from tests.lab import Peer, wait_until
from tests.lab.client import STICKY_FIELD, ApiError
from tests.lab.membership import asked_one_by_one
from tests.lab.scene import Scene, enter


@pytest.mark.requirement("C1")
@pytest.mark.parametrize("history_visibility", ["invited", "joined"])
def test_joined_users_see_them_from_before_their_join(
    target: Target, history_visibility: str
) -> None:
    alice, bob = target.user(), target.user()
    room_id = alice.create_room(history_visibility)
    plain = alice.send(room_id)
    sticky, expiring = alice.send_sticky(room_id), alice.send_sticky(room_id, 2_000)
    bob.join(room_id)
    event, context, messages, _ = asked_one_by_one(bob, room_id, sticky)
    assert sticky in event
    assert json.loads(context)["event"]["event_id"] == sticky
    assert sticky in messages
    assert not any(plain in answer for answer in asked_one_by_one(bob, room_id, plain))
    assert sticky in json.dumps(bob.sync()["rooms"]["join"][room_id][STICKY_FIELD])
    assert sticky in json.dumps(bob.sliding_sync()["extensions"])
    wait_until(
        lambda: not any(expiring in a for a in asked_one_by_one(bob, room_id, expiring)),
        "the expired event to be hidden",
    )


def body_of(response: requests.Response) -> Any:
    """The body of the one PDU in the answer; None if it is redacted."""
    assert response.status_code == 200, response.text
    (pdu,) = response.json()["pdus"]
    return pdu["content"].get("body")


@pytest.mark.requirement("C1")
def test_joined_servers_see_them_from_before_their_join(target: Target, peer: Peer) -> None:
    alice = target.user()
    room_id = alice.create_room("joined")
    plain = alice.send(room_id)
    sticky = alice.send_sticky(room_id)
    peer.join(target, room_id, peer.user("eve"))
    last = alice.send(room_id)
    asked = peer.to(target)
    assert body_of(asked.event(sticky)) == "here"
    assert body_of(asked.event(plain)) is None
    stickies = [
        pdu
        for pdus in (
            asked.backfill(room_id, last, 100),
            asked.missing_events(room_id, [plain], [last]),
        )
        for pdu in pdus
        if STICKY_FIELD in pdu
    ]
    assert [pdu["content"].get("body") for pdu in stickies] == ["here"] * 2


@pytest.mark.requirement("C1")
def test_servers_that_are_not_joined_see_nothing(target: Target, peer: Peer) -> None:
    alice = target.user()
    room_id = alice.create_room("joined")
    event_id = alice.send_sticky(room_id)
    assert peer.to(target).event(event_id).status_code == 403


@pytest.mark.requirement("C2")
def test_soft_failed_events_are_checked_again(target: Target, peer: Peer) -> None:
    scene = enter(target, peer)
    extremities, depth = scene.room.extremities, scene.room.depth
    scene.alice.kick(scene.room_id, scene.eve)
    # On top of what was before the kick.
    soft_failed = scene.sticky()
    scene.wait_for_sections()
    assert (scene.room.extremities, scene.room.depth) == (extremities, depth)
    peer.join(target, scene.room_id, scene.eve)
    scene.wait_for_sections(soft_failed)


@pytest.mark.requirement("C3")
def test_unauthorised_events_are_refused(scene: Scene[Target]) -> None:
    never_joined = scene.peer.user("never-joined")
    forged = [never_joined, scene.alice.user_id, "@alice:elsewhere.example", "nobody"]
    events = [scene.peer.sticky(scene.room, sender) for sender in forged]
    for event_id, pdu in events:
        scene.send(pdu, transaction_id=f"forged-{event_id[1:]}")
    scene.wait_for_sections(scene.sticky())
    for event_id, _ in events:
        with pytest.raises(ApiError):
            scene.alice.event(scene.room_id, event_id)
