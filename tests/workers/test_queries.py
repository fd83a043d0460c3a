"""What the module does in each process, and what it asks of the database (C2, E2)."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from tests.integration.rooms import entered, joined_line, limits
from tests.integration.story import pages_of
from tests.lab import Lab, Peer, WorkerHomeserver, wait_until
from tests.lab.client import ignore
from tests.lab.scene import enter
from tests.lab.workers import (
    PERSISTERS,
    SENDERS,
    SLIDING_SYNC,
    SYNC,
    WORKERS,
)
from tests.workers.conftest import TRANSACTIONS, deployed, enter_where, newcomer_of, transactions

pytestmark = pytest.mark.workers

_BACKGROUND = re.compile(
    r'^synapse_background_process_start_count_total\{name="([^"]+)".*\} (\S+)$'
)
CONFIG = limits(per_server={"per_second": 1, "burst_count": 10}) | {"local": {"per_user": None}}
"""So that some of what comes in at any speed waits."""
_READ = "synapse_sticky_read_rows"
_SYNAPSES_OWN = "get_sticky_events_in_rooms"

_PREFIX = "synapse_sticky_"
# What each process may do: transactions, and what runs in the background.
_PARKING = {
    *("park", "parked", "due_parked", "next_parked_ms", "stage_again", "postpone_parked"),
    *("remove_parked", "unstage", "try_parked_pdus", "existing", "staged", "ask_origin"),
}
_SLIDING = {"store_page", "read_page", "read_pages", "newly_joined", "joined_within_the_hour"}
_EVERYWHERE = {
    *("read_rows", "load", "fill_index", "expire", "wait", "of_others"),
    *("read_actions", "follow_orders", "migrate_admin"),
    *("load_sliding", "migrate_sliding", "load_parking", "migrate_parking"),
    *("load_unignored", "migrate_delivery (unignored)"),
}
_OF_ITS_KIND = {
    "main": {*_SLIDING, "unignored", "forget_unignored"},
    "persister": {"load_deferral", "migrate_deferral", "deferred", "release", "drop_deferred"},
    "sender": {
        *("state_position", "newcomers", "left_behind", "memberships", "earliest_members"),
        *("state_changes", "own_depths"),
        *("record_joins", "last_rows", "backlog", "settle", "is_joined", "is_known"),
        *(
            "load_joins",
            "migrate_joins",
            "read_joins",
            "check_destination",
            "look_at_newcomers",
            "ask",
            "referenced",
        ),
        *("whitelist", "read_whitelist", "store_whitelist", "places"),
    },
    "receiver": {
        *("load_deferral", "migrate_deferral", "look_for_deferred", "count_deferred"),
        *("read_staged", "prune_staged", "next_staged", "is_joined", "received"),
        *_PARKING,
    },
    "sync": {*_SLIDING, "unignored"},
    "background": {"merge_extremities", "to_merge"},
}
_HAS_DONE = {
    "persister": {"release"},
    "sender": {"memberships", "record_joins", "settle", "ask"},
    "receiver": {"count_deferred", "try_parked_pdus"},
    "background": {"merge_extremities"},
}
"""What each has done after the story of the test, at least."""


@pytest.fixture(scope="module")
def deployment(lab: Lab) -> Iterator[WorkerHomeserver]:
    with deployed(lab, config=CONFIG, metrics=True, probed=True) as started:
        yield started


def kind_of(name: str) -> str:
    """Of a process: ``sender`` of ``sender1``."""
    return name.rstrip("12")


def done(deployment: WorkerHomeserver) -> dict[str, set[str]]:
    """What of the module's ran in each process so far."""
    asked, ran = (transactions(deployment, what) for what in (TRANSACTIONS, _BACKGROUND))
    return {
        name: {
            what.removeprefix(_PREFIX)
            for what, times in (asked[name] + ran[name]).items()
            if what.startswith(_PREFIX) and times > 0
        }
        for name in asked
    }


def are_entered(deployment: WorkerHomeserver, room_id: str, event_ids: set[str]) -> bool:
    return event_ids <= set(entered(deployment, room_id))


