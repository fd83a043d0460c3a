"""What breaks at the worst moment loses nothing, and repeats nothing (E4, L3).

The same story is told with a fault somewhere in it.
"""

import resource
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from synapse_sticky.handlers.joins.push import WATCH_AFTER_RECORD_MS
from tests.conftest import Servers
from tests.integration.rooms import NO_LIMITS, deferred, entered, wait_until_all_pushed
from tests.integration.story import patiently, revived, send_as_a_server_does, tell
from tests.lab import Homeserver, Lab, Peer, wait_until
from tests.lab.faults import FAULTY_MODULE, Fault, has_struck, set_clock
from tests.lab.scene import enter

CONFIG = {
    "federation": {
        "mode": "defer",
        "per_server": {"per_second": 1, "burst_count": 3},
        "per_server_in_room": None,
        "per_sender": {"per_second": 0.001, "burst_count": 12},
        "per_room": None,
    },
    "local": {"per_user": None},
}
"""Of one server all comes through within seconds, but slower than any machine takes it in, so that
some waits; of one user no more than 12."""

MOMENTS = ["before", "inside", "after"]
_BEFORE, _AFTER = (pytest.param(moment, marks=pytest.mark.slow) for moment in ("before", "after"))
WHILE_IT_RUNS = ["persist", "release"]
WHILE_IT_RUNS_SLOW = [
    "backlog",
    "record_joins",
    "settle",
    "store_page",
    "read_page",
    "drop_deferred",
]
AT_THE_START = ["migrate_deferral"]
AT_THE_START_SLOW = ["newcomers", "migrate_joins", "deferred", "state_position"]
KILLED = [("persist", "inside")]
KILLED_SLOW = [
    *(("persist", moment) for moment in ("before", "after")),
    *(("release", moment) for moment in MOMENTS),
    *(
        (name, moment)
        for name in ("record_joins", "settle", "store_page")
        for moment in MOMENTS[1:]
    ),
]


def with_slow(quick: list[Any], slow: list[Any]) -> list[Any]:
    """All of them, of which some are for make test-slow."""
    return [*quick, *(pytest.param(each, marks=pytest.mark.slow) for each in slow)]


@pytest.fixture(scope="module")
def faulty(lab: Lab) -> Iterator[Homeserver]:
    (server,) = lab.servers({"module_name": FAULTY_MODULE, "config": CONFIG})
    yield server
    lab.close_servers([server])


def tell_with(fault: Fault, server: Homeserver, peer: Peer, newcomer: Peer) -> None:
    # More of one user than its limit lets through: the others wait until they expire.
    of_one_user = 15 if fault.transaction == "drop_deferred" else 0
    arm = partial(fault.arm, server.folder)
    tell(server, peer, newcomer, first=arm, of_one_user=of_one_user)
    wait_until(lambda: revived(server) and has_struck(server.folder), f"{fault} to strike")
    wait_until(lambda: revived(server), "the server to be there")


@pytest.mark.requirement("L3", "L4", "P3", "P7", "D5")
@pytest.mark.parametrize("moment", [_AFTER, "inside", _BEFORE])
@pytest.mark.parametrize("transaction", with_slow(WHILE_IT_RUNS, WHILE_IT_RUNS_SLOW))
def test_the_database_fails(
    faulty: Homeserver, peer: Peer, newcomer: Peer, transaction: str, moment: str
) -> None:
    if (transaction, moment) == ("persist", "after"):
        pytest.skip("what is done after the commit is not the database's")
    tell_with(Fault(transaction, moment, "error"), faulty, peer, newcomer)


@pytest.mark.requirement("E4", "L3", "L4", "P3", "P7", "D5")
@pytest.mark.parametrize(
    ("transaction", "moment"),
    [*KILLED, *(pytest.param(*fault, marks=pytest.mark.slow) for fault in KILLED_SLOW)],
)
def test_the_process_is_killed(
    faulty: Homeserver, peer: Peer, newcomer: Peer, transaction: str, moment: str
) -> None:
    tell_with(Fault(transaction, moment, "kill"), faulty, peer, newcomer)


@pytest.mark.one_process
@pytest.mark.requirement("E4")
@pytest.mark.parametrize("kind", [pytest.param("kill", marks=pytest.mark.slow), "error"])
@pytest.mark.parametrize("transaction", with_slow(AT_THE_START, AT_THE_START_SLOW))
def test_the_start_fails(
    lab: Lab, servers: Servers, peer: Peer, newcomer: Peer, transaction: str, kind: str
) -> None:
    lab.prepare()
    server = lab.make(module_name=FAULTY_MODULE, config=CONFIG)
    Fault(transaction, "inside", kind).arm(server.folder)
    server.start()
    if kind == "kill":
        assert server.process is not None
        server.process.wait(120)
        server.kill()
        server.start()
    server.wait_until_ready()
    wait_until(lambda: has_struck(server.folder), "the fault to strike")
    tell(server, peer, newcomer)


@pytest.mark.requirement("E4", "L3", "F1")
@pytest.mark.parametrize("kind", ["kill", "error"])
@pytest.mark.parametrize("moment", ["inside", "after"])
@pytest.mark.parametrize("transaction", ["park", "stage_again"])
def test_while_events_before_cannot_be_fetched(
    faulty: Homeserver, peer: Peer, transaction: str, moment: str, kind: str
) -> None:
    scene = enter(faulty, peer)
    peer.override = lambda method, path: (502, {}) if "/get_missing_events/" in path else None
    withheld_id, _ = peer.sticky(scene.room, scene.eve)
    peer.advance(scene.room, withheld_id)
    fault = Fault(transaction, moment, kind)
    fault.arm(faulty.folder)
    # The process may be gone before it has answered.
    sent = send_as_a_server_does(scene, partial(patiently, faulty), [scene.eve] * 3)
    wait_until(lambda: revived(faulty) and has_struck(faulty.folder), f"{fault} to strike")
    peer.override = lambda method, path: None
    wait_until(
        lambda: revived(faulty) and {withheld_id, *sent} <= set(entered(faulty, scene.room_id)),
        "all to be taken in",
    )
    rows = entered(faulty, scene.room_id)
    assert len(rows) == len(set(rows))


