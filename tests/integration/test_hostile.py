"""A peer that says and does what no real server would: nothing is lost, nothing fails."""

import json
import re
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.conftest import Servers
from tests.integration.rooms import (
    has_event,
    is_sticky_at,
    wait_until_persisted,
)
from tests.lab import Homeserver, Lab, Peer, wait_until
from tests.lab.client import (
    HOUR_MS,
    STICKY_FIELD,
    TTL,
    WITHOUT_TIMELINE,
)
from tests.lab.peer import now_ms
from tests.lab.scene import Scene, enter

LARGEST = 2**53 - 1


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[Homeserver]:
    """With the module; what it logs in all of these tests is looked at in the end."""
    (started,) = lab.servers({"probed": True})
    yield started
    assert not (found := exceptions_in(started)), "\n".join(found)
    lab.close_servers([started])


def exceptions_in(server: Homeserver) -> list[str]:
    """What a server's operator would be alarmed by."""
    alarm = re.compile(r"Traceback|\S+ \S+ (ERROR|CRITICAL) ")
    return [line for line in server.output().splitlines() if alarm.match(line)]


def all_is_well(scene: Scene[Homeserver], *expected: str) -> None:
    """The sections have these events, in whatever order, and one that is sent now."""
    event_id = scene.sticky()
    scene.wait_for_sections(*expected, event_id)
    assert scene.server.index_knows(event_id)


@pytest.fixture
def scene(server: Homeserver, peer: Peer) -> Scene[Homeserver]:
    return enter(server, peer)


WRONG: dict[str, Any] = {
    "no object": 60_000,
    "null": None,
    "a list": [{"duration_ms": 60_000}],
    "empty": {},
    "a string": {"duration_ms": "60000"},
    "true": {"duration_ms": True},
    "negative": {"duration_ms": -1},
    "nothing": {"duration_ms": None},
    "nested": {"duration_ms": {"duration_ms": 60_000}},
    "under another name": {"duration": 60_000},
    "deep": json.loads("[" * 50 + "]" * 50),
    "zero": {"duration_ms": 0},
}


@pytest.mark.requirement("S1", "C3")
@pytest.mark.parametrize("field", WRONG.values(), ids=WRONG.keys())
def test_wrong_fields_are_not_sticky(scene: Scene[Homeserver], field: Any) -> None:
    # ``None`` as a value would leave the field out.
    event_id, pdu = scene.peer.make(scene.room, scene.eve, **{STICKY_FIELD: field})
    if field is None:
        pdu = {**pdu, STICKY_FIELD: None}
    said = scene.send(pdu)
    if field is not None:
        assert said == {event_id: {}}
        wait_until_persisted(scene.server, event_id)
    assert not is_sticky_at(scene.server, event_id)
    all_is_well(scene)


@pytest.mark.requirement("S1")
@pytest.mark.parametrize("duration_ms", [1.5, 60_000.0, LARGEST + 1, 10**30, -(10**30)])
def test_numbers_that_events_cannot_have(scene: Scene[Homeserver], duration_ms: Any) -> None:
    # Its hash is that of a good event: such a number has none.
    event_id, pdu = scene.peer.sticky(scene.room, scene.eve)
    scene.send({**pdu, STICKY_FIELD: {"duration_ms": duration_ms}})
    assert not is_sticky_at(scene.server, event_id)
    all_is_well(scene)


@pytest.mark.requirement("S1", "S2", "S4")
def test_durations_and_times_are_bounded(scene: Scene[Homeserver]) -> None:
    peer, room, eve = scene.peer, scene.room, scene.eve
    longest = peer.sticky(room, eve, LARGEST)
    of_the_future = peer.sticky(room, eve, LARGEST, origin_server_ts=now_ms() + 12 * HOUR_MS)
    of_the_past = [
        peer.sticky(room, eve, origin_server_ts=ts) for ts in (0, 1, now_ms() - HOUR_MS - 1)
    ]
    said = scene.send(*(pdu for _, pdu in [longest, of_the_future, *of_the_past]))
    assert all(answer == {} for answer in said.values())
    for event_id, _ in [longest, of_the_future, *of_the_past]:
        wait_until_persisted(scene.server, event_id)
    room_id = scene.room.room_id
    events = scene.alice.sync(filter_=WITHOUT_TIMELINE)["rooms"]["join"][room_id][STICKY_FIELD]
    ttl_ms = {e["event_id"]: e["unsigned"][TTL] for e in events["events"]}
    assert ttl_ms.keys() == {longest[0], of_the_future[0]}
    assert all(0 < left <= HOUR_MS for left in ttl_ms.values())
    all_is_well(scene, longest[0], of_the_future[0])


