"""What is sent to other servers: all own sticky events, until they have them (P1 to P7, F3)."""

import threading
from typing import Any

import pytest

from tests.conformance.conftest import TargetWith
from tests.conformance.target import EXTENDED, Target, erase
from tests.lab import Peer, wait, wait_until
from tests.lab.client import STICKY_FIELD
from tests.lab.peer import Pdu
from tests.lab.scene import Scene, enter


class Outage:
    """The peer answers no transaction until it is ``over``."""

    def __init__(self, peer: Peer) -> None:
        self.refused: set[str] = set()
        """The transactions that were refused."""
        self._over = threading.Event()
        peer.override = self._answer

    def _answer(self, method: str, path: str) -> Any:
        if self._over.is_set() or "/send/" not in path:
            return None
        self.refused.add(path)
        return 503, {"errcode": "M_UNKNOWN", "error": "There is an outage"}

    def over(self) -> None:
        self._over.set()


def received(peer: Peer, *event_ids: str) -> list[str]:
    """Which of these the peer has been sent, in that order, each once."""
    ids = {id(pdu): event_id for event_id, pdu in peer.events.items()}
    found = [ids.get(id(pdu), "") for pdu in list(peer.received)]
    return [e for e in dict.fromkeys(found) if e in event_ids]


def wait_for(peer: Peer, *event_ids: str) -> None:
    wait_until(
        lambda: set(received(peer, *event_ids)) == set(event_ids),
        "the events to be sent",
        2 * wait.patience_s,
    )


@pytest.mark.requirement("P1")
def test_own_events_are_sent(scene: Scene[Target]) -> None:
    event_id = scene.alice.send_sticky(scene.room_id)
    wait_for(scene.peer, event_id)
    assert STICKY_FIELD in scene.peer.events[event_id]


def go_through_an_outage(scene: Scene[Target]) -> list[str]:
    """Sends sticky events before many plain ones while the peer answers nothing."""
    outage = Outage(scene.peer)
    sent = [scene.alice.send_sticky(scene.room_id) for _ in range(3)]
    for _ in range(60):
        scene.alice.send(scene.room_id)
    # The second transaction shows that the first one has been given up.
    wait_until(lambda: len(outage.refused) > 1, "two transactions to be refused", 180)
    outage.over()
    sent.append(scene.alice.send_sticky(scene.room_id))
    return sent


@pytest.mark.requirement("P2", "P5", "H7")
def test_missed_events_follow_after_an_outage(scene: Scene[Target]) -> None:
    first = scene.alice.send_sticky(scene.room_id)
    wait_for(scene.peer, first)
    sent = go_through_an_outage(scene)
    wait_for(scene.peer, *sent)
    assert received(scene.peer, *sent[:3]) == sent[:3]


@pytest.mark.requirement("P2")
def test_outage_from_the_first_moment_on(target: Target, peer: Peer) -> None:
    scene = enter(target, peer)
    sent = go_through_an_outage(scene)
    wait_for(peer, *sent)


@pytest.mark.requirement("P3", "P5")
@pytest.mark.parametrize("history_visibility", ["shared", "joined"])
def test_newcomers_are_sent_what_is_sticky(
    target: Target, peer: Peer, history_visibility: str
) -> None:
    alice = target.user()
    room_id = alice.create_room(history_visibility)
    old = [alice.send_sticky(room_id) for _ in range(20)]
    peer.join(target, room_id, peer.user("eve"))
    wait_for(peer, *old)
    assert received(peer, *old) == old
    assert all(STICKY_FIELD in peer.events[event_id] for event_id in old)


@pytest.mark.requirement("P4")
def test_events_of_others_are_not_sent(scene: Scene[Target], other_peer: Peer) -> None:
    of_eve = scene.sticky()
    scene.wait_for_sections(of_eve)
    of_alice = scene.alice.send_sticky(scene.room_id)
    other_peer.join(scene.server, scene.room_id, other_peer.user("mallory"))
    # What comes after the join is sent at once, or behind what came before it.
    last = scene.alice.send_sticky(scene.room_id)
    wait_for(other_peer, last)
    assert of_eve not in received(other_peer, of_eve, of_alice, last)