@pytest.fixture
def newcomer(lab: Lab) -> Iterator[Peer]:
    started = lab.peer()
    yield started
    started.close()


@pytest.mark.slow
@pytest.mark.one_process
@pytest.mark.requirement("L3", "E4")
def test_the_disk_is_full(servers: Servers, peer: Peer) -> None:
    (server,) = servers({"config": NO_LIMITS})
    scene = enter(server, peer)
    hangs, go_on = threading.Event(), threading.Event()

    def hold_up(method: str, path: str) -> None:
        if "/get_missing_events/" in path:
            hangs.set()
            go_on.wait(60)

    # Many are acknowledged and staged, behind one that takes its time.
    peer.override = hold_up
    unknown, _ = peer.sticky(scene.room, scene.eve)
    peer.advance(scene.room, unknown)
    staged = [unknown, *scene.flood(150)]
    assert hangs.wait(60)
    # From now on no file can grow beyond what the database is, nor the database.
    assert server.process is not None
    process = server.process.pid
    unlimited = resource.prlimit(process, resource.RLIMIT_FSIZE)
    full = server.database_path.stat().st_size
    assert server.log_path.stat().st_size < full / 2
    resource.prlimit(process, resource.RLIMIT_FSIZE, (full, unlimited[1]))
    go_on.set()
    wait_until(lambda: server.log_has("trying again in"), "a write to fail")
    resource.prlimit(process, resource.RLIMIT_FSIZE, unlimited)
    scene.wait_until_there(*staged)
    scene.alice.collect_sticky(scene.room_id, set(staged))
    assert sorted(entered(server, scene.room_id)) == sorted(staged)


@pytest.mark.slow
@pytest.mark.requirement("P3", "P7", "E4")
def test_killed_with_the_first_event_after_a_push(
    servers: Servers, peer: Peer, newcomer: Peer
) -> None:
    """Synapse has noted nothing yet from which it could go on with the newcomer."""
    (server,) = servers({"module_name": FAULTY_MODULE})
    scene = enter(server, peer)
    old = scene.alice.send_sticky(scene.room_id)
    newcomer.join(server, scene.room_id, newcomer.user("carol"))
    wait_until(lambda: old in newcomer.events, "the newcomer to be sent what is sticky")
    wait_until_all_pushed(server, scene.room_id)
    set_clock(server, 1.5 * WATCH_AFTER_RECORD_MS / 1000)
    scene.wait_until_there(scene.sticky())
    sent, killed = threading.Event(), threading.Event()

    def hold_up(method: str, path: str) -> Any:
        if "/send/" not in path or killed.is_set():
            return None
        sent.set()
        killed.wait(60)
        return 503, {}

    newcomer.override = hold_up
    new = scene.alice.send_sticky(scene.room_id)
    assert sent.wait(60)
    server.kill()
    killed.set()
    server.restart()
    wait_until(lambda: new in newcomer.events, "the newcomer to be sent the new one")


HOUR_S = 3_600
SLOW = {"federation": {"per_server": {"per_second": 0.5, "burst_count": 5}}}


@pytest.mark.requirement("S2", "L4", "E4")
def test_the_clock_jumps_ahead_and_back(servers: Servers, peer: Peer) -> None:
    (server,) = servers({"module_name": FAULTY_MODULE, "config": SLOW})
    scene = enter(server, peer)
    old = scene.alice.send_sticky(scene.room_id)
    flood = scene.flood(60)
    wait_until(
        lambda: set(flood) <= deferred(server) | set(entered(server, scene.room_id)), "the flood"
    )
    assert deferred(server)
    set_clock(server, HOUR_S + 1)
    # All of it is over, what waits too.
    new = scene.alice.send_sticky(scene.room_id)
    scene.wait_for_sections(new)
    wait_until(lambda: not deferred(server), "what waits to expire")
    set_clock(server, 0)
    newest = scene.sticky()
    wait_until(lambda: all({new, newest} <= set(section) for section in scene.sections()), "both")
    assert old not in scene.sections()[0]


@pytest.mark.slow
@pytest.mark.requirement("S2", "L4", "E4")
def test_the_clock_is_set_back(servers: Servers, peer: Peer, newcomer: Peer) -> None:
    (server,) = servers({"module_name": FAULTY_MODULE, "config": SLOW})
    scene = enter(server, peer)
    old = scene.alice.send_sticky(scene.room_id)
    flood = scene.flood(20)
    wait_until(
        lambda: set(flood) <= deferred(server) | set(entered(server, scene.room_id)), "the flood"
    )
    assert deferred(server)
    set_clock(server, -HOUR_S)
    # Whatever happens next has what waits released at its rate again.
    new = scene.sticky()
    newcomer.join(server, scene.room_id, newcomer.user("carol"))
    wait_until(lambda: old in newcomer.events, "the newcomer to be sent what is sticky")
    seen = scene.alice.collect_sticky(scene.room_id, {old, new, *flood})
    assert set(seen) == {old, new, *flood}
    rows = entered(server, scene.room_id)
    assert len(rows) == len(set(rows))
