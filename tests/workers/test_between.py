"""What breaks between the processes loses nothing and repeats nothing (E2, E4, L3)."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.integration.rooms import deferred, entered, limits
from tests.integration.story import TRANSACTION, revived, tell
from tests.lab import Homeserver, Lab, Peer, WorkerHomeserver, wait_until
from tests.lab.faults import FAULTY_MODULE, Fault, has_struck, set_clock_of
from tests.lab.next_version import NEXT_VERSION
from tests.lab.scene import Scene, enter
from tests.lab.workers import (
    MAIN,
    PERSISTERS,
    RECEIVERS,
    SENDERS,
    SLIDING_SYNC,
    SYNC,
    WORKERS,
    owner,
)

TRANSACTIONS = 5
CONFIG = limits(per_server={"per_second": 10, "burst_count": 10}) | {"local": {"per_user": None}}
"""Most of the flood waits, for some seconds."""


@pytest.fixture(scope="module")
def deployment(lab: Lab) -> Iterator[WorkerHomeserver]:
    lab.prepare()
    started = lab.make_workers(module_name=FAULTY_MODULE, config=CONFIG)
    started.first_start()
    yield started
    lab.close_servers([started])


@pytest.fixture
def newcomer(lab: Lab) -> Iterator[Peer]:
    started = lab.peer()
    yield started
    started.close()


def enter_where(
    deployment: WorkerHomeserver, peer: Peer, persister: str
) -> Scene[WorkerHomeserver]:
    """A room that this event persister persists."""
    while owner(PERSISTERS, (scene := enter(deployment, peer)).room_id) != persister:
        pass
    return scene


@pytest.fixture
def tell_of(
    deployment: WorkerHomeserver, peer: Peer, newcomer: Peer
) -> Callable[[Callable[[], object]], None]:
    """Tells the story; the disturbance comes once the flood has begun to be taken in."""

    def tell_of(disturb: Callable[[], object]) -> None:
        def meanwhile(scene: Scene[Homeserver]) -> None:
            wait_until(lambda: bool(entered(deployment, scene.room_id)), "the flood to begin")
            disturb()

        tell(deployment, peer, newcomer, meanwhile=meanwhile, transactions=TRANSACTIONS)

    return tell_of


TellOf = Callable[[Callable[[], object]], None]

_MORE = pytest.mark.workers
_OTHERS = [name for name in (MAIN, *WORKERS) if name != PERSISTERS[0]]


@pytest.mark.requirement("E2", "E4", "L3", "L4", "P3", "P7", "D5")
@pytest.mark.parametrize(
    "name", [PERSISTERS[0], *(pytest.param(name, marks=_MORE) for name in _OTHERS)]
)
def test_a_process_is_killed(deployment: WorkerHomeserver, tell_of: TellOf, name: str) -> None:
    tell_of(partial(deployment.kill_process, name))


@_MORE
@pytest.mark.requirement("E2", "E4", "L3", "L4", "P3", "P7", "D5")
def test_all_are_killed(deployment: WorkerHomeserver, tell_of: TellOf) -> None:
    tell_of(deployment.kill)


@pytest.mark.requirement("E2", "E4", "L3", "P7")
@pytest.mark.parametrize(
    "fault",
    [
        Fault("persist", "inside", "error", times=20),
        pytest.param(Fault("persist", "inside", "kill"), marks=_MORE),
        pytest.param(Fault("persist", "after", "kill"), marks=_MORE),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.moment}",
)
def test_what_is_being_persisted(deployment: WorkerHomeserver, peer: Peer, fault: Fault) -> None:
    """The receiving process asked the persister for it, and gets no answer or an error. Nobody
    refers to it, so nobody would miss it."""
    scene = enter(deployment, peer)
    fault.arm(deployment.folder)
    sent = {scene.sticky() for _ in range(4)}
    wait_until(lambda: revived(deployment) and has_struck(deployment.folder), f"{fault} to strike")
    wait_until_all_entered(deployment, scene, sent)


@pytest.mark.slow
@pytest.mark.requirement("E2", "E4", "L3", "P7")
def test_the_persister_is_away_for_long(deployment: WorkerHomeserver, peer: Peer) -> None:
    """For longer than the receiving process tries to reach it."""
    scene = enter_where(deployment, peer, PERSISTERS[0])
    deployment.kill_process(PERSISTERS[0])
    sent = {scene.sticky() for _ in range(4)}
    # The receiving process says so of the first.
    wait_until(
        lambda: any(
            f"Could not process the sticky PDU {event_id}" in deployment.output()
            for event_id in sent
        ),
        "it to be given up",
        120,
    )
    wait_until_all_entered(deployment, scene, sent)


def wait_until_all_entered(
    deployment: WorkerHomeserver, scene: Scene[WorkerHomeserver], sent: set[str]
) -> None:
    wait_until(
        lambda: revived(deployment) and sent <= set(entered(deployment, scene.room_id)),
        "all to be taken in",
        120,
    )
    seen = scene.alice.collect_sticky(scene.room_id, sent)
    assert set(seen) == sent
    rows = entered(deployment, scene.room_id)
    assert len(rows) == len(set(rows))


@pytest.mark.requirement("E2", "E4", "L3")
def test_redis_restarts(deployment: WorkerHomeserver, tell_of: TellOf) -> None:
    tell_of(deployment.valkey.restart)


@_MORE
@pytest.mark.requirement("E2", "E4", "L3")
def test_the_database_restarts(lab: Lab, deployment: WorkerHomeserver, tell_of: TellOf) -> None:
    tell_of(lab.postgres_of(deployment).restart)


@_MORE
@pytest.mark.requirement("E2", "E4", "L3")
@pytest.mark.parametrize(
    "names", [(SYNC, SLIDING_SYNC), SENDERS, PERSISTERS], ids=["syncs", "senders", "persisters"]
)
def test_replication_lags(
    deployment: WorkerHomeserver, peer: Peer, newcomer: Peer, names: tuple[str, ...]
) -> None:
    def meanwhile(scene: Scene[Homeserver]) -> None:
        def taken_in() -> int:
            return len(entered(deployment, scene.room_id)) + len(deferred(deployment))

        wait_until(lambda: taken_in() > 0, "the flood to begin")
        deployment.pause_processes(*names)
        try:
            if names == PERSISTERS:
                waiting = "SELECT 1 FROM federation_inbound_events_staging LIMIT 1"
                wait_until(lambda: bool(deployment.query(waiting)), "the flood to go on")
            else:
                all_of_it = TRANSACTIONS * TRANSACTION
                wait_until(lambda: taken_in() >= all_of_it, "the flood to be over", 120)
        finally:
            deployment.resume_processes(*names)

    tell(deployment, peer, newcomer, meanwhile=meanwhile, transactions=TRANSACTIONS)


@_MORE
@pytest.mark.requirement("E2", "S2", "L4")
def test_persisters_with_different_clocks(
    deployment: WorkerHomeserver, peer: Peer, newcomer: Peer
) -> None:
    ahead = deployment.processes[PERSISTERS[1]]
    set_clock_of(ahead, deployment.folder, 1.0)
    try:
        written_by = set[str]()
        while written_by != set(PERSISTERS):
            tell(deployment, peer, newcomer, transactions=2)
            rows = deployment.query("SELECT DISTINCT instance_name FROM sticky_events")
            written_by = {name for (name,) in rows}
    finally:
        set_clock_of(ahead, deployment.folder, 0.0)


@_MORE
@pytest.mark.requirement("E2", "E4")
def test_all_make_the_tables_at_once(
    deployment: WorkerHomeserver, peer: Peer, newcomer: Peer
) -> None:
    deployment.stop()
    tables = deployment.query(
        "SELECT table_name FROM information_schema.tables WHERE table_name LIKE 'synapse_sticky_%'"
    )
    assert len(tables) == 6
    deployment.change(*(f"DROP TABLE {name}" for (name,) in tables))
    for name in (MAIN, *WORKERS):
        deployment.start_process(name)
    deployment.wait_until_ready()
    versions = deployment.query("SELECT version FROM synapse_sticky_layout ORDER BY version")
    assert versions == [(1,), (2,), (3,), (4,)]
    tell(deployment, peer, newcomer, transactions=2)


@_MORE
@pytest.mark.requirement("E2", "E4", "L3")
def test_a_rolling_restart_with_a_later_layout(lab: Lab, peer: Peer, newcomer: Peer) -> None:
    """Processes of both versions run side by side until the last is restarted."""
    lab.prepare()
    deployment = lab.make_workers(config=CONFIG)
    deployment.first_start()

    def upgrade(scene: Scene[Homeserver]) -> None:
        wait_until(lambda: bool(entered(deployment, scene.room_id)), "the flood to begin")
        deployment.use_module(NEXT_VERSION)
        for name in (*WORKERS, MAIN):
            deployment.restart_process(name)

    try:
        tell(deployment, peer, newcomer, meanwhile=upgrade, transactions=TRANSACTIONS)
        assert deployment.query("SELECT max(version) FROM synapse_sticky_layout") == [(5,)]
        assert deployment.output().count("to layout 5") == 1
        # All goes on as before.
        enter(deployment, peer)
    finally:
        lab.close_servers([deployment])


@_MORE
@pytest.mark.requirement("E2", "L1", "L6")
def test_what_waits_is_bounded_however_many_receive(lab: Lab, peer: Peer) -> None:
    """``max_deferred_per_server`` holds over all receivers: they ask the database."""
    lab.prepare()
    most = 60
    config = limits(
        per_server={"per_second": 0.001, "burst_count": 10}, max_deferred_per_server=most
    )
    deployment = lab.make_workers(config=config)
    deployment.first_start()
    try:
        scene = enter(deployment, peer)
        taken, refused = 0, 0
        while refused < 2 * len(RECEIVERS):
            events = []
            for _ in range(10):
                events.append(peer.sticky(scene.room, scene.eve))
                peer.advance(scene.room, events[-1][0])
            answer = peer.to(deployment).send(f"bound-{taken}-{refused}", [e for _, e in events])
            assert answer.status_code in {200, 429}
            if answer.status_code == 200:
                assert not refused, "once there is too much, every receiver says so"
                taken += 10
            else:
                refused += 1
                assert answer.json()["errcode"] == "M_LIMIT_EXCEEDED"
        # Ten were let through, the rest waits; one transaction may be taken beyond.
        assert most <= taken - 10 <= most + 10
    finally:
        lab.close_servers([deployment])
