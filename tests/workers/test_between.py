"""What breaks between the processes loses nothing and repeats nothing (E2, E4, L3)."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.joins.push import WATCH_AFTER_RECORD_MS
from synapse_sticky.homeserver.process import MIGRATION_LOCK
from tests.integration.rooms import (
    NO_LIMITS,
    deferred,
    entered,
    limits,
    wait_until_seen,
    wait_until_sticky,
    wait_until_taken_in,
)
from tests.integration.story import TRANSACTION, revived, tell
from tests.integration.test_staging import parked
from tests.lab import Homeserver, Lab, Peer, WorkerHomeserver, wait_until
from tests.lab.faults import FAULTY_MODULE, Fault, has_struck, set_clock_of, without_new_rows
from tests.lab.next_version import NEXT_VERSION
from tests.lab.scene import Scene, enter
from tests.lab.workers import (
    MAIN,
    PERSISTERS,
    SENDERS,
    SLIDING_SYNC,
    SYNC,
    WORKERS,
)
from tests.workers.conftest import deployed, enter_where, newcomer_of, transactions

PACE = range(5)
"""The flood's transactions."""

CONFIG = limits(per_server={"per_second": 10, "burst_count": 10}) | {"local": {"per_user": None}}
"""Most of the flood waits, for some seconds."""

pytestmark = pytest.mark.workers

_OTHERS = [name for name in (MAIN, *WORKERS) if name != PERSISTERS[0]]

Disturb = Callable[[Callable[[], object]], None]


@pytest.fixture(scope="module")
def deployment(lab: Lab) -> Iterator[WorkerHomeserver]:
    with deployed(lab, module_name=FAULTY_MODULE, config=CONFIG, metrics=True) as started:
        yield started


@pytest.fixture
def newcomer(lab: Lab) -> Iterator[Peer]:
    with newcomer_of(lab, SENDERS[0]) as started:
        yield started


def taken_in(deployment: WorkerHomeserver, scene: Scene[Homeserver]) -> int:
    """How much of the flood is persisted."""
    sql = (
        "SELECT COUNT(*) FROM events"
        " WHERE room_id = ? AND sender = ? AND type = 'org.example.call' AND NOT outlier"
    )
    ((count,),) = deployment.query(sql, scene.room_id, scene.eve)
    return int(count)


def acknowledged(deployment: WorkerHomeserver, scene: Scene[Homeserver]) -> int:
    """How much of the flood is persisted or staged."""
    sql = "SELECT COUNT(*) FROM federation_inbound_events_staging WHERE room_id = ?"
    ((staged,),) = deployment.query(sql, scene.room_id)
    return int(staged) + taken_in(deployment, scene)


def wait_until_flooded(deployment: WorkerHomeserver, scene: Scene[Homeserver]) -> None:
    wait_until(lambda: taken_in(deployment, scene) > 0, "the flood to begin")


@pytest.fixture
def tell_of(deployment: WorkerHomeserver, peer: Peer, newcomer: Peer) -> Disturb:
    """Tells the story; the disturbance comes once the flood has begun to be taken in."""

    def tell_of(disturb: Callable[[], object]) -> None:
        def meanwhile(scene: Scene[Homeserver]) -> None:
            wait_until_flooded(deployment, scene)
            disturb()

        tell(deployment, peer, newcomer, meanwhile=meanwhile, pace=PACE)

    return tell_of


@pytest.mark.requirement("E2", "E4", "L3", "L4", "P3", "P7", "D5", "D8")
@pytest.mark.parametrize("name", [PERSISTERS[0], *_OTHERS])
def test_a_process_is_killed(lab: Lab, deployment: WorkerHomeserver, peer: Peer, name: str) -> None:
    """In the middle of what it does: a persister is the room's, a sender the newcomer's."""
    scene = enter_where(deployment, peer, name if name in PERSISTERS else PERSISTERS[0])
    pushed_to, killed = threading.Event(), threading.Event()

    def hold_up(method: str, path: str) -> None:
        if name in SENDERS and "/send/" in path and not killed.is_set():
            pushed_to.set()
            killed.wait(60)

    def meanwhile(scene: Scene[Homeserver]) -> None:
        wait_until_flooded(deployment, scene)
        if name in SENDERS:
            assert pushed_to.wait(120)
        deployment.kill_process(name)
        killed.set()

    with newcomer_of(lab, name if name in SENDERS else SENDERS[0]) as newcomer:
        newcomer.override = hold_up
        tell(deployment, peer, newcomer, meanwhile=meanwhile, pace=PACE, scene=scene)


