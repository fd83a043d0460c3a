"""Who may see sticky events, and which are refused (C1 to C3, D8)."""

from typing import Any

import pytest
import requests

from tests.conformance.target import Target, erase
from tests.lab import Peer, wait_until
from tests.lab.client import (
    HOUR_MS,
    STICKY_FIELD,
    ApiError,
    sliding_sticky_events,
    sticky_events,
)
from tests.lab.scene import Scene, enter
from tests.lab.views import (
    View,
    event_ids_in,
    is_hidden,
    send_message,
    send_thread,
    view,
)


@pytest.mark.requirement("C1")
@pytest.mark.parametrize("history_visibility", ["invited", "joined"])
def test_joined_users_see_them_from_before_their_join(
    target: Target, history_visibility: str
) -> None:
    alice, bob = target.user(), target.user()
    room_id = alice.create_room(history_visibility)
    plain = send_thread(alice, room_id)
    sticky = send_thread(alice, room_id, HOUR_MS)
    bob.join(room_id)
    assert view(bob, room_id, sticky) == view(alice, room_id, sticky)
    assert is_hidden(view(bob, room_id, plain))
    root, reply = sticky
    sync, sliding = bob.sync(), bob.sliding_sync()
    assert {root, reply} <= set(sticky_events(sync, room_id))
    assert {root, reply} <= set(sliding_sticky_events(sliding, room_id))
    # Each comes once, whether it is in the timeline or in the section (D3).
    ids = sticky_events(sync, room_id)
    assert len(ids) == len(set(ids))


@pytest.mark.requirement("C1")
def test_expired_ones_from_before_their_join_are_hidden(target: Target) -> None:
    alice, bob = target.user(), target.user()
    room_id = alice.create_room("joined")
    sticky = send_thread(alice, room_id, HOUR_MS)
    expiring = send_thread(alice, room_id, 2_000)
    expiring_reply = send_message(alice, room_id, 2_000, reply_to=sticky[0])
    bob.join(room_id)
    expired = [expiring, (expiring_reply, expiring_reply), (sticky[0], expiring_reply)]

    def shown() -> list[View]:
        return [view(bob, room_id, thread) for thread in expired]

    def is_over() -> bool:
        of_thread, of_reply, in_thread = shown()
        return (
            is_hidden(of_thread)
            and is_hidden(of_reply)
            and not any(reply for _, reply in in_thread.values())
        )

    wait_until(is_over, "the expired events to be hidden", look=shown)
    assert view(bob, room_id, sticky) == view(alice, room_id, sticky)
    sections = [bob.sync(), bob.sliding_sync()]
    assert not {*expiring, expiring_reply} & event_ids_in(sections)


@pytest.mark.requirement("C1")
def test_those_of_an_erased_user_are_hidden_from_who_joins_later(target: Target) -> None:
    alice, eve, bob = target.user(), target.user(), target.user()
    room_id = alice.create_room("joined")
    eve.join(room_id)
    of_alice = send_thread(alice, room_id, HOUR_MS)
    of_eve = send_thread(eve, room_id, HOUR_MS)
    bob.join(room_id)
    assert view(bob, room_id, of_eve) == view(alice, room_id, of_eve)
    erase(eve)
    wait_until(lambda: is_hidden(view(bob, room_id, of_eve)), "the erasure")
    assert view(bob, room_id, of_alice) == view(alice, room_id, of_alice)


@pytest.mark.requirement("C1", "D8")
@pytest.mark.parametrize("history_visibility", ["world_readable", "shared", "invited", "joined"])
def test_who_is_not_joined_sees_them_as_any_event(target: Target, history_visibility: str) -> None:
    alice, peeking, invited = target.user(), target.user(), target.user()
    room_id = alice.create_room(history_visibility)
    alice.invite(room_id, invited.user_id)
    sticky = send_thread(alice, room_id, HOUR_MS)
    everybody = history_visibility == "world_readable"
    assert view(peeking, room_id, sticky)["event"] == (everybody, everybody)
    assert view(peeking, room_id, sticky)["messages"] == (everybody, everybody)
    may = everybody or history_visibility == "invited"
    assert view(invited, room_id, sticky)["event"] == (may, may)


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


@pytest.mark.requirement("C2", "H7")
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