@pytest.mark.requirement("C3", "L6")
def test_forged_and_unauthorised_senders(scene: Scene[Homeserver]) -> None:
    peer, room = scene.peer, scene.room
    forged = [
        peer.sticky(room, "@alice:elsewhere.example"),
        peer.sticky(room, scene.alice.user_id),
        peer.sticky(room, peer.user("never-joined")),
    ]
    for event_id, pdu in forged:
        scene.send(pdu)
        assert not is_sticky_at(scene.server, event_id)
    all_is_well(scene)


@pytest.mark.requirement("C3", "L6")
def test_senders_that_are_none(servers: Servers, peer: Peer) -> None:
    (server,) = servers({"probed": True})
    scene = enter(server, peer)
    for sender in ("no user ID", "@nocolon"):
        event_id, pdu = peer.sticky(scene.room, sender)
        # Synapse itself raises, and says so, with or without the module.
        assert "Invalid ID" in scene.send(pdu)[event_id]["error"]
        assert not is_sticky_at(server, event_id)
    all_is_well(scene)
    assert all("Failed to handle PDU" in line or "Trace" in line for line in exceptions_in(server))


@pytest.mark.requirement("D4", "C3")
def test_the_same_again_is_delivered_once(scene: Scene[Homeserver]) -> None:
    event_id, pdu = scene.peer.sticky(scene.room, scene.eve)
    for transaction_id in ("one", "one", "two"):
        assert event_id in scene.send(pdu, pdu, transaction_id=transaction_id)
    other_id, other = scene.peer.sticky(scene.room, scene.eve)
    # A transaction that was answered is answered as before, whatever is in it now.
    assert other_id not in scene.send(other, transaction_id="one")
    all_is_well(scene, event_id)


@pytest.mark.requirement("C3")
def test_two_events_in_one_place(scene: Scene[Homeserver]) -> None:
    """Both are events of their own, however alike."""
    at_once = now_ms()
    pairs = [
        scene.peer.sticky(scene.room, scene.eve, duration_ms, origin_server_ts=at_once)
        for duration_ms in (HOUR_MS, HOUR_MS - 1)
    ]
    assert scene.send(*(pdu for _, pdu in pairs)) == {event_id: {} for event_id, _ in pairs}
    all_is_well(scene, *(event_id for event_id, _ in pairs))


@pytest.mark.requirement("C3")
@pytest.mark.parametrize(
    "room_id",
    [
        *("!unknown:elsewhere.example", "no room ID", None, {}),
        # Asked for such a room, Postgres fails, and Synapse's answer is 500: see below.
        pytest.param(5, marks=pytest.mark.one_process),
    ],
)
def test_rooms_that_are_none(scene: Scene[Homeserver], room_id: Any) -> None:
    _, pdu = scene.peer.sticky(scene.room, scene.eve)
    answer = scene.peer.to(scene.server).send("rooms", [{**pdu, "room_id": room_id}])
    assert answer.status_code in {200, 400}
    all_is_well(scene)


@pytest.mark.requirement("C3", "L3")
def test_transactions_that_are_none(servers: Servers, peer: Peer) -> None:
    (server,) = servers({"probed": True})
    scene = enter(server, peer)
    event_id, pdu = peer.sticky(scene.room, scene.eve)
    beyond_parsing = {**pdu, STICKY_FIELD: json.loads("[" * 300 + "]" * 300)}
    nonsense: tuple[Any, ...] = (
        {},
        "no list",
        None,
        [5],
        [None],
        ["text"],
        [[]],
        [{}],
        [beyond_parsing],
        [{**pdu, "room_id": 5}],
    )
    for number, pdus in enumerate(nonsense):
        answer = peer.to(server).send(f"nonsense-{number}", pdus)
        assert answer.status_code in {200, 400, 500}
    # One bad PDU, beside a good one of which nothing was said, is sent again by a real server.
    scene.send(pdu)
    all_is_well(scene, event_id)


@pytest.mark.requirement("L2", "L3")
def test_transactions_that_are_too_large(scene: Scene[Homeserver]) -> None:
    events = [scene.peer.sticky(scene.room, scene.eve) for _ in range(51)]
    answer = scene.peer.to(scene.server).send("large", [pdu for _, pdu in events])
    assert answer.status_code == 400
    assert not any(has_event(scene.server, event_id) for event_id, _ in events)
    assert len(scene.send(*(pdu for _, pdu in events[:50]))) == 50
    all_is_well(scene, *(event_id for event_id, _ in events[:50]))


@pytest.mark.requirement("F1")
def test_events_before_are_fetched(scene: Scene[Homeserver]) -> None:
    withheld_id, _ = scene.peer.sticky(scene.room, scene.eve)
    scene.peer.advance(scene.room, withheld_id)
    event_id, pdu = scene.peer.sticky(scene.room, scene.eve)
    assert scene.send(pdu) == {event_id: {}}
    all_is_well(scene, withheld_id, event_id)