@pytest.mark.requirement("E2", "E4", "L3", "L4", "P3", "P7", "D5", "D8")
def test_all_are_killed(deployment: WorkerHomeserver, tell_of: Disturb) -> None:
    tell_of(deployment.kill)


@pytest.mark.requirement("E2", "E4", "L3", "P7")
@pytest.mark.parametrize(
    "fault",
    [
        Fault("persist", "inside", "error", times=20),
        Fault("persist", "inside", "kill"),
        Fault("persist", "after", "kill"),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.moment}",
)
def test_what_is_being_persisted(deployment: WorkerHomeserver, peer: Peer, fault: Fault) -> None:
    """The receiving process asked the persister for it, and gets no answer or an error. Nobody
    refers to it, so nobody would miss it."""
    scene = enter_where(deployment, peer, PERSISTERS[1])
    fault.arm(deployment.folder)
    sent = {scene.sticky() for _ in range(4)}
    wait_until(lambda: revived(deployment) and has_struck(deployment.folder), f"{fault} to strike")
    wait_until_all_entered(deployment, scene, sent)


@pytest.mark.requirement("E2", "L3", "L6")
@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "a\0b"},
        {"content": {"m.relates_to": {"rel_type": "m.thread", "event_id": "$a\0b"}}},
        {"content": {"org.matrix.labels": ["a\0b"]}},
    ],
    ids=["type", "relation", "label"],
)
def test_what_no_persister_can_take_is_not_kept(
    deployment: WorkerHomeserver, peer: Peer, fields: dict[str, Any]
) -> None:
    scene = enter_where(deployment, peer, PERSISTERS[0])
    bad, pdu = peer.sticky(scene.room, scene.eve, **fields)
    assert scene.send(pdu) == {bad: {}}
    good = scene.sticky()
    wait_until_all_entered(deployment, scene, {good})
    kept = deployment.query("SELECT event_id FROM synapse_sticky_incomplete")
    assert (bad,) not in kept


@pytest.mark.slow
@pytest.mark.requirement("E2", "E4", "L3", "P7")
def test_the_persister_is_away_for_long(deployment: WorkerHomeserver, peer: Peer) -> None:
    """For longer than the receiving process, Synapse itself there, tries to reach it."""
    scene = enter_where(deployment, peer, PERSISTERS[0])
    deployment.kill_process(PERSISTERS[0])
    sent = {scene.sticky() for _ in range(4)}

    wait_until(lambda: sent & parked(deployment), "the first to be parked", 120)
    wait_until_all_entered(deployment, scene, sent)


def wait_until_all_entered(
    deployment: WorkerHomeserver, scene: Scene[Homeserver], sent: set[str]
) -> None:
    wait_until(
        lambda: revived(deployment) and sent <= set(entered(deployment, scene.room_id)),
        "all to be taken in",
        120,
    )
    assert set(scene.alice.collect_sticky(scene.room_id, sent)) == sent
    rows = entered(deployment, scene.room_id)
    assert len(rows) == len(set(rows))


@pytest.mark.requirement("E2", "E4", "L3")
def test_redis_restarts(deployment: WorkerHomeserver, tell_of: Disturb) -> None:
    tell_of(deployment.valkey.restart)


@pytest.mark.requirement("E2", "E4", "L3")
def test_the_database_restarts(lab: Lab, deployment: WorkerHomeserver, tell_of: Disturb) -> None:
    tell_of(lab.postgres_of(deployment).restart)


