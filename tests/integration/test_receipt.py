"""Transactions past a limit are refused whole (L1, L2, L6), asked by real servers and as one."""

import threading
import time
from functools import partial
from typing import Any

import pytest

from tests.conftest import Servers
from tests.integration.rooms import (
    entered,
    has_event,
    in_thread,
    introduce,
    limits,
    pdus_of,
    room_of,
    send_old_events,
    wait_until_sticky,
)
from tests.lab import Homeserver, Peer, wait_until
from tests.lab.client import STICKY_FIELD, WITHOUT_TIMELINE
from tests.lab.scene import enter

PLAIN = {"module": False}


def refusing(**options: Any) -> dict[str, Any]:
    """A server that refuses past these limits, exactly: each receiving process has its own."""
    return {"config": limits("reject", **options), "balanced_by_source": True}


def traces(server: Homeserver, event_ids: list[str]) -> list[str]:
    """The tables that know one of the events."""
    tables = [
        *("events", "event_json", "sticky_events", "federation_inbound_events_staging"),
        *("synapse_sticky_deferred", "rejections", "event_edges", "event_forward_extremities"),
    ]
    listed = ", ".join("?" * len(event_ids))
    return [
        table
        for table in tables
        if server.query(f"SELECT 1 FROM {table} WHERE event_id IN ({listed})", *event_ids)
    ]


@pytest.mark.slow
@pytest.mark.requirement("L1", "L2", "L6")
def test_transactions_past_the_limit_leave_no_trace(servers: Servers) -> None:
    options = refusing(per_server={"per_second": 1, "burst_count": 10})
    a, c = servers(PLAIN, {**options, "forwarded": True})
    assert c.forwarder is not None
    mallory, carol = a.user(), c.user()
    room_id = room_of(mallory, carol, via=a)
    # What this server would send, this test sends in its name.
    c.forwarder.offline()
    events = [mallory.send_sticky(room_id) for _ in range(40)]
    plain = [mallory.send(room_id)]
    pdus = pdus_of(a, events)
    requester = c.as_seen_by(a)

    # Larger than the burst, and the bucket is full: it passes.
    first = requester.send("first", pdus[:20])
    assert first.status_code == 200, first.text
    assert set(first.json()["pdus"]) == set(events[:20])

    refused = requester.send("second", pdus[20:])
    assert refused.status_code == 429
    assert refused.json()["errcode"] == "M_LIMIT_EXCEEDED"
    assert 0 < refused.json()["retry_after_ms"] <= 30_000
    assert int(refused.headers["Retry-After"]) >= 1
    assert not traces(c, events[20:])
    assert not c.query("SELECT 1 FROM received_transactions WHERE transaction_id = 'second'")
    assert c.log_has(f"per_server: refused 20 sticky events of {a.name} in {room_id}; asked to")

    # The answer that was given is given again, and costs nothing.
    again = requester.send("first", pdus[:20])
    assert (again.status_code, again.json()) == (200, first.json())
    # Other PDUs under an answered transaction's ID get that answer too, and are not taken in.
    assert requester.send("first", pdus[20:]).json() == first.json()
    assert not traces(c, events[20:])
    # What is not sticky passes.
    response = requester.send("plain", pdus_of(a, plain))
    assert response.status_code == 200, response.text

    wait_until(
        lambda: requester.send("second", pdus[20:]).status_code == 200, "the bucket to be full"
    )
    wait_until(lambda: set(entered(c, room_id)) == set(events), "all to be sticky")


@pytest.mark.requirement("L2", "S1", "S2")
def test_only_valid_unexpired_sticky_pdus_count(servers: Servers) -> None:
    options = refusing(per_server={"per_second": 0.001, "burst_count": 1})
    a, c = servers(PLAIN, options)
    mallory, carol = a.user(), c.user()
    room_id = room_of(mallory, carol, via=a)
    now_ms = int(time.time() * 1000)
    pdu: dict[str, Any] = {"room_id": room_id, "sender": mallory.user_id, "type": "m.a"}
    valid = {**pdu, STICKY_FIELD: {"duration_ms": 60_000}, "origin_server_ts": now_ms}
    durations: list[Any] = [None, True, 1.5, "60000", -1, [], {}]
    fields: list[Any] = [None, True, 60_000, "60000", [], {}]
    fields += [{"duration_ms": duration_ms} for duration_ms in durations]
    free = [{**valid, STICKY_FIELD: field} for field in fields]
    free += [
        {**valid, "origin_server_ts": sent} for sent in (0, now_ms - 60_001, None, "now", True)
    ]
    requester = c.as_seen_by(a)
    requester.send("use-up", [valid])
    assert requester.send("past", [valid]).status_code == 429
    for number, invalid in enumerate(free):
        response = requester.send(f"free-{number}", [invalid])
        assert response.status_code == 200, (invalid, response.text)
    # IDs of every wrong shape are charged to their origin all the same.
    wrong_ids: list[Any] = [None, 7, [], {}, "", "!" + "x" * 10_000, "!\0"]
    for number, wrong in enumerate(wrong_ids):
        for key in ("room_id", "sender"):
            response = requester.send(f"wrong-{key}-{number}", [{**valid, key: wrong}])
            assert response.status_code == 429, (key, wrong, response.text)
    assert not c.log_has("Could not check")


