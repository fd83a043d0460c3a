"""What one server floods a room with does not stand in front of what another sends (D7).

The first PDU of each flood is held up, as its peer does not answer a question about what is before
it. So all are staged by the time that the other server's PDU is. Whatever is counted, is counted
by the order in which the homeserver persisted it.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attr
import pytest

from tests.integration.rooms import has_event, sticky_at
from tests.lab import Homeserver, Lab, Peer, wait_until
from tests.lab.peer import PeerRoom
from tests.lab.scene import Scene, enter

_IN_TRANSACTION = 50


class Gate:
    """Holds up what is asked of a peer about missing events, once for each ``close``."""

    def __init__(self, peer: Peer) -> None:
        self._open = threading.Event()
        self.is_reached = threading.Event()
        self.close()
        peer.override = self._answer

    def close(self) -> None:
        self._open.clear()
        self.is_reached.clear()

    def open(self) -> None:
        self._open.set()

    def _answer(self, method: str, path: str) -> None:
        if "/get_missing_events/" in path:
            self.is_reached.set()
            self._open.wait(50)  # a Synapse waits for 60 s


@attr.s(auto_attribs=True)
class Member:
    """A peer in the room, with one user."""

    peer: Peer
    user: str
    room: PeerRoom

    def make(self, *prev_events: str) -> tuple[str, Any]:
        """A sticky event on top of these, or of the member's last one."""
        event_id, pdu = self.peer.sticky(self.room, self.user, prev_events=prev_events or None)
        return event_id, pdu

    def send(self, server: Homeserver, events: Sequence[tuple[str, Any]]) -> None:
        """All are acknowledged."""
        for first in range(0, len(events), _IN_TRANSACTION):
            some = events[first : first + _IN_TRANSACTION]
            name = some[0][0][1:]
            answer = self.peer.to(server).send(name, [pdu for _, pdu in some])
            assert answer.json()["pdus"] == {event_id: {} for event_id, _ in some}

    def chain(self, count: int, *prev_events: str) -> list[tuple[str, Any]]:
        """Each on top of the last."""
        events = []
        for _ in range(count):
            events.append(self.make(*prev_events))
            self.peer.advance(self.room, events[-1][0])
            prev_events = ()
        return events


@attr.s(auto_attribs=True)
class Stage:
    """``flooders`` and ``bob`` are in alice's room; the first flooder holds the room up."""

    server: Homeserver
    room_id: str
    flooders: list[Member]
    bob: Member
    base: list[str]
    """What all that is sent comes on top of, by default."""
    gate: Gate

    def hold_up(self, member: Member, *prev_events: str) -> tuple[str, str]:
        """Sends an event that nobody can be asked about before the gate is open. Gives the IDs of
        the event that it lacks, and its own."""
        withheld_id, _ = member.make(*(prev_events or self.base))
        event = member.make(withheld_id)
        member.send(self.server, [event])
        assert self.gate.is_reached.wait(60), "the event before it to be asked for"
        return withheld_id, event[0]

    def order(self) -> list[str]:
        """The IDs of what was persisted in the room, in order."""
        sql = (
            "SELECT event_id FROM events WHERE room_id = ? AND type = 'org.example.call'"
            " AND stream_ordering > 0 ORDER BY stream_ordering"
        )
        return [event_id for (event_id,) in self.server.query(sql, self.room_id)]

    def origins(self, event_ids: Sequence[str]) -> list[int]:
        """The numbers of the flooders that these are of."""
        return [
            number
            for event_id in event_ids
            for number, flooder in enumerate(self.flooders)
            if flooder.peer.events.get(event_id, {}).get("sender") == flooder.user
        ]

    def in_front(self, event_id: str, of: Sequence[str]) -> int:
        """How many of these were persisted before the event."""
        order = self.order()
        return len(set(of) & set(order[: order.index(event_id)]))

    def wait_until_all_are_there(self, *event_ids: str) -> None:
        """And all of them are sticky."""
        wait_until(
            lambda: set(event_ids) <= sticky_at(self.server, self.room_id),
            f"{len(event_ids)} events to be sticky",
            timeout_s=240,
        )

    def asked(self, what: str) -> int:
        """How many of these questions the peers were asked."""
        members = [*self.flooders, self.bob]
        return sum(f"/{what}/" in path for member in members for path in member.peer.requests)


Begin = Callable[[int], Stage]


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[Homeserver]:
    """One for all of these tests, with the module's and Synapse's own limits."""
    (started,) = lab.servers({})
    yield started
    lab.close_servers([started])


@pytest.fixture
def begin(server: Homeserver, lab: Lab) -> Iterator[Begin]:
    with stages(server, lab) as begin:
        yield begin


