"""What cannot be done for one event or newcomer is done for all others, and later for it (H1).

The database itself refuses what a trigger names, as it would a row that it cannot take.
"""

from collections.abc import Callable, Iterator

import pytest

from tests.conftest import Servers
from tests.integration.rooms import deferred, entered, limits, wait_until_taken_in
from tests.lab import Homeserver, Lab, Peer, wait_until
from tests.lab.scene import enter

pytestmark = [pytest.mark.one_process, pytest.mark.slow, pytest.mark.requirement("H1")]


@pytest.fixture
def more_peers(lab: Lab) -> Iterator[Callable[[], Peer]]:
    started = []

    def start() -> Peer:
        started.append(lab.peer())
        return started[-1]

    yield start
    for one in started:
        one.close()


def refuse(server: Homeserver, table: str, condition: str) -> None:
    """From now on no such row can be inserted."""
    server.change(
        f"CREATE TRIGGER refused BEFORE INSERT ON {table} WHEN {condition} "
        "BEGIN SELECT RAISE(ABORT, 'for the test'); END"
    )


def accept(server: Homeserver) -> None:
    server.change("DROP TRIGGER refused")


@pytest.mark.requirement("L3", "L4")
def test_one_release(servers: Servers, peer: Peer) -> None:
    config = limits(per_server={"per_second": 2, "burst_count": 3})
    (server,) = servers({"config": config})
    scene = enter(server, peer)
    others = scene.flood(16)
    # It comes in while others wait, and so has to wait, too.
    bad, pdu = peer.sticky(scene.room, scene.eve)
    refuse(server, "sticky_events", f"NEW.event_id = '{bad}'")
    assert scene.send(pdu) == {bad: {}}
    wait_until_taken_in(server, scene.room_id, {bad})
    wait_until(lambda: server.log_has(f"Could not release the sticky event {bad}"), "the failure")
    wait_until(lambda: set(entered(server, scene.room_id)) == set(others), "the others")
    assert deferred(server) == {bad}
    sent = [*others, bad]
    accept(server)
    wait_until(lambda: set(entered(server, scene.room_id)) == set(sent), "all to be released")
    assert len(entered(server, scene.room_id)) == len(sent)
    assert not deferred(server)


@pytest.mark.requirement("P3")
def test_one_newcomer(servers: Servers, peer: Peer, more_peers: Callable[[], Peer]) -> None:
    (server,) = servers(1)
    scene = enter(server, peer)
    sticky = scene.alice.send_sticky(scene.room_id)
    bad, good = more_peers(), more_peers()
    refuse(server, "synapse_sticky_newcomers", f"NEW.destination = '{bad.name}'")
    bad.join(server, scene.room_id, bad.user("carol"))
    wait_until(lambda: server.log_has(f"joined: {bad.name} in {scene.room_id}"), "the failure")
    good.join(server, scene.room_id, good.user("dave"))
    wait_until(lambda: sticky in good.events, "the other newcomer to be pushed to")
    assert sticky not in bad.events
    accept(server)
    wait_until(lambda: sticky in bad.events, "the first one to be pushed to")
