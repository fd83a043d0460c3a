"""What the users of the homeserver are given (D1 to D9)."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.conformance.target import Target
from tests.lab import Client, Peer, wait_until
from tests.lab.client import (
    HOUR_MS,
    SLIDING_EXTENSION,
    STICKY_FIELD,
    TTL,
    WITHOUT_TIMELINE,
    assert_nothing_new,
    ignore,
    sliding_sticky_events,
    sticky_events,
    token_of,
)
from tests.lab.membership import NOT_JOINED
from tests.lab.scene import Scene
from tests.lab.views import event_ids_in, send_thread, view

_FEW = {"room": {"timeline": {"limit": 2}}}
_MANY = {"room": {"timeline": {"limit": 1_000}}}
_SYNCS = 3
"""In so many syncs 250 events fit."""


def pages(user: Client, room_id: str, since: str | None, count: int) -> list[list[str]]:
    """The room's sticky events in each of so many syncs that follow."""
    found = []
    for _ in range(count):
        answer = user.sync(since, filter_=WITHOUT_TIMELINE)
        since = answer["next_batch"]
        found.append(sticky_events(answer, room_id))
    return found


def sliding_pages(user: Client, room_id: str, answer: Any, count: int) -> list[list[str]]:
    """The same of sliding sync."""
    found = []
    for _ in range(count):
        answer = user.sliding_sync(answer)
        found.append(sliding_sticky_events(answer, room_id))
    return found


@pytest.mark.requirement("D1", "D3", "D9")
def test_section_of_sync(target: Target) -> None:
    alice, bob = target.user(), target.user()
    room_id = alice.create_room()
    bob.join(room_id)
    since = bob.sync()["next_batch"]
    old = alice.send_sticky(room_id)
    for _ in range(5):
        alice.send(room_id)
    new = alice.send_sticky(room_id)
    room = bob.sync(since, filter_=_FEW)["rooms"]["join"][room_id]
    assert room["timeline"]["limited"]
    in_timeline = {event["event_id"]: event for event in room["timeline"]["events"]}
    assert [event["event_id"] for event in room[STICKY_FIELD]["events"]] == [old]
    assert in_timeline.keys() > {new}
    assert 0 < in_timeline[new]["unsigned"][TTL] <= HOUR_MS


@pytest.mark.requirement("D9")
def test_time_to_live_in_timelines(target: Target) -> None:
    alice = target.user()
    room_id = alice.create_room()
    event_id = alice.send_sticky(room_id)
    everything = {"ranges": [[0, 0]], "timeline_limit": 10, "required_state": []}
    sliding = alice.sliding_sync(lists={"all": everything})["rooms"][room_id]["timeline"]
    sync = alice.sync()["rooms"]["join"][room_id]["timeline"]["events"]
    for timeline in (sliding, sync):
        (event,) = [event for event in timeline if event["event_id"] == event_id]
        assert 0 < event["unsigned"][TTL] <= HOUR_MS


@pytest.mark.requirement("D2")
def test_section_of_sliding_sync(target: Target) -> None:
    alice, bob = target.user(), target.user()
    rooms = [alice.create_room() for _ in range(3)]
    for room_id in rooms:
        bob.join(room_id)
    first = bob.sliding_sync()
    sent = {room_id: alice.send_sticky(room_id) for room_id in rooms}
    # The list shows one room of three. Of the three events two fit.
    seen: list[str] = []
    answer = first
    for expected in (2, 1, 0):
        answer = bob.sliding_sync(answer, limit=2)
        section = answer["extensions"][SLIDING_EXTENSION]["rooms"]
        here = [event for room in section.values() for event in room["events"]]
        assert len(here) == expected
        assert all(0 < event["unsigned"][TTL] <= HOUR_MS for event in here)
        seen += [event["event_id"] for event in here]
    assert seen == list(sent.values())
    off: dict[str, Any] = {"extensions": {SLIDING_EXTENSION: {"enabled": False}}}
    assert not bob.sliding_sync(first, **off)["extensions"][SLIDING_EXTENSION]["rooms"]


_CONNECTIONS = pytest.mark.parametrize("body", [{}, {"conn_id": "new"}], ids=["same", "new"])
"""An app that is started again has either."""


@_CONNECTIONS
@pytest.mark.requirement("D2", "D4")
def test_a_new_connection_goes_on_from_since(target: Target, body: Any) -> None:
    """Also in a room that was joined within the hour."""
    alice, bob = target.user(), target.user()
    room_id = alice.create_room()
    bob.join(room_id)
    old = [alice.send_sticky(room_id) for _ in range(3)]
    answer = bob.sliding_sync()
    assert sliding_sticky_events(answer, room_id) == old
    assert_nothing_new(bob, token_of(answer), **body)
    new = alice.send_sticky(room_id)
    answer = bob.sliding_sync(since=token_of(answer), **body)
    assert sliding_sticky_events(answer, room_id) == [new]
    assert_nothing_new(bob, token_of(answer), **body)


