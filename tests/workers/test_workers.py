"""Every duty in the process where it belongs, and what a client and a server see of it (E2, E4)."""

import json
import time
from typing import Any

import pytest

from tests.integration.rooms import (
    entered,
    room_of,
    send_old_events,
    wait_until_all_pushed,
    wait_until_expired,
)
from tests.integration.test_parking import AHEAD_MS, HOUR_MS
from tests.integration.test_staging import parked, withhold
from tests.lab import Lab, Peer, WorkerHomeserver, wait_until
from tests.lab.client import (
    TTL,
    WITHOUT_TIMELINE,
    sliding_sticky_events,
    sticky_events,
    token_of,
)
from tests.lab.scene import Scene, enter
from tests.lab.workers import MAIN, PERSISTERS, RECEIVERS, SENDERS, WORKERS
from tests.workers.conftest import enter_where

EVERYWHERE = {"index", "delivery", "visibility", "pruning", "parking"}
DUTIES = {
    MAIN: {"sending", "sliding"},
    **{key: {"deferral"} for key in PERSISTERS},
    **{key: {"joins"} for key in SENDERS},
    **{key: {"receipt"} for key in RECEIVERS},
    "sync1": {"sending", "sliding"},
    "sync2": {"sending", "sliding"},
    "background1": {"extremities"},
}


@pytest.fixture
def scene(deployment: WorkerHomeserver, peer: Peer) -> Scene[WorkerHomeserver]:
    return enter(deployment, peer)


@pytest.mark.requirement("E2")
def test_duties(deployment: WorkerHomeserver) -> None:
    for name in (MAIN, *WORKERS):
        (line,) = [
            line
            for line in deployment.output_of(name).splitlines()
            if "synapse-sticky runs in" in line
        ]
        # Nothing is off, and what has tables is still being loaded.
        told = line.partition("synapse-sticky runs in ")[2].partition(": ")[2]
        duties = set(told.replace("; loading: ", ", ").split(", "))
        assert duties == EVERYWHERE | DUTIES[name], name


@pytest.mark.workers
@pytest.mark.requirement("E2", "D1", "D2", "P1")
def test_there_and_back(scene: Scene[WorkerHomeserver]) -> None:
    """Two rooms, which may have persisters of their own."""
    other = scene.alice.create_room()
    mine = scene.alice.send_sticky(scene.room_id)
    elsewhere = scene.alice.send_sticky(other)
    theirs = scene.flood(120)
    scene.wait_until_there(*theirs)
    seen = scene.alice.collect_sticky(scene.room_id, {mine, *theirs}, filter_=WITHOUT_TIMELINE)
    assert set(seen) == {mine, *theirs}
    assert set(scene.alice.collect_sticky(other, {elsewhere})) == {elsewhere}
    wait_until(lambda: mine in scene.peer.events, "the peer to get it")


@pytest.mark.requirement("E2", "P3", "P4")
def test_newcomers(deployment: WorkerHomeserver, lab: Lab, peer: Peer) -> None:
    """One to a room of the deployment; the deployment to a room of another server."""
    (other,) = [lab.make()]
    other.first_start()
    try:
        alice, carol = deployment.user(), other.user()
        room_id = alice.create_room()
        old = send_old_events(room_id, [alice], 60)
        carol.join(room_id, deployment.name)
        assert set(carol.collect_sticky(room_id, old)) == old
        wait_until_all_pushed(deployment, room_id)
        theirs = room_of(carol, via=other)
        sent = send_old_events(theirs, [carol], 60)
        alice.join(theirs, other.name)
        assert set(alice.collect_sticky(theirs, sent)) == sent
    finally:
        lab.close_servers([other])


