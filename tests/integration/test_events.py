"""What the module starts and asks for an event, counted on a real homeserver (H1)."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from tests.integration.rooms import NO_LIMITS, wait_until_all_pushed, wait_until_seen
from tests.lab import Homeserver, Lab, Peer
from tests.lab.scene import Scene, enter

_PROCESSES = re.compile(
    r'^synapse_background_process_start_count_total\{name="([^"]+)".*\} (\S+)$', re.MULTILINE
)
TRANSACTIONS = re.compile(
    r'^synapse_storage_transaction_time_count_total\{desc="([^"]+)".*\} (\S+)$', re.MULTILINE
)
_OURS = "synapse_sticky_"
_BY_THE_CLOCK = {
    *("expire", "check_destination", "try_parked_pdus", "merge_extremities"),
    *("look_at_newcomers", "ask", "wait", "read_actions"),
}
"""What a timer starts, however few events there are, and what these ask for."""

_OF_TIMERS = {
    *("referenced", "last_rows", "backlog", "settle", "due_parked", "next_parked_ms"),
    "read_actions",
}
EVENTS = 20
IN_ITS_PLACE = Counter({"synapse_sticky_next_staged": 2 * EVENTS})
"""Synapse asks at most twice for each PDU which one is next. This is done in its place."""


def started(server: Homeserver) -> tuple[Counter[str], Counter[str]]:
    """The background processes and the transactions of the module so far, by name."""
    (text,) = server.metrics()
    left_out = {_OURS + name for name in _BY_THE_CLOCK | _OF_TIMERS}
    processes, transactions = (
        Counter(
            {
                name: int(float(count))
                for name, count in what.findall(text)
                if name.startswith(_OURS) and name not in left_out
            }
        )
        for what in (_PROCESSES, TRANSACTIONS)
    )
    return processes, transactions


def during(server: Homeserver, act: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """Those that began meanwhile."""
    before = started(server)
    act()
    after = started(server)
    return after[0] - before[0], after[1] - before[1]


@pytest.fixture(scope="module")
def peer(lab: Lab) -> Iterator[Peer]:
    with closing(lab.peer()) as started:
        yield started


@pytest.fixture(scope="module")
def scene(lab: Lab, peer: Peer) -> Iterator[Scene[Homeserver]]:
    (server,) = lab.servers({"metrics": True, "probed": True, "config": NO_LIMITS})
    entered = enter(server, peer)
    # What follows a join is over once there is nothing left to do for it.
    wait_until_seen(server, peer, entered.room_id)
    wait_until_all_pushed(server, entered.room_id)
    yield entered
    lab.close_servers([server])


def send(scene: Scene[Homeserver]) -> None:
    for _ in range(EVENTS):
        scene.alice.send(scene.room_id)


def receive(scene: Scene[Homeserver]) -> None:
    for _ in range(EVENTS):
        event_id, pdu = scene.peer.make(scene.room, scene.eve)
        scene.peer.advance(scene.room, event_id)
        scene.send(pdu)
        scene.wait_until_there(event_id)


@pytest.mark.slow
@pytest.mark.requirement("H1")
@pytest.mark.one_process
def test_nothing_is_started_for_a_plain_event_that_is_sent(scene: Scene[Homeserver]) -> None:
    assert during(scene.server, lambda: send(scene)) == (Counter(), Counter())


@pytest.mark.slow
@pytest.mark.requirement("H1")
@pytest.mark.one_process
def test_nothing_is_started_for_a_plain_pdu_that_is_received(scene: Scene[Homeserver]) -> None:
    processes, transactions = during(scene.server, lambda: receive(scene))
    assert processes == Counter()
    assert transactions <= IN_ITS_PLACE


@pytest.mark.slow
@pytest.mark.requirement("H1")
@pytest.mark.one_process
def test_a_sticky_event_is_taken_in_as_it_is_persisted(scene: Scene[Homeserver]) -> None:
    sent: list[str] = []

    def send_sticky() -> None:
        sent.extend(scene.alice.send_sticky(scene.room_id) for _ in range(EVENTS))

    def receive_sticky() -> None:
        for _ in range(EVENTS):
            sent.append(scene.sticky())
            scene.peer.advance(scene.room, sent[-1])
            scene.wait_until_there(sent[-1])

    assert during(scene.server, send_sticky) == (Counter(), Counter())
    processes, transactions = during(scene.server, receive_sticky)
    assert processes == Counter()
    assert transactions <= IN_ITS_PLACE
    assert all(map(scene.server.index_knows, sent))


@pytest.mark.slow
@pytest.mark.requirement("H1", "P3")
@pytest.mark.one_process
def test_a_join_after_many_plain_events_is_seen(scene: Scene[Homeserver], lab: Lab) -> None:
    send(scene)
    with closing(lab.peer()) as newcomer:
        newcomer.join(scene.server, scene.room_id, newcomer.user("newcomer"))
        wait_until_seen(scene.server, newcomer, scene.room_id)