@_CONNECTIONS
@pytest.mark.requirement("D5")
def test_a_new_connection_from_before_a_join(target: Target, body: Any) -> None:
    alice, bob = target.user(), target.user()
    room_id = alice.create_room()
    old = [alice.send_sticky(room_id) for _ in range(3)]
    bob.send_sticky(bob.create_room())
    before = bob.sliding_sync()
    bob.join(room_id)
    for _ in range(2):
        answer = bob.sliding_sync(since=token_of(before), **body)
        assert sliding_sticky_events(answer, room_id) == old
    assert_nothing_new(bob, token_of(answer), **body)


@_CONNECTIONS
@pytest.mark.requirement("D2", "D4")
@pytest.mark.parametrize("limits", [[1, 1, 1, 1], [2, 3], [0, 2, 0, 100]], ids=str)
def test_new_connections_one_page_each(target: Target, limits: list[int], body: Any) -> None:
    alice, bob = target.user(), target.user()
    room_id = alice.create_room()
    bob.join(room_id)
    sent = [alice.send_sticky(room_id) for _ in range(4)]
    seen: list[str] = []
    since = None
    for limit in limits:
        answer = bob.sliding_sync(since=since, limit=limit, **body)
        page = sliding_sticky_events(answer, room_id)
        assert len(page) == min(limit, 4 - len(seen))
        assert answer["has_section"] is bool(page)
        seen += page
        since = token_of(answer) if page else since
    assert seen == sent
    assert since is not None
    assert_nothing_new(bob, since, **body)


@pytest.mark.requirement("D4", "D5")
def test_many_events_come_once_each(scene: Scene[Target]) -> None:
    senders = [scene.bring(f"user{number}") for number in range(5)]
    early = scene.server.user()
    early.join(scene.room_id)
    since, sliding = early.sync()["next_batch"], early.sliding_sync()
    sent = scene.flood(250, *senders)
    scene.alice.collect_sticky(scene.room_id, set(sent), filter_=WITHOUT_TIMELINE)

    found = pages(early, scene.room_id, since, _SYNCS + 1)
    assert sorted(e for page in found for e in page) == sorted(sent)
    assert not found[_SYNCS]
    found = sliding_pages(early, scene.room_id, sliding, _SYNCS + 1)
    assert sorted(e for page in found for e in page) == sorted(sent)
    assert not found[_SYNCS]

    # Whoever joins later gets them as well.
    late = scene.server.user()
    elsewhere = late.create_room()
    late.send_sticky(elsewhere)
    since, sliding = late.sync()["next_batch"], late.sliding_sync()
    late.join(scene.room_id)
    found = pages(late, scene.room_id, since, _SYNCS + 1)
    assert sorted(e for page in found for e in page) == sorted(sent)
    found = sliding_pages(late, scene.room_id, sliding, _SYNCS + 1)
    assert sorted(e for page in found for e in page) == sorted(sent)


@pytest.mark.requirement("D5")
@pytest.mark.parametrize("history_visibility", ["shared", "joined"])
def test_who_joins_gets_what_is_sticky(target: Target, history_visibility: str) -> None:
    alice, bob = target.user(), target.user()
    room_id = alice.create_room(history_visibility)
    old = [alice.send_sticky(room_id) for _ in range(3)]
    bob.send_sticky(bob.create_room())  # so that bob's position is beyond them
    since = bob.sync()["next_batch"]
    bob.join(room_id)
    assert pages(bob, room_id, since, 1) == [old]


@pytest.mark.requirement("D5")
@pytest.mark.parametrize("history_visibility", ["shared", "joined"])
def test_who_joins_gets_it_by_sliding_sync(target: Target, history_visibility: str) -> None:
    alice, bob = target.user(), target.user()
    room_id = alice.create_room(history_visibility)
    old = [alice.send_sticky(room_id) for _ in range(3)]
    bob.send_sticky(bob.create_room())
    answer = bob.sliding_sync()
    bob.join(room_id)
    assert sliding_pages(bob, room_id, answer, 1) == [old]


@pytest.mark.requirement("D6")
def test_ignored_users(target: Target) -> None:
    alice, mallory, bob = target.user(), target.user(), target.user()
    room_id = alice.create_room()
    for user in (mallory, bob):
        user.join(room_id)
    ignore(bob, mallory)
    mallory.send_sticky(room_id)
    of_alice = alice.send_sticky(room_id)
    assert pages(bob, room_id, None, 1) == [[of_alice]]
    assert sliding_pages(bob, room_id, None, 1) == [[of_alice]]