@pytest.mark.requirement("L6")
def test_claimed_senders_are_not_charged(servers: Servers) -> None:
    options = refusing(per_sender={"per_second": 0.001, "burst_count": 1})
    a, b, c = servers(PLAIN, PLAIN, options)
    mallory, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(mallory, bob, carol, via=a)
    forged: dict[str, Any] = {
        "room_id": room_id,
        "sender": bob.user_id,
        STICKY_FIELD: {"duration_ms": 60_000},
        "origin_server_ts": int(time.time() * 1000),
    }
    requester = c.as_seen_by(a)
    for number in range(3):
        assert requester.send(f"forged-{number}", [forged]).status_code == 200
    own = {**forged, "sender": mallory.user_id}
    assert requester.send("own-1", [own]).status_code == 200
    assert requester.send("own-2", [own]).status_code == 429
    event_id = bob.send_sticky(room_id)
    wait_until_sticky(c, event_id)


@pytest.mark.requirement("L2")
def test_failed_transaction_is_charged_once(servers: Servers) -> None:
    options = refusing(per_server={"per_second": 0.001, "burst_count": 2})
    a, c = servers(PLAIN, options)
    mallory, carol = a.user(), c.user()
    room_id = room_of(mallory, carol, via=a)
    pdu = {
        "room_id": room_id,
        "sender": mallory.user_id,
        STICKY_FIELD: {"duration_ms": 60_000},
        "origin_server_ts": int(time.time() * 1000),
    }
    requester = c.as_seen_by(a)
    # A transaction with an EDU that cannot be handled fails whole, and is tried again.
    edu = {"edu_type": "m.direct_to_device", "content": {"sender": 7}}
    for _ in range(3):
        assert requester.send("fails", [pdu], [edu]).status_code == 500
    # Other PDUs under its ID are not free for that.
    assert requester.send("fails", [{**pdu, "type": "m.b"}], [edu]).status_code == 500
    assert requester.send("fails", [{**pdu, "type": "m.c"}], [edu]).status_code == 429


@pytest.mark.slow
@pytest.mark.requirement("L2", "L3", "L6", "H3")
def test_what_is_staged_of_a_server_in_a_room_is_bounded(servers: Servers, peer: Peer) -> None:
    """Other rooms and other servers are not concerned, and what is refused comes again."""
    config = {"federation": {"max_staged_per_server_in_room": 50}}
    (server,) = servers({"config": config})
    scene, elsewhere = enter(server, peer), enter(server, peer)
    go_on = threading.Event()

    def hold_up(method: str, path: str) -> None:
        if "/get_missing_events/" in path:
            go_on.wait(50)

    peer.override = hold_up
    withheld_id, _ = peer.sticky(scene.room, scene.eve)
    peer.advance(scene.room, withheld_id)
    taken = [withheld_id, *scene.flood(50)]
    more_id, more = peer.sticky(scene.room, scene.eve)
    answer = peer.to(server).send("past", [more])
    assert answer.status_code == 429
    assert 0 < answer.json()["retry_after_ms"] <= 60_000
    assert server.log_has(
        f"max_staged_per_server_in_room: refused 1 sticky events of {peer.name} in {scene.room_id}"
    )
    # What is not sticky passes, and so does another room.
    plain_id, plain = peer.make(scene.room, scene.eve)
    assert scene.send(plain) == {plain_id: {}}
    taken.append(elsewhere.sticky())
    go_on.set()
    wait_until(
        lambda: peer.to(server).send("past", [more]).status_code == 200, "there to be room again"
    )
    wait_until(lambda: all(has_event(server, e) for e in (*taken, more_id)), "all to be there")


@pytest.mark.slow
@pytest.mark.requirement("L1", "L2", "L3", "L6")
@pytest.mark.timeout(900)
def test_flood_with_refusals(servers: Servers) -> None:
    options = refusing(per_server={"per_second": 10, "burst_count": 100})
    a, b, c = servers(PLAIN, PLAIN, options)
    mallory, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(mallory, bob, carol, via=a)
    introduce(b, c)
    c.pause()
    try:
        flood = [mallory.send_sticky(room_id) for _ in range(300)]
    finally:
        c.resume()
    refused = f"per_server: refused 50 sticky events of {a.name}"
    wait_until(lambda: c.log_has(refused), "a refusal")
    victim = bob.send_sticky(room_id)
    wait_until_sticky(c, victim)
    # While the flood is still being refused.
    assert not set(flood) <= set(entered(c, room_id))
    seen = carol.collect_sticky(room_id, set(flood), 240, filter_=WITHOUT_TIMELINE)
    assert set(flood) <= seen.keys()


@pytest.mark.requirement("L1", "L4", "L5")
def test_what_evades_the_refusal_is_deferred(servers: Servers) -> None:
    options = refusing(per_room={"per_second": 0.001, "burst_count": 3})
    a, b, c = servers(PLAIN, PLAIN, options)
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, carol, via=a)
    finish = in_thread(partial(send_old_events, room_id, [bob], 4))
    send_old_events(room_id, [alice], 4)
    finish()
    sql = "SELECT COUNT(*) FROM synapse_sticky_deferred"
    wait_until(lambda: c.query(sql) == [(5,)], "all but three to be deferred")
    assert len(entered(c, room_id)) == 3
