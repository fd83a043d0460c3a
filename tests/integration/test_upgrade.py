"""Taking the module out, and other versions of its tables, lose nothing (E4)."""

from contextlib import closing
from functools import partial

import pytest

from tests.conftest import Servers
from tests.integration.rooms import backlogged_rooms, deferred, entered, limits
from tests.lab import Homeserver, Lab, Peer, wait_until
from tests.lab.client import WITHOUT_TIMELINE
from tests.lab.scene import Scene, enter

HOURLY = {"per_second": 0.001, "burst_count": 5}
DEFERRING = {"config": limits(per_server=HOURLY)}
LATER_LAYOUT = 99


def take_the_module_out(server: Homeserver) -> None:
    server.module = False
    server.write_config()
    server.restart()


def some_wait(server: Homeserver, peer: Peer) -> tuple[Scene[Homeserver], list[str]]:
    """A room with ten sticky events of a server whose limit lets five through."""
    scene = enter(server, peer)
    flood = scene.flood(10)
    wait_until(
        lambda: set(entered(server, scene.room_id)) | deferred(server) >= set(flood), "the flood"
    )
    assert len(deferred(server)) == 5
    return scene, flood


@pytest.mark.slow
@pytest.mark.requirement("E4", "L4")
def test_taken_out_as_documented_while_events_wait(servers: Servers, peer: Peer) -> None:
    (server,) = servers(DEFERRING)
    scene, flood = some_wait(server, peer)
    since = scene.alice.sync()["next_batch"]
    server.configure_module({"federation": {"mode": "off"}})
    server.restart()
    wait_until(lambda: not deferred(server), "all to be released")
    take_the_module_out(server)
    scene.wait_for_sections(*flood)
    late = scene.alice.collect_sticky(
        scene.room_id, set(flood[5:]), since=since, filter_=WITHOUT_TIMELINE
    )
    assert sorted(late) == sorted(flood[5:])


@pytest.mark.slow
@pytest.mark.requirement("E4", "L4")
def test_taken_out_in_a_hurry_and_put_back(servers: Servers, peer: Peer) -> None:
    """What waits is not lost: it waits on."""
    (server,) = servers(DEFERRING)
    scene, flood = some_wait(server, peer)
    take_the_module_out(server)
    scene.wait_for_sections(*flood[:5])
    server.module = True
    server.configure_module({"federation": {"mode": "off"}})
    server.restart()
    scene.wait_for_sections(*flood)


@pytest.mark.slow
@pytest.mark.requirement("E4", "P3")
def test_taken_out_while_a_newcomer_lacks_events(servers: Servers, peer: Peer) -> None:
    """Synapse has a note of it, and goes on."""
    (server,) = servers({})
    alice = server.user()
    room_id = alice.create_room()
    old = [alice.send_sticky(room_id) for _ in range(10)]
    peer.override = lambda method, path: (503, {}) if "/send/" in path else None
    peer.join(server, room_id, peer.user("eve"))
    wait_until(lambda: room_id in backlogged_rooms(server), "the newcomer to be noted")
    take_the_module_out(server)
    peer.override = lambda method, path: None
    wait_until(
        lambda: bool(alice.send(room_id)) and set(old) <= peer.events.keys(),
        "the newcomer to be sent everything",
    )


@pytest.mark.requirement("E4", "L4")
def test_one_duty_has_no_tables_yet(servers: Servers, peer: Peer) -> None:
    """Its tables are made; those of the other duties stay as they are."""
    (server,) = servers(DEFERRING)
    scene, flood = some_wait(server, peer)
    server.stop()
    server.change(
        "DROP TABLE synapse_sticky_pages",
        "DELETE FROM synapse_sticky_layouts WHERE duty = 'sliding'",
    )
    server.configure_module({"federation": {"mode": "off"}})
    server.restart()
    wait_until(lambda: server.log_has("the tables of sliding to layout 1"), "the migration")
    scene.wait_for_sections(*flood)


@pytest.mark.requirement("E4", "P3")
def test_only_one_duty_has_tables(servers: Servers, peer: Peer) -> None:
    (server,) = servers({})
    alice = server.user()
    room_id = alice.create_room()
    old = [alice.send_sticky(room_id) for _ in range(5)]
    peer.override = lambda method, path: (503, {}) if "/send/" in path else None
    peer.join(server, room_id, peer.user("eve"))
    wait_until(lambda: room_id in backlogged_rooms(server), "the newcomer to be noted")
    server.stop()
    server.change(
        "DROP TABLE synapse_sticky_pages",
        "DROP TABLE synapse_sticky_deferred",
        "DELETE FROM synapse_sticky_layouts WHERE duty != 'joins'",
    )
    server.restart()
    peer.override = lambda method, path: None
    for duty in ("sliding", "deferral", "parking"):
        wait_until(partial(server.log_has, f"the tables of {duty} to layout 1"), "the migrations")
    wait_until(lambda: set(old) <= peer.events.keys(), "the newcomer to be sent everything")


@pytest.mark.slow
@pytest.mark.requirement("E4")
def test_layout_of_a_later_version(lab: Lab, servers: Servers, peer: Peer) -> None:
    """It is left alone, the operator is told, and Synapse and the other duties go on."""
    (server,) = servers(DEFERRING)
    scene, flood = some_wait(server, peer)
    waiting = deferred(server)
    server.stop()
    server.change(
        f"UPDATE synapse_sticky_layouts SET version = {LATER_LAYOUT} WHERE duty = 'deferral'"
    )
    server.restart()
    explanation = f"The tables of deferral have layout {LATER_LAYOUT}, this version of"
    wait_until(lambda: server.log_has(explanation), "the explanation")
    now = scene.alice.send_sticky(scene.room_id)
    scene.wait_for_sections(*flood[:5], now)
    assert deferred(server) == waiting
    # The duty of joins is on.
    old = scene.alice.send_sticky(scene.room_id)
    with closing(lab.peer()) as newcomer:
        newcomer.join(server, scene.room_id, newcomer.user("eve"))
        wait_until(lambda: old in newcomer.events, "the newcomer to be sent it")