@pytest.mark.requirement("P6")
def test_erased_users_are_not_caught_up_with(scene: Scene[Target]) -> None:
    wait_for(scene.peer, scene.alice.send_sticky(scene.room_id))
    bob = scene.server.user("bob")
    bob.join(scene.room_id)
    outage = Outage(scene.peer)
    of_bob = bob.send_sticky(scene.room_id)
    of_alice = scene.alice.send_sticky(scene.room_id)
    erase(bob)
    # What the server had in memory to send is gone, so it has to catch up.
    wait_until(lambda: outage.refused, "a transaction to be refused")
    scene.server.kill_and_restart()
    outage.over()
    last = scene.alice.send_sticky(scene.room_id)
    wait_for(scene.peer, of_alice, last)
    # If it comes at all, it is without what was in it.
    assert STICKY_FIELD not in scene.peer.events.get(of_bob, {})


class Forgetful:
    """The peer answers some transactions with 200 and acknowledges none of their events, as one
    that is still joining does."""

    def __init__(self, peer: Peer, times: int) -> None:
        self.left = times
        peer.override = self._answer

    def _answer(self, method: str, path: str) -> Any:
        if "/send/" in path and self.left:
            self.left -= 1
            return 200, {"pdus": {}}
        return None


@pytest.mark.requirement("P7")
def test_what_is_not_acknowledged_is_sent_again(target: Target, peer: Peer) -> None:
    forgetful = Forgetful(peer, 3)
    alice = target.user()
    room_id = alice.create_room()
    old = alice.send_sticky(room_id)
    peer.join(target, room_id, peer.user("eve"))
    wait_for(peer, old)
    assert not forgetful.left
    # And not any more once it is: the next event comes alone.
    new = alice.send_sticky(room_id)
    wait_for(peer, new)
    assert peer.received.count(peer.events[old]) == 1


def is_sticky(pdu: Pdu) -> bool:
    return STICKY_FIELD in pdu


_ACL = "m.room.server_acl"
_DENIES_THE_PEER = {"allow": ["*"], "deny": ["localhost"], "allow_ip_literals": True}
_ALLOWS_ALL = {"allow": ["*"], "allow_ip_literals": True}
_RESTORED_WITHIN_S = 40
"""Ten seconds are the goal."""


@pytest.mark.requirement("P3", "P7", "H7")
@pytest.mark.parametrize("is_killed", [False, True])
def test_an_acl_put_right(target_with: TargetWith, peer: Peer, is_killed: bool) -> None:
    """It denied a server that has just joined all that it had not acknowledged by then."""
    target = target_with(EXTENDED)
    alice = target.user()
    room_id = alice.create_room()
    old = {alice.send_sticky(room_id) for _ in range(60)}
    peer.ignores = is_sticky
    peer.join(target, room_id, peer.user("eve"))
    wait_for(peer, alice.send(room_id))
    alice.send_state(room_id, _ACL, _DENIES_THE_PEER)
    # What was under way by then ends with the first of these.
    for _ in range(2):
        wait_for(peer, alice.send(room_id))
    peer.ignores = lambda pdu: False
    if is_killed:
        target.kill_and_restart()
    wait_for(peer, alice.send(room_id))
    assert not old & peer.events.keys(), "none while it is denied"
    alice.send_state(room_id, _ACL, _ALLOWS_ALL)
    new = {alice.send_sticky(room_id) for _ in range(5)}
    wait_until(
        lambda: old | new <= peer.events.keys(),
        "all to arrive",
        _RESTORED_WITHIN_S,
        look=lambda: len((old | new) & peer.events.keys()),
    )


@pytest.mark.requirement("F3")
def test_events_in_transit_while_the_other_side_joins(target: Target, peer: Peer) -> None:
    alice = target.user()
    room_id = alice.create_room()
    forgetful = Forgetful(peer, 1)
    peer.join(target, room_id, peer.user("eve"))
    in_transit = alice.send_sticky(room_id)
    wait_until(lambda: not forgetful.left, "the event to be ignored")
    wait_for(peer, in_transit)
