"""What breaks at the worst moment loses nothing, and repeats nothing (E4, L3).

The same story is told with a fault somewhere in it: a flood past a limit, a newcomer, a user who
joins and pages through what is sticky.
"""

import resource
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import pytest
import requests

from tests.conftest import Servers
from tests.integration.rooms import NO_LIMITS, deferred, entered
from tests.lab import Client, Homeserver, Lab, Peer, wait_until
from tests.lab.client import WITHOUT_TIMELINE, sliding_sticky_events, sticky_events
from tests.lab.faults import FAULTY_MODULE, Fault, has_struck, set_clock
from tests.lab.homeserver import StartError
from tests.lab.scene import Scene, enter

T = TypeVar("T")

CONFIG = {
    "federation": {
        "mode": "defer",
        "per_server": {"per_second": 3, "burst_count": 3},
        "per_server_in_room": None,
        "per_sender": {"per_second": 0.001, "burst_count": 12},
        "per_room": None,
    },
    "local": {"per_user": None},
}
"""Of one server all comes through within seconds, of one user no more than 12."""

MOMENTS = ["before", "inside", "after"]
WHILE_IT_RUNS = ["persist", "release", "record_joins", "backlog", "settle"]
WHILE_IT_RUNS += ["note_page", "page", "drop_deferred"]
AT_THE_START = ["migrate", "deferred", "newcomers", "state_position"]
KILLED = [
    *(("persist", moment) for moment in MOMENTS),
    *(("release", moment) for moment in MOMENTS),
    *(("record_joins", moment) for moment in ("inside", "after")),
    *(("settle", moment) for moment in ("inside", "after")),
    *(("note_page", moment) for moment in ("inside", "after")),
]
SHORT_MS = 20_000


@pytest.fixture(scope="module")
def faulty(lab: Lab) -> Iterator[Homeserver]:
    (server,) = lab.servers({"module_name": FAULTY_MODULE, "config": CONFIG})
    yield server
    lab.close_servers([server])


def patiently(server: Homeserver, do: Callable[[], T]) -> T:
    """As a client does: tries again if the server failed, once it is up again."""
    failures: list[Exception] = []
    for _ in range(5):
        try:
            return do()
        except (requests.RequestException, AssertionError) as e:
            failures.append(e)
        revive(server)
    raise failures[0]


def revive(server: Homeserver) -> None:
    """Starts the server again if it is gone."""
    for _ in range(5):
        try:
            server.wait_until_ready()
        except StartError:
            server.kill()
            server.start()
        else:
            return
    raise AssertionError(f"{server.name} ends again and again")


def tell(server: Homeserver, peer: Peer, newcomer: Peer, fault: Fault | None) -> None:
    """The story, and what must be true in the end."""
    do = partial(patiently, server)
    scene = do(lambda: enter(server, peer))
    bob = do(server.user)
    mallory = do(lambda: scene.bring("mallory"))
    of_alice = [do(partial(send, scene.alice, scene.room_id, number)) for number in range(3)]
    # So that bob's position is beyond them.
    do(lambda: bob.send_sticky(bob.create_room()))
    before = do(bob.sliding_sync)
    if fault is not None:
        fault.arm(server.folder)
    flood = send_as_a_server_does(scene, do, [scene.eve] * 12)
    short = []
    if fault is not None and fault.transaction == "drop_deferred":
        # More of one user than its limit lets through: the others wait until they expire.
        short = send_as_a_server_does(scene, do, [mallory] * 15, SHORT_MS)
    user = newcomer.user("carol")
    do(lambda: newcomer.join(server, scene.room_id, user))
    do(lambda: bob.join(scene.room_id))

    def all_is_there() -> bool:
        revive(server)
        return set(flood) <= set(entered(server, scene.room_id)) and set(of_alice) <= set(
            newcomer.events
        )

    wait_until(all_is_there, "everything to be delivered", 120)
    if short:
        wait_until(lambda: revived(server) and not deferred(server), "what waits to expire")

    # Each is there once, for who was there before and for who joined.
    seen = pages_of(bob, scene.room_id, before, do)
    expected = set(of_alice) | set(flood)
    assert len(seen) == len(set(seen))
    assert expected <= set(seen) <= expected | set(short)
    since, found = None, list[str]()
    while True:
        answer = do(partial(scene.alice.sync, since, filter_=WITHOUT_TIMELINE))
        since, page = answer["next_batch"], sticky_events(answer, scene.room_id)
        if not page:
            break
        found += page
    assert len(found) == len(set(found))
    assert expected <= set(found) <= expected | set(short)
    rows = entered(server, scene.room_id)
    assert len(rows) == len(set(rows)), "none twice in the stream"
    assert not set(rows) & deferred(server), "what is released does not wait"
    if fault is not None:
        wait_until(lambda: revived(server) and has_struck(server.folder), f"{fault} to strike")
        wait_until(lambda: revived(server), "the server to be there")


