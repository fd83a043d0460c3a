"""What this process persists itself needs no query to get into its index (H1, S5)."""

import json
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from synapse_sticky.homeserver import Cursor, Homeserver, changed
from synapse_sticky.index import IndexFollower, synapse
from synapse_sticky.index.synapse import SynapseStickyStream
from tests.unit.test_limits_in_synapse import (
    SOFT_FAILED,
    done,
    insert,
    make_homeserver,
    run_sql,
    sticky_event,
)

pytestmark = pytest.mark.requirement("H1", "S5")


class Counting(Homeserver):
    """The real one, which counts what it runs by itself."""

    started = 0

    def in_background(
        self, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> None:
        self.started += 1
        super().in_background(what, function, *args)


@pytest.fixture
def homeserver(tmp_path: Path) -> Counting:
    return Counting(make_homeserver(tmp_path).get_module_api())


@pytest.fixture
def follower(homeserver: Counting) -> IndexFollower:
    return follow(homeserver)


def follow(homeserver: Counting) -> IndexFollower:
    follower = IndexFollower(homeserver, SynapseStickyStream(homeserver))
    follower.start()
    assert follower.in_step()
    homeserver.started = 0
    return follower


def in_index(follower: IndexFollower, event_id: str) -> int | None:
    """Its stream ID there."""
    row = follower.index.get(event_id)
    return row and row[0]


def in_table(homeserver: Homeserver, event_id: str) -> int:
    sql = "SELECT stream_id FROM sticky_events WHERE event_id = ?"
    ((stream_id,),) = run_sql(homeserver, sql, event_id)
    return int(stream_id)


def test_nothing_is_started(homeserver: Counting, follower: IndexFollower) -> None:
    told: list[Any] = []
    follower.on_new_events(told.append)
    for number in range(1, 31, 3):
        events = [sticky_event(homeserver, number + more) for more in range(3)]
        insert(homeserver, events)
        assert follower.in_step()
        for event in events:
            assert in_index(follower, event.event_id) == in_table(homeserver, event.event_id)
    assert homeserver.started == 0
    assert told == [{events[0].room_id}] * 10
    (row, *_) = done(follower.stream.rows(after=0, up_to=100, limit=1))
    known = follower.index.get(row.event_id)
    assert known == (row.stream_id, row.room_id, row.event_id, row.sender, row.expires_at_ms)


def test_an_attempt_that_failed(homeserver: Counting, follower: IndexFollower) -> None:
    first, second = sticky_event(homeserver, 1), sticky_event(homeserver, 2)
    attempts: list[int] = []

    def insert_txn(txn: Cursor) -> None:
        homeserver.store.insert_sticky_events_txn(txn, [first, second])
        attempts.append(1)
        if len(attempts) == 1:
            raise sqlite3.OperationalError("database is locked")

    done(homeserver.transact("test", insert_txn))
    assert len(attempts) == 2
    assert follower.in_step()
    for event in (first, second):
        assert in_index(follower, event.event_id) == in_table(homeserver, event.event_id)


def test_soft_failed(homeserver: Counting, follower: IndexFollower) -> None:
    event = sticky_event(homeserver, 1)
    run_sql(homeserver, "UPDATE event_json SET internal_metadata = ?", json.dumps(SOFT_FAILED))
    insert(homeserver, [event])
    assert in_table(homeserver, event.event_id)
    assert in_index(follower, event.event_id) is None
    assert follower.in_step()
    assert homeserver.started == 0


def test_what_may_be_redacted_is_looked_up(homeserver: Counting, follower: IndexFollower) -> None:
    event = sticky_event(homeserver, 1)
    sql = "INSERT INTO redactions (event_id, redacts) VALUES ('$redaction', ?)"
    run_sql(homeserver, sql, event.event_id)
    insert(homeserver, [event])
    assert follower.in_step()
    assert in_index(follower, event.event_id) is None
    assert homeserver.started == 1


def test_redacted_in_the_same_transaction(homeserver: Counting, follower: IndexFollower) -> None:
    event = sticky_event(homeserver, 1)

    def insert_txn(txn: Any) -> None:
        homeserver.store.insert_sticky_events_txn(txn, [event])
        sql = "INSERT INTO redactions (event_id, redacts) VALUES ('$redaction', ?)"
        txn.execute(sql, (event.event_id,))
        txn.call_after(homeserver.store._invalidate_local_get_event_cache, event.event_id)

    done(homeserver.transact("test", insert_txn))
    assert follower.in_step()
    assert in_index(follower, event.event_id) is None


def test_a_synapse_that_persists_in_another_way(
    homeserver: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synapse, "misfits", lambda seams, columns: ["it is not there"])
    follower = follow(homeserver)
    event = sticky_event(homeserver, 1)
    insert(homeserver, [event])
    assert follower.in_step()
    assert in_index(follower, event.event_id) == in_table(homeserver, event.event_id)
    assert homeserver.started == 1


def test_which_rooms_have_changed_is_synapses_to_say(
    homeserver: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = homeserver.store._curr_state_delta_stream_cache
    rooms = changed.ChangedRooms(homeserver)
    at = homeserver.store.get_room_max_stream_ordering()
    assert not rooms.may_have_changed(at)
    cache.entity_has_changed("!room", at + 1)
    assert rooms.may_have_changed(at)
    assert not rooms.may_have_changed(at + 1)
    # It has forgotten what was before.
    cache.all_entities_changed(at + 5)
    assert rooms.may_have_changed(at + 4)
    monkeypatch.setattr(changed, "misfits", lambda seams: ["it is not there"])
    assert changed.ChangedRooms(homeserver).may_have_changed(at + 5)