@pytest.mark.requirement("E2", "E4", "L3")
@pytest.mark.parametrize(
    "names",
    [(SYNC,), (SYNC, SLIDING_SYNC), (SENDERS[0],), SENDERS, (PERSISTERS[0],), PERSISTERS],
    ids="+".join,
)
def test_replication_lags(
    deployment: WorkerHomeserver, peer: Peer, newcomer: Peer, names: tuple[str, ...]
) -> None:
    """The room's persister, the newcomer's sender, those who are being synced with."""

    def meanwhile(scene: Scene[Homeserver]) -> None:
        wait_until_flooded(deployment, scene)
        deployment.pause_processes(*names)
        try:
            done = acknowledged if PERSISTERS[0] in names else taken_in
            all_of_it = len(PACE) * TRANSACTION
            wait_until(lambda: done(deployment, scene) >= all_of_it, "the flood to be over", 180)
        finally:
            deployment.resume_processes(*names)

    scene = enter_where(deployment, peer, PERSISTERS[0])
    tell(deployment, peer, newcomer, meanwhile=meanwhile, pace=PACE, scene=scene)


@pytest.mark.requirement("E2", "P3", "P7")
def test_a_sender_sees_a_join_long_before_the_events_in_front_of_it(
    deployment: WorkerHomeserver, peer: Peer, newcomer: Peer
) -> None:
    """The newcomer has acknowledged what was sent before and since, and all watch is over."""
    scene = enter_where(deployment, peer, PERSISTERS[0])

    def send(count: int) -> set[str]:
        return {scene.alice.send_sticky(scene.room_id) for _ in range(count)}

    def wait_until_delivered(sent: set[str]) -> None:
        wait_until(lambda: sent <= newcomer.events.keys(), "the newcomer to have them", 120)

    def looks() -> int:
        return transactions(deployment)[SENDERS[0]]["synapse_sticky_last_rows"]

    seen = send(3)
    for event_id in seen:
        wait_until_sticky(deployment, event_id)
    sender = deployment.processes[SENDERS[0]]
    try:
        with without_new_rows(deployment.folder, SENDERS[0]):
            unseen = send(5)
            newcomer.join(deployment, scene.room_id, newcomer.user("carol"))
            wait_until_seen(deployment, newcomer, scene.room_id)
            wait_until_delivered(seen | send(1))
            assert not unseen & newcomer.events.keys()
            asked = looks()
            set_clock_of(sender, deployment.folder, 1.5 * WATCH_AFTER_RECORD_MS / 1000)
            wait_until(lambda: looks() > asked, "the sender to look once more")
        wait_until_delivered(unseen)
    finally:
        set_clock_of(sender, deployment.folder, 0.0)


@pytest.mark.requirement("E2", "S2", "L4")
@pytest.mark.parametrize("name", PERSISTERS)
def test_persisters_with_different_clocks(
    deployment: WorkerHomeserver, peer: Peer, newcomer: Peer, name: str
) -> None:
    ahead = deployment.processes[PERSISTERS[1]]
    set_clock_of(ahead, deployment.folder, 1.0)
    try:
        scene = enter_where(deployment, peer, name)
        tell(deployment, peer, newcomer, pace=range(2), scene=scene)
    finally:
        set_clock_of(ahead, deployment.folder, 0.0)


@pytest.mark.requirement("E2", "E4")
def test_all_make_the_tables_at_once(
    deployment: WorkerHomeserver, peer: Peer, newcomer: Peer
) -> None:
    deployment.stop()
    all_tables = (
        "SELECT table_name FROM information_schema.tables WHERE table_name LIKE 'synapse_sticky_%'"
    )
    tables = deployment.query(all_tables)
    assert len(tables) == 9
    made = "SELECT duty, version FROM synapse_sticky_layouts ORDER BY duty"
    layouts = deployment.query(made)
    deployment.change(*(f"DROP TABLE {name}" for (name,) in tables))
    said = deployment.output()
    # All come to the door before it opens.
    with deployment.advisory_lock(MIGRATION_LOCK):
        for name in (MAIN, *WORKERS):
            deployment.start_process(name)
        waiting = "SELECT COUNT(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        wait_until(lambda: deployment.query(waiting) == [(len(WORKERS) + 1,)], "all to wait", 180)
    deployment.wait_until_ready()
    wait_until(lambda: len(deployment.query(all_tables)) == len(tables), "the tables to be made")
    wait_until(lambda: deployment.query(made) == layouts, "all layouts to be there")
    # On a slow machine the last comes to the door when the first has waited for too long. Once the
    # door is open, nobody fails.
    opened = deployment.output()
    new = set(opened.splitlines()) - set(said.splitlines())
    failed = [line for line in new if "Could not load" in line]
    assert [line for line in failed if "lock timeout" not in line] == []
    tell(deployment, peer, newcomer, pace=range(2))
    steps = sum(version for _, version in layouts)
    for what, before, times in (("to layout", said, steps), ("Could not load", opened, 0)):
        assert deployment.output().count(what) - before.count(what) == times, what