def revived(server: Homeserver) -> bool:
    revive(server)
    return True


def send(user: Client, room_id: str, number: int) -> str:
    """The same request each time, so that it is carried out once."""
    query = {"org.matrix.msc4354.sticky_duration_ms": 3_600_000}
    path = f"rooms/{room_id}/send/org.example.call/fault-{number}"
    event_id: str = user.request("PUT", path, {"body": "here"}, **query)["event_id"]
    return event_id


def send_as_a_server_does(
    scene: Scene[Homeserver],
    do: Callable[[Callable[[], Any]], Any],
    senders: list[str],
    duration_ms: int = 3_600_000,
) -> list[str]:
    """In one transaction, which is repeated until it is answered. Gives the events' IDs."""
    events = []
    for sender in senders:
        events.append(scene.peer.sticky(scene.room, sender, duration_ms))
        scene.peer.advance(scene.room, events[-1][0])
    pdus = [pdu for _, pdu in events]
    name = f"faults-{events[0][0][1:]}"
    said = do(lambda: scene.send(*pdus, transaction_id=name))
    assert said == {event_id: {} for event_id, _ in events}
    return [event_id for event_id, _ in events]


def pages_of(
    user: Client, room_id: str, answer: Any, do: Callable[[Callable[[], Any]], Any]
) -> list[str]:
    """All that sliding sync gives of the room, a few at a time."""
    seen: list[str] = []
    while True:
        answer = do(partial(user.sliding_sync, answer, limit=2))
        page = sliding_sticky_events(answer, room_id)
        if not page:
            return seen
        seen += page


@pytest.mark.requirement("L3", "L4", "P3", "P7", "D5")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("transaction", WHILE_IT_RUNS)
def test_the_database_fails(
    faulty: Homeserver, peer: Peer, newcomer: Peer, transaction: str, moment: str
) -> None:
    if (transaction, moment) == ("persist", "after"):
        pytest.skip("what is done after the commit is not the database's")
    tell(faulty, peer, newcomer, Fault(transaction, moment, "error"))


@pytest.mark.requirement("E4", "L3", "L4", "P3", "P7", "D5")
@pytest.mark.parametrize(("transaction", "moment"), KILLED)
def test_the_process_is_killed(
    faulty: Homeserver, peer: Peer, newcomer: Peer, transaction: str, moment: str
) -> None:
    tell(faulty, peer, newcomer, Fault(transaction, moment, "kill"))


@pytest.mark.requirement("E4")
@pytest.mark.parametrize("kind", ["kill", "error"])
@pytest.mark.parametrize("transaction", AT_THE_START)
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
    tell(server, peer, newcomer, None)


@pytest.mark.requirement("E4", "L3", "F1")
@pytest.mark.parametrize("kind", ["kill", "error"])
@pytest.mark.parametrize("moment", ["inside", "after"])
@pytest.mark.parametrize("transaction", ["set_aside", "stage_again"])
def test_while_events_before_cannot_be_fetched(
    faulty: Homeserver, peer: Peer, transaction: str, moment: str, kind: str
) -> None:
    scene = enter(faulty, peer)
    peer.override = lambda method, path: (502, {}) if "/get_missing_events/" in path else None
    withheld_id, _ = peer.sticky(scene.room, scene.eve)
    peer.advance(scene.room, withheld_id)
    fault = Fault(transaction, moment, kind)
    fault.arm(faulty.folder)
    sent = scene.flood(3)
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
