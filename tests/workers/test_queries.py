"""What the module asks of the database in each process (C2, E2)."""

import re
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.integration.rooms import NO_LIMITS
from tests.lab import Lab, Peer, WorkerHomeserver, wait_until
from tests.lab.scene import enter
from tests.lab.workers import SLIDING_SYNC, SYNC

pytestmark = pytest.mark.workers

_TRANSACTIONS = re.compile(
    r'^synapse_storage_transaction_time_count_total\{desc="([^"]+)".*\} (\S+)$'
)
_READ = "synapse_sticky_read_rows"
_SYNAPSES_OWN = "get_sticky_events_in_rooms"

Transactions = dict[str, Counter[str]]


@pytest.fixture(scope="module")
def deployment(lab: Lab) -> Iterator[WorkerHomeserver]:
    lab.prepare()
    started = lab.make_workers(config=NO_LIMITS, metrics=True)
    started.first_start()
    yield started
    lab.close_servers([started])


def transactions(deployment: WorkerHomeserver) -> Transactions:
    """How many of each kind there were, by process."""
    counted: Transactions = {}
    for name, text in zip(deployment.processes, deployment.metrics(), strict=True):
        found = map(_TRANSACTIONS.match, text.splitlines())
        counted[name] = Counter({m[1]: int(float(m[2])) for m in found if m})
        assert counted[name], f"{name} says nothing of its transactions"
    return counted


@pytest.mark.requirement("C2", "E2")
def test_an_idle_sync_asks_nothing(deployment: WorkerHomeserver, peer: Peer) -> None:
    scene = enter(deployment, peer)
    sent = {*scene.flood(20), scene.alice.send_sticky(scene.room_id)}
    seen = scene.alice.collect_sticky(scene.room_id, sent)
    assert set(seen) == sent
    since = scene.alice.sync()["next_batch"]
    sliding = scene.alice.sliding_sync()
    before = transactions(deployment)
    for _ in range(20):
        since = scene.alice.sync(since)["next_batch"]
        sliding = scene.alice.sliding_sync(sliding)
    after = transactions(deployment)
    for name in (SYNC, SLIDING_SYNC):
        asked = after[name] - before[name]
        # The syncs are in there, with what Synapse asks for whoever syncs.
        assert asked.total() > 0
        of_module = [what for what in asked if what.startswith("synapse_sticky_")]
        assert not of_module, (name, asked)
        assert not asked[_SYNAPSES_OWN], (name, asked)


@pytest.mark.requirement("E2")
def test_one_small_query_a_batch(deployment: WorkerHomeserver, peer: Peer) -> None:
    """Events that come one by one are read one by one, once in each process."""
    scene = enter(deployment, peer)
    other = deployment.user()
    elsewhere = other.create_room()
    count = 15
    before = transactions(deployment)
    for _ in range(count):
        scene.alice.send_sticky(scene.room_id)
        other.send_sticky(elsewhere)
    # All processes follow the same stream.
    last = other.send_sticky(elsewhere)
    assert other.collect_sticky(elsewhere, {last})
    wait_until(
        lambda: all(
            asked[_READ] > before[name][_READ] for name, asked in transactions(deployment).items()
        ),
        "all processes to read",
    )
    for name, asked in transactions(deployment).items():
        new = asked - before[name]
        assert new[_READ] <= 2 * count + 2, (name, new)