@contextmanager
def stages(server: Homeserver, lab: Lab) -> Iterator[Begin]:
    """Makes a stage with so many flooders."""
    peers: list[Peer] = []
    gates: list[Gate] = []

    def make(flooders: int) -> Stage:
        peers.extend(lab.peer() for _ in range(flooders + 1))
        scene = enter(server, peers[0])
        members = [Member(peers[0], scene.eve, scene.room)]
        for number, peer in enumerate(peers[1:]):
            members.append(_joined(scene, peer, f"user{number}"))
        last = members[-1].room
        for member in members:
            member.room.extremities, member.room.depth = list(last.extremities), last.depth
            for other in members:
                member.peer.events.update(other.peer.events)
        gates.append(Gate(peers[0]))
        base = list(last.extremities)
        return Stage(server, scene.room_id, members[:-1], members[-1], base, gates[0])

    try:
        yield make
    finally:
        for gate in gates:
            gate.open()
        for peer in peers:
            peer.close()


def _joined(scene: Scene[Homeserver], peer: Peer, name: str) -> Member:
    user = peer.user(name)
    room = peer.join(scene.server, scene.room_id, user)
    wait_until(lambda: user in scene.alice.members(scene.room_id), f"{user} to be joined")
    return Member(peer, user, room)


def ids(events: Sequence[tuple[str, Any]]) -> list[str]:
    return [event_id for event_id, _ in events]


@pytest.mark.requirement("D7", "L3")
@pytest.mark.parametrize("chained", [True, False])
def test_what_is_before_it_is_there(begin: Begin, chained: bool) -> None:
    """It comes after two and one of each flooder at most."""
    stage = begin(1)
    (eve,) = stage.flooders
    held = stage.hold_up(eve)
    flood = eve.chain(40, *stage.base) if chained else [eve.make(*stage.base) for _ in range(40)]
    # What is not chained has no order but that of its receipt, in milliseconds.
    for sent in [flood] if chained else [[one] for one in flood]:
        eve.send(stage.server, sent)
    own = stage.bob.make(*stage.base)
    stage.bob.send(stage.server, [own])
    stage.gate.open()
    stage.wait_until_all_are_there(*held, *ids(flood), own[0])
    assert stage.in_front(own[0], [held[1], *ids(flood)]) <= 3
    # An origin's own PDUs have their order, and each had what is before it.
    assert [e for e in stage.order() if e in ids(flood)] == ids(flood)
    assert stage.asked("get_missing_events") == 1
    assert stage.asked("state_ids") == 0


@pytest.mark.requirement("D7", "L3")
def test_what_is_before_it_is_a_chain_that_is_staged(begin: Begin) -> None:
    """Plain Synapse prunes the chain, and asks the server for ten events and the state before."""
    stage = begin(1)
    (eve,) = stage.flooders
    held = stage.hold_up(eve)
    flood = eve.chain(105, *stage.base)
    eve.send(stage.server, flood)
    stage.bob.peer.events.update(eve.peer.events)
    own = stage.bob.make(flood[-1][0])
    stage.bob.send(stage.server, [own])
    stage.gate.open()
    stage.wait_until_all_are_there(*held, *ids(flood), own[0])
    # The ten that come with the answer, the one that is held up, and a turn.
    assert stage.in_front(own[0], [*held, *ids(flood)]) <= 13
    assert stage.asked("state_ids") == 1
    assert stage.asked("get_missing_events") == 2


@pytest.mark.slow
@pytest.mark.requirement("D7", "L3")
def test_its_server_does_not_say_what_is_before_it(begin: Begin) -> None:
    """Then it is parked, and comes when the flood is through."""
    stage = begin(1)
    (eve,) = stage.flooders
    stage.bob.peer.override = lambda method, path: (502, {}) if "/get_missing" in path else None
    held = stage.hold_up(eve)
    flood = eve.chain(105, *stage.base)
    eve.send(stage.server, flood)
    own = stage.bob.make(flood[-1][0])
    stage.bob.send(stage.server, [own])
    stage.gate.open()
    stage.wait_until_all_are_there(*held, *ids(flood), own[0])
    assert stage.server.log_has(f"Parked the sticky PDU {own[0]}")
    assert stage.asked("state_ids") == 0


