"""The Rust core of a running server panics: nothing is lost, nobody gets an error (H1)."""

from collections.abc import Iterator

import pytest

from tests.integration.rooms import deferred, entered, wait_until_taken_in
from tests.lab import Homeserver, Lab, Peer, wait_until
from tests.lab.faults import FAULTY_MODULE, arm_panics, panics_are_armed
from tests.lab.scene import enter

CONFIG = {
    "federation": {
        "per_server": {"per_second": 2, "burst_count": 5},
        "per_server_in_room": None,
        "per_sender": None,
        "per_room": None,
    },
    "local": {"per_user": {"per_second": 0.001, "burst_count": 3}},
}

_SLOW = pytest.param("field", marks=pytest.mark.slow)

pytestmark = [pytest.mark.one_process, pytest.mark.requirement("H1")]


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[Homeserver]:
    (started,) = lab.servers({"module_name": FAULTY_MODULE, "config": CONFIG, "metrics": True})
    yield started
    lab.close_servers([started])


@pytest.fixture
def newcomer(lab: Lab) -> Iterator[Peer]:
    started = lab.peer()
    yield started
    started.close()


def panic(server: Homeserver, name: str, calls: int) -> None:
    arm_panics(server, name, calls)
    wait_until(lambda: panics_are_armed(server), "the panic to be armed")


def state(server: Homeserver, duty: str) -> str:
    counters = server.counters()
    (found,) = [
        one
        for one in ("on", "off", "unfit", "native")
        if counters[f'synapse_sticky_duty{{duty="{duty}",state="{one}"}}']
    ]
    return found


def panics(server: Homeserver, duty: str) -> float:
    return server.counters().get(f'synapse_sticky_panics_total{{duty="{duty}"}}', 0)


@pytest.mark.requirement("D1", "D2", "P3")
def test_the_index_panics(server: Homeserver, peer: Peer, newcomer: Peer) -> None:
    scene = enter(server, peer)
    first = scene.alice.send_sticky(scene.room_id)
    scene.wait_for_sections(first)
    # Made anew, it panics again, and again.
    panic(server, "StickyIndex", 4)
    second = scene.alice.send_sticky(scene.room_id)
    wait_until(lambda: state(server, "index") == "unfit", "the index to be unfit")
    scene.wait_for_sections(first, second)
    third = scene.sticky()
    scene.wait_for_sections(first, second, third)
    newcomer.join(server, scene.room_id, newcomer.user("carol"))
    wait_until(lambda: state(server, "index") == "on", "the index to be on")
    wait_until(lambda: {first, second} <= set(newcomer.events), "the newcomer to have all")
    scene.wait_for_sections(first, second, third)


@pytest.mark.requirement("L3", "L4")
def test_the_release_queue_panics(server: Homeserver, peer: Peer) -> None:
    scene = enter(server, peer)
    before = panics(server, "deferral")
    sent = scene.flood(20)
    wait_until_taken_in(server, scene.room_id, set(sent))
    assert deferred(server)
    panic(server, "ReleaseQueue", 2)
    sent += scene.flood(5)
    wait_until(lambda: panics(server, "deferral") == before + 2, "two panics")
    wait_until(lambda: state(server, "deferral") == "on", "deferral to be on")
    wait_until(lambda: len(entered(server, scene.room_id)) == len(sent), "all to be released")
    assert set(entered(server, scene.room_id)) == set(sent)
    assert not deferred(server)
    scene.alice.collect_sticky(scene.room_id, set(sent))


@pytest.mark.requirement("E1")
def test_the_limiter_of_local_users_panics(server: Homeserver, peer: Peer) -> None:
    scene = enter(server, peer)
    panic(server, "Limiter", 1)
    sent = [scene.alice.send_sticky(scene.room_id) for _ in range(3)]
    scene.wait_for_sections(*sent)
    assert panics(server, "sending") >= 1
    wait_until(lambda: state(server, "sending") == "on", "sending to be on")


@pytest.mark.requirement("S1", "L3")
@pytest.mark.parametrize("what", ["sticky_until_ms", _SLOW])
def test_what_is_sticky_cannot_be_told(server: Homeserver, peer: Peer, what: str) -> None:
    scene = enter(server, peer)
    panic(server, what, 3)
    sent = [scene.sticky() for _ in range(3)]
    scene.wait_for_sections(*sent)