@pytest.mark.workers
@pytest.mark.requirement("E2", "S4", "S5", "D4")
@pytest.mark.parametrize("version", ["v3", "r0"], ids=["sync worker", "main"])
@pytest.mark.parametrize("is_initial", [True, False], ids=["initial", "incremental"])
def test_an_answer_that_is_repeated(
    deployment: WorkerHomeserver, version: str, is_initial: bool
) -> None:
    """It has nothing that was redacted or has expired; main answers by the older path."""
    alice, bob = deployment.user(), deployment.user()
    room_id = room_of(alice, bob, via=deployment)
    query = {"filter": json.dumps(WITHOUT_TIMELINE)}
    if not is_initial:
        query["since"] = bob.sync()["next_batch"]
    expiring, redacted = alice.send_sticky(room_id, 10_000), alice.send_sticky(room_id)
    kept = alice.send_sticky(room_id)

    def answer() -> Any:
        return bob.request("GET", f"/_matrix/client/{version}/sync", timeout=0, **query)

    # The first request that has them all is the one that is repeated.
    while len(sticky_events(first := answer(), room_id)) < 3:
        query["filter"] += " "
    assert sticky_events(first, room_id) == [expiring, redacted, kept]
    alice.redact(room_id, redacted)
    wait_until_expired(deployment, expiring)
    wait_until(lambda: sticky_events(answer(), room_id) == [kept], "both to be gone")
    again = answer()
    assert again["next_batch"] == first["next_batch"], "it is the same answer"
    (event,) = again["rooms"]["join"][room_id]["msc4354_sticky"]["events"]
    assert event["unsigned"][TTL] > 0


@pytest.mark.workers
@pytest.mark.requirement("E2", "D4", "D5")
def test_sliding_sync_goes_on_from_since_without_pos(deployment: WorkerHomeserver) -> None:
    """Two rooms, which may have persisters of their own."""
    alice, bob = deployment.user(), deployment.user()
    bob.send_sticky(bob.create_room())
    wait_until(lambda: bob.sliding_sync()["has_section"], "bob's own event")
    before = bob.sliding_sync()
    rooms = [alice.create_room() for _ in range(4)]
    sent = {room_id: [alice.send_sticky(room_id) for _ in range(2)] for room_id in rooms}
    for room_id in rooms:
        bob.join(room_id)

    def collect(limit: int) -> str:
        """Gets all by connections each of which goes on from where the one before was."""
        since = token_of(before)
        seen: dict[str, list[str]] = {room_id: [] for room_id in rooms}

        def go_on() -> bool:
            nonlocal since
            answer = bob.sliding_sync(since=since, limit=limit)
            since = token_of(answer)
            for room_id in rooms:
                seen[room_id] += sliding_sticky_events(answer, room_id)
            return seen == sent

        wait_until(go_on, "all of them, once each")
        return since

    for limit in (1, 3, 100):
        since = collect(limit)
        assert not bob.sliding_sync(since=since, limit=limit)["has_section"]


@pytest.mark.workers
@pytest.mark.requirement("S2", "L3", "E2")
@pytest.mark.parametrize("persister", PERSISTERS)
def test_received_is_when_the_receiving_process_had_it(
    deployment: WorkerHomeserver, peer: Peer, persister: str
) -> None:
    """It is dated three hours ahead, and was parked for most of an hour."""
    scene = enter_where(deployment, peer, persister)
    peer.override = lambda method, path: (404, {}) if "/get_missing_events/" in path else None
    withhold(scene)
    before_ms = int(time.time() * 1000)
    event_id, pdu = peer.sticky(scene.room, scene.eve, origin_server_ts=before_ms + AHEAD_MS)
    scene.send(pdu)
    wait_until(lambda: event_id in parked(deployment), "it to be parked")
    after_ms = int(time.time() * 1000)
    parked_ms = 50 * 60_000
    deployment.change(
        "UPDATE synapse_sticky_incomplete"
        f" SET received_ts_ms = received_ts_ms - {parked_ms} WHERE event_id = '{event_id}'"
    )
    peer.override = lambda method, path: None
    wait_until(lambda: event_id in entered(deployment, scene.room_id), "it to be sticky")
    sql = "SELECT expires_at FROM sticky_events WHERE event_id = ?"
    ((expires_ms,),) = deployment.query(sql, event_id)
    assert before_ms + HOUR_MS - parked_ms <= expires_ms <= after_ms + HOUR_MS - parked_ms