@pytest.mark.requirement("E2", "E4", "L4", "P3")
def test_the_work_is_shared_out_anew(lab: Lab, peer: Peer) -> None:
    """What waits goes on with the new persister, what a newcomer lacks with the new sender."""
    lab.prepare()
    never = {"per_second": 0.001, "burst_count": 3}
    deployment = lab.make_workers(config=limits(per_server=never) | {"local": {"per_user": None}})
    deployment.first_start()
    try:
        scenes = [enter_where(deployment, peer, name) for name in PERSISTERS]
        with newcomer_of(lab, SENDERS[1]) as newcomer:
            newcomer.override = lambda method, path: (503, {}) if "/send/" in path else None
            floods = [set(scene.flood(20)) for scene in scenes]
            own = {scene.alice.send_sticky(scene.room_id) for scene in scenes}
            for scene, flood in zip(scenes, floods, strict=True):
                newcomer.join(deployment, scene.room_id, newcomer.user("carol"))
                wait_until_taken_in(deployment, scene.room_id, flood)
                wait_until_seen(deployment, newcomer, scene.room_id)
            assert len(deferred(deployment)) == 2 * (20 - 3)
            deployment.stop()
            deployment.configure_module(NO_LIMITS)
            deployment.share_out(PERSISTERS[:1], SENDERS[:1])
            newcomer.override = lambda method, path: None
            deployment.restart()
            wait_until(lambda: not deferred(deployment), "all to be released")
            wait_until(lambda: own <= newcomer.events.keys(), "the newcomer to have all")
        for scene, flood in zip(scenes, floods, strict=True):
            new = scene.sticky()
            expected = {*flood, *own, new}
            wait_until_sticky(deployment, new)
            rows = entered(deployment, scene.room_id)
            assert len(rows) == len(set(rows)) == 20 + 1 + 1
            assert set(rows) <= expected
            assert set(scene.alice.collect_sticky(scene.room_id, set(rows))) == set(rows)
    finally:
        lab.close_servers([deployment])


@pytest.mark.requirement("E2", "E4", "L3")
def test_a_rolling_restart_with_a_later_layout(lab: Lab, peer: Peer, newcomer: Peer) -> None:
    """Processes of both versions run side by side until the last is restarted. The flood goes on
    beside it; so do the joins."""
    lab.prepare()
    deployment = lab.make_workers(config=CONFIG)
    deployment.first_start()
    began = queue.Queue[str | None]()

    def upgrade(scene: Scene[Homeserver]) -> None:
        deployment.use_module(NEXT_VERSION)
        names = (*WORKERS, MAIN)
        try:
            for name in names[:-3]:
                began.put(name)
                deployment.restart_process(name)
        finally:
            began.put(None)
        for name in names[-3:]:
            deployment.restart_process(name)

    try:
        tell(deployment, peer, newcomer, meanwhile=upgrade, pace=iter(began.get, None))
        layout = "SELECT version FROM synapse_sticky_layouts WHERE duty = 'deferral'"
        later = len(DeferredTable.migrations) + 1
        assert deployment.query(layout) == [(later,)]
        assert deployment.output().count(f"the tables of deferral to layout {later}") == 1
        # All goes on as before.
        enter(deployment, peer)
    finally:
        lab.close_servers([deployment])