@pytest.mark.requirement("D6", "D4", "H7")
@pytest.mark.parametrize("is_sliding", [False, True])
def test_who_is_not_ignored_any_more(target: Target, is_sliding: bool) -> None:
    alice, mallory, bob = target.user(), target.user(), target.user()
    room_id = alice.create_room()
    for user in (mallory, bob):
        user.join(room_id)
    answer: Any = None

    def shown() -> list[str]:
        nonlocal answer
        if is_sliding:
            answer = bob.sliding_sync(answer)
            return sliding_sticky_events(answer, room_id)
        answer = bob.sync(answer and answer["next_batch"], filter_=WITHOUT_TIMELINE)
        return sticky_events(answer, room_id)

    assert shown() == []
    ignore(bob, mallory)
    shown()
    hidden = [mallory.send_sticky(room_id) for _ in range(3)]
    of_alice = alice.send_sticky(room_id)
    assert [shown(), shown()] == [[of_alice], []]
    ignore(bob)
    later = mallory.send_sticky(room_id)
    assert [shown(), shown()] == [[*hidden, later], []]


@pytest.mark.requirement("D7")
def test_flood_does_not_delay_others(scene: Scene[Target]) -> None:
    since, sliding = scene.alice.sync()["next_batch"], scene.alice.sliding_sync()
    # Side by side, so that plain Synapse drops none of it.
    scene.wait_until_there(*scene.flood(300, chained=False))
    bob = scene.server.user()
    bob.join(scene.room_id)
    of_bob = bob.send_sticky(scene.room_id)
    # Without limits all of the flood stands in front, and it comes with the fourth sync. With
    # them, how much does is a matter of how long the flood took.
    found = pages(scene.alice, scene.room_id, since, _SYNCS)
    assert any(of_bob in page for page in found)
    found = sliding_pages(scene.alice, scene.room_id, sliding, _SYNCS)
    assert any(of_bob in page for page in found)


@pytest.mark.requirement("D7")
def test_flood_that_is_staged_does_not_delay_others(scene: Scene[Target], other_peer: Peer) -> None:
    """Another server sends an event while the server is still busy with the flood's first one."""
    dora = other_peer.user("dora")
    room = other_peer.join(scene.server, scene.room_id, dora)
    wait_until(lambda: dora in scene.alice.members(scene.room_id), "dora to be joined")
    since = scene.alice.sync()["next_batch"]
    all_are_sent = threading.Event()

    def hold_up(method: str, path: str) -> None:
        if "/get_missing_events/" in path:
            all_are_sent.wait(50)

    scene.peer.override = hold_up
    before = scene.room.extremities
    withheld_id, _ = scene.peer.sticky(scene.room, scene.eve)
    scene.room.extremities = [withheld_id]
    flood = [withheld_id, scene.sticky()]
    scene.room.extremities = before
    flood += scene.flood(100, chained=False)
    of_dora, pdu = other_peer.sticky(room, dora)
    assert other_peer.to(scene.server).send("dora", [pdu]).json()["pdus"] == {of_dora: {}}
    all_are_sent.set()
    scene.wait_until_there(of_dora)
    timeline = scene.alice.sync(since, filter_=_MANY)["rooms"]["join"][scene.room_id]["timeline"]
    order = [event["event_id"] for event in timeline["events"]]
    # The two that were first, and a turn; or two.
    assert len(set(flood) & set(order[: order.index(of_dora)])) <= 4
    scene.wait_until_there(*flood)


@pytest.mark.requirement("D8")
@pytest.mark.parametrize("become", NOT_JOINED)
@pytest.mark.parametrize("history_visibility", ["world_readable", "shared", "invited", "joined"])
def test_sections_are_for_joined_users(
    target: Target, become: Callable[[Client, Client, str], None], history_visibility: str
) -> None:
    alice, bob = target.user(), target.user()
    room_id = alice.create_room(history_visibility)
    subscription = {room_id: {"timeline_limit": 10, "required_state": []}}
    since, sliding = bob.sync()["next_batch"], bob.sliding_sync(room_subscriptions=subscription)
    earlier = send_thread(alice, room_id), send_thread(alice, room_id, HOUR_MS)
    become(alice, bob, room_id)
    later = send_thread(alice, room_id), send_thread(alice, room_id, HOUR_MS)
    sticky = {*earlier[1], *later[1]}
    everything = {"room": {"include_leave": True, "timeline": {"limit": 100}}}
    for sync in (bob.sync(since, filter_=everything), bob.sync(filter_=everything)):
        for room in sync.get("rooms", {}).get("join", {}).values():
            assert STICKY_FIELD not in room
        for plain_thread, sticky_thread in (earlier, later):
            shown = event_ids_in(sync)
            assert [e in shown for e in sticky_thread] == [e in shown for e in plain_thread]
    for answer in (
        bob.sliding_sync(sliding, room_subscriptions=subscription),
        bob.sliding_sync(room_subscriptions=subscription, conn_id="new"),
    ):
        assert not sticky & event_ids_in(answer["extensions"])
    # Everywhere else it is as if they were not sticky.
    for plain_thread, sticky_thread in (earlier, later):
        assert view(bob, room_id, sticky_thread) == view(bob, room_id, plain_thread)