@pytest.mark.requirement("C3", "L3")
@pytest.mark.parametrize(
    "fields",
    [
        # Postgres cannot even be asked for such an ID.
        {"prev_events": ["$nul\0"]},
        # Synapse takes no event of such a type.
        {"prev_events": ["$missing"], "kind": "x" * 256},
    ],
)
def test_pdus_that_can_never_be_persisted(servers: Servers, peer: Peer, fields: Any) -> None:
    """Such a PDU is not kept for later."""
    (server,) = servers({"probed": True})
    scene = enter(server, peer)
    peer.override = lambda method, path: (502, {}) if "/get_missing_events/" in path else None
    event_id, pdu = peer.sticky(scene.room, scene.eve, **fields)
    scene.send(pdu)
    # What comes after it, and lacks something that can be had later, is.
    withheld_id, _ = peer.sticky(scene.room, scene.eve)
    peer.advance(scene.room, withheld_id)
    sent = scene.flood(2)
    kept = "SELECT event_id FROM synapse_sticky_incomplete"
    wait_until(lambda: {e for (e,) in server.query(kept)} == set(sent), "these to be kept")
    peer.override = lambda method, path: None
    scene.wait_for_sections(withheld_id, *sent)
    assert not has_event(server, event_id)
    all_is_well(scene, withheld_id, *sent)


@pytest.mark.requirement("F1", "C3")
@pytest.mark.parametrize("answer", [(403, {}), (200, {"events": []}), (200, {"events": [5, {}]})])
def test_events_before_are_withheld(servers: Servers, peer: Peer, answer: Any) -> None:
    """Nobody can know whether such an event is allowed: it is not taken in, and holds nobody up."""
    (server,) = servers({"probed": True})
    scene = enter(server, peer)
    peer.override = lambda method, path: answer if "/get_missing_events/" in path else None
    known = scene.room.extremities
    withheld_id, _ = peer.sticky(scene.room, scene.eve)
    peer.advance(scene.room, withheld_id)
    event_id, pdu = peer.sticky(scene.room, scene.eve)
    scene.send(pdu)
    scene.room.extremities = known
    all_is_well(scene)
    assert not is_sticky_at(server, event_id)


@pytest.mark.requirement("P7")
def test_missing_acknowledgements(server: Homeserver, peer: Peer) -> None:
    """A newcomer that says 200 and names no event is sent it until it does."""
    sends: list[str] = []

    def forget(method: str, path: str) -> Any:
        if method == "PUT" and "/send/" in path:
            sends.append(path)
            if len(sends) <= 3:
                return 200, {"pdus": {}}
        return None

    peer.override = forget
    alice, eve = server.user(), peer.user("eve")
    room_id = alice.create_room()
    old = alice.send_sticky(room_id)
    peer.join(server, room_id, eve)
    wait_until(lambda: peer.received, "the event to be sent until it is taken")
    assert len(sends) >= 4
    assert peer.events[old] in peer.received
    # Once acknowledged, it is not sent again.
    new = alice.send_sticky(room_id)
    wait_until(lambda: new in peer.events, "the next event")
    assert peer.received.count(peer.events[old]) == 1


@pytest.mark.requirement("P1", "P3", "P7")
def test_answers_that_hang_hold_up_nobody_else(servers: Servers, peer: Peer) -> None:
    a, b = servers({}, {})
    alice, bob = a.user(), b.user()
    room_id = alice.create_room()
    old = alice.send_sticky(room_id)
    hangs, go_on = threading.Event(), threading.Event()

    def hang(method: str, path: str) -> Any:
        if "/send/" in path or "/event/" in path:
            hangs.set()
            go_on.wait(120)
        return None

    peer.override = hang
    peer.join(a, room_id, peer.user("eve"))
    assert hangs.wait(60), "the push to hang"
    bob.join(room_id, a.name)
    assert old in bob.collect_sticky(room_id, {old})
    new = alice.send_sticky(room_id)
    assert new in bob.collect_sticky(room_id, {new})
    go_on.set()
    wait_until(lambda: {old, new} <= peer.events.keys(), "the peer to get all of it in the end")
    assert exceptions_in(a) == []


@pytest.mark.requirement("D8", "C1")
def test_a_peer_that_is_not_joined_gets_nothing(server: Homeserver, peer: Peer) -> None:
    alice = server.user()
    room_id = alice.create_room("joined")
    event_id = alice.send_sticky(room_id)
    asked = peer.to(server)
    assert asked.event(event_id).status_code == 403
    missing = {"earliest_events": [], "latest_events": [event_id], "limit": 10, "min_depth": 0}
    path = f"get_missing_events/{quote(room_id, safe='')}"
    assert asked.request("POST", path, missing).status_code == 403
    assert not peer.received