@pytest.mark.requirement("D7", "L3")
def test_what_is_before_it_is_staged_side_by_side(begin: Begin) -> None:
    """Nothing has to be fetched: plain Synapse takes all that came before."""
    stage = begin(1)
    (eve,) = stage.flooders
    held = stage.hold_up(eve)
    flood = [eve.make(*stage.base) for _ in range(60)]
    eve.send(stage.server, flood)
    stage.bob.peer.events.update(eve.peer.events)
    own = stage.bob.make(*ids(flood[-10:]))
    stage.bob.send(stage.server, [own])
    stage.gate.open()
    stage.wait_until_all_are_there(*held, *ids(flood), own[0])
    assert stage.in_front(own[0], [*held, *ids(flood)]) <= 2 * 10 + 3
    assert stage.asked("state_ids") == 0
    assert stage.asked("get_missing_events") == 1


@pytest.mark.slow
@pytest.mark.requirement("D7", "L3", "E4")
def test_three_flooders_and_a_restart(begin: Begin) -> None:
    """Who has had a turn is known to the process that goes on with the room."""
    stage = begin(3)
    held = stage.hold_up(stage.flooders[0])
    floods = [flooder.chain(30, *stage.base) for flooder in stage.flooders]
    everything = [*held, *(event_id for flood in floods for event_id in ids(flood))]
    for flooder, flood in zip(stage.flooders, floods, strict=True):
        flooder.send(stage.server, flood[:20])
    first = stage.bob.make(*stage.base)
    stage.bob.send(stage.server, [first])
    # One of the first flooder's is held up again, while two thirds of all are staged.
    lacking, _ = stage.flooders[0].make(floods[0][19][0])
    again = stage.flooders[0].make(lacking)
    stage.flooders[0].send(stage.server, [again])
    for flooder, flood in zip(stage.flooders, floods, strict=True):
        flooder.send(stage.server, flood[20:])
    stage.gate.open()
    wait_until(lambda: has_event(stage.server, first[0]), "the room to go on")
    stage.gate.close()
    assert stage.gate.is_reached.wait(120), "the second one to be held up"
    before = stage.order()
    second = stage.bob.make(*stage.base)
    stage.bob.send(stage.server, [second])
    stage.server.stop()
    stage.gate.open()
    stage.server.start()
    stage.server.wait_until_ready()
    stage.wait_until_all_are_there(*everything, lacking, again[0], first[0], second[0])
    assert stage.in_front(first[0], [*held[1:], *everything[2:]]) <= 5
    assert stage.in_front(second[0], [e for e in everything if e not in before]) <= 5
    assert len(before) >= 50, "so many were processed, in turns"
    # Before the restart and after it the flooders took turns.
    order = stage.order()
    for some in (order[2:50], order[len(before) : len(before) + 18]):
        turns = [stage.origins(some).count(number) for number in range(3)]
        assert max(turns) - min(turns) <= 2, turns
    assert stage.asked("state_ids") == 0


@pytest.mark.slow
@pytest.mark.requirement("D7", "L3")
def test_two_flooders_with_one_graph(begin: Begin) -> None:
    """Each event is on top of one of the other server's, but for the other one's own."""
    stage = begin(2)
    held = stage.hold_up(stage.flooders[0])
    flood: list[tuple[str, Any]] = []
    for number in range(60):
        flooder = stage.flooders[number % 2]
        flood.append(flooder.make(*(ids(flood[-1:]) or stage.base)))
    for number, flooder in enumerate(stage.flooders):
        flooder.send(stage.server, flood[number::2])
    own = stage.bob.make(*stage.base)
    stage.bob.send(stage.server, [own])
    stage.gate.open()
    stage.wait_until_all_are_there(*held, *ids(flood), own[0])
    assert stage.in_front(own[0], [held[1], *ids(flood)]) <= 4
    assert [e for e in stage.order() if e in ids(flood)] == ids(flood)
    assert stage.asked("get_missing_events") == 1
    assert stage.asked("state_ids") == 0


@pytest.mark.slow
@pytest.mark.requirement("D7", "L3")
@pytest.mark.parametrize("flooders", [1, 3])
def test_twelve_full_transactions(begin: Begin, flooders: int) -> None:
    """As a flood comes: some of it is processed while the rest is being sent."""
    stage = begin(flooders)
    stage.gate.open()
    floods = [flooder.chain(600 // flooders, *stage.base) for flooder in stage.flooders]
    for flooder, flood in zip(stage.flooders, floods, strict=True):
        flooder.send(stage.server, flood)
        stage.bob.peer.events.update(flooder.peer.events)
    everything = [event_id for flood in floods for event_id in ids(flood)]
    before = stage.order()
    own = stage.bob.make(*(flood[-1][0] for flood in floods))
    stage.bob.send(stage.server, [own])
    stage.wait_until_all_are_there(*everything, own[0])
    assert stage.in_front(own[0], everything) <= len(before) + 10 + 5 + flooders
    assert stage.asked("state_ids") <= flooders