@pytest.mark.workers
@pytest.mark.requirement("E2", "E4")
def test_each_process_does_its_own_work(lab: Lab, deployment: WorkerHomeserver, peer: Peer) -> None:
    """A flood for rooms of both persisters, a newcomer for each sender, a user who pages."""
    with ExitStack() as stack:
        newcomers = [stack.enter_context(newcomer_of(lab, sender)) for sender in SENDERS]
        for persister in PERSISTERS:
            scene = enter_where(deployment, peer, persister)
            sent = {*scene.flood(20), *scene.flood(20)}
            of_alice = {scene.alice.send_sticky(scene.room_id) for _ in range(5)}
            for newcomer in newcomers:
                newcomer.join(deployment, scene.room_id, newcomer.user("carol"))
            expected = sent | of_alice
            wait_until(partial(are_entered, deployment, scene.room_id, expected), "the flood", 120)
            assert set(scene.alice.collect_sticky(scene.room_id, expected)) == expected
            for newcomer in newcomers:
                wait_until(lambda: of_alice <= newcomer.events.keys(), "the newcomer to have all")  # noqa: B023
            # Deferred and released, all of it by the room's persister.
            sql = "SELECT DISTINCT instance_name FROM sticky_events WHERE room_id = ?"
            assert deployment.query(sql, scene.room_id) == [(persister,)]
            for newcomer, sender in zip(newcomers, SENDERS, strict=True):
                line = joined_line(newcomer, scene.room_id)
                said = {name: deployment.output_of(name).count(line) for name in WORKERS}
                assert {name for name, times in said.items() if times} == {sender}
                assert said[sender] == 1
            bob = deployment.user()
            bob.send_sticky(bob.create_room())
            before = bob.sliding_sync()
            bob.join(scene.room_id)
            pages_of(bob, scene.room_id, before, lambda do: do(), expected)

    def undone() -> dict[str, set[str]]:
        did = done(deployment)
        left = {name: _HAS_DONE.get(kind_of(name), set()) - did[name] for name in did}
        left[SLIDING_SYNC] |= {"store_page", "read_page"} - did[SLIDING_SYNC]
        return {name: what for name, what in left.items() if what}

    wait_until(lambda: not undone(), "all to have done theirs", 120, undone)
    # Nothing at all is done elsewhere.
    for name, did in done(deployment).items():
        assert did <= _EVERYWHERE | _OF_ITS_KIND[kind_of(name)], name


@pytest.mark.requirement("C2", "E2")
def test_an_idle_sync_asks_nothing(deployment: WorkerHomeserver, peer: Peer) -> None:
    scene = enter(deployment, peer)
    sent = {*scene.flood(20), scene.alice.send_sticky(scene.room_id)}
    wait_until(lambda: sent <= set(entered(deployment, scene.room_id)), "what waits")
    assert all(deployment.index_knows(event_id) for event_id in sent)
    # Whom she ignored, and does not ignore any more, is asked for once.
    ignore(scene.alice, deployment.user())
    ignore(scene.alice)
    wait_until(lambda: ignores_nobody(scene.alice.sync()), "her to ignore nobody")
    since = scene.alice.sync()["next_batch"]
    since = scene.alice.sync(since)["next_batch"]
    sliding = scene.alice.sliding_sync(scene.alice.sliding_sync())
    before = transactions(deployment)
    for _ in range(20):
        since = scene.alice.sync(since)["next_batch"]
        sliding = scene.alice.sliding_sync(sliding)
    after = transactions(deployment)
    for name in (SYNC, SLIDING_SYNC):
        asked = after[name] - before[name]
        # The syncs are in there, with what Synapse asks for whoever syncs.
        assert asked.total() > 0
        of_module = [what for what in asked if what.startswith(_PREFIX)]
        assert not of_module, (name, asked)
        assert not asked[_SYNAPSES_OWN], (name, asked)


def ignores_nobody(answer: Any) -> bool:
    events = answer["account_data"]["events"]
    return {"type": "m.ignored_user_list", "content": {"ignored_users": {}}} in events


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
    last = other.send_sticky(elsewhere)
    assert deployment.index_knows(last), "all processes have read all of it"
    for name, asked in transactions(deployment).items():
        new = asked - before[name]
        # What a persister has persisted itself it need not read.
        least = 0 if kind_of(name) == "persister" else 1
        assert least <= new[_READ] <= 2 * count + 1, (name, new)
        of_module = {what: new[what] for what in new if what.startswith(_PREFIX)}
        # Senders look for newcomers as well, and receivers from time to time for what is kept.
        if kind_of(name) not in {"sender", "receiver"}:
            assert of_module.keys() <= {_READ, _PREFIX + "read_actions"}, (name, new)
