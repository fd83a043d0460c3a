"""Who newly joins is found by a few queries, however many members a room has (H1, H3)."""

import gc
import random
from collections.abc import Iterator, Sequence

import pytest

from synapse_sticky.handlers.joins.detection.reader import JoinReader, ServerJoin
from synapse_sticky.handlers.joins.detection.synapse import SynapseStateChanges
from synapse_sticky.handlers.joins.synapse import SynapseFederation
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.homeserver.rooms import Rooms
from tests.unit.members import (
    HERE,
    MOST_ARGUMENTS,
    Change,
    Changes,
    Member,
    ThisProcess,
    World,
    counts,
    whole,
)
from tests.unit.test_limits_in_synapse import begin

MORE_THAN_SQLITE_TAKES = MOST_ARGUMENTS + 1
HOUR_MS = 3_600_000


def joins(
    world: World, process: ThisProcess, up_to: int, not_before_ms: int = 0
) -> list[ServerJoin]:
    """Of all pages up to the position."""
    changes = SynapseStateChanges(process)
    found: list[ServerJoin] = []
    after = 0
    while after < up_to:
        after, rooms = world.drive(changes.page(after=after, up_to=up_to))
        found += world.drive(changes.server_joins(rooms, not_before_ms=not_before_ms))
    return found


# The rules


def expected(
    changes: Sequence[Change], members: Sequence[Member], not_before_ms: int
) -> set[tuple[str, str]]:
    """The same by the rules as they are said, change by change."""
    of_create = [c for c in changes if c.user_id is None]
    own_joins = {(c.at, c.room_id) for c in of_create if c.membership is not None}
    found = {(HERE, room_id) for _, room_id in own_joins}
    for c in changes:
        server = (c.user_id or "").partition(":")[2]
        if server in ("", HERE) or c.membership != "join" or c.before == "join":
            continue
        if c.received_ts_ms < not_before_ms:
            continue
        here = [m for m in members if m.room_id == c.room_id]
        others = [m for m in here if m.user_id.endswith(f":{server}") and m.user_id != c.user_id]
        was_there = any(m.ordering is None or m.ordering < c.ordering for m in others)
        own_depths = [m.depth for m in here if m.user_id.endswith(f":{HERE}")]
        sent_all = c.outlier and own_depths and c.depth <= min(own_depths)
        is_own_join = (c.at, c.room_id) in own_joins
        is_new = not is_own_join and not was_there and not sent_all
        stayed = _stayed(changes, c, not_before_ms) if c.outlier or is_own_join else None
        if is_new or (stayed is not None and server not in stayed):
            found.add((server, c.room_id))
    return found


def _stayed(changes: Sequence[Change], join: Change, not_before_ms: int) -> set[str] | None:
    """The servers that stayed when this server left the room before the join."""
    before = [c for c in changes if c.room_id == join.room_id and c.at < join.at]
    left_at = max((c.at for c in before if c.user_id is None and c.membership is None), default=0)
    since = [c for c in changes if c.membership is not None and c.ordering >= left_at]
    if not left_at or min(since, key=lambda c: c.ordering).received_ts_ms < not_before_ms:
        return None
    forgotten = [c for c in before if c.at == left_at and c.user_id and c.membership is None]
    return {(c.user_id or "").partition(":")[2] for c in forgotten if c.before == "join"}


def chance(seed: int) -> tuple[list[Change], list[Member], int]:
    """Any changes of two rooms' members; this server may come and go."""
    some = random.Random(seed)
    now_ms = 1_800_000_000_000
    rooms, users = ["!a", "!b"], [f"@u{n}:s{n % 4}" for n in range(10)]
    changes: list[Change] = []
    at = 0
    for _ in range(some.randint(1, 12)):
        at += 100
        room_id = some.choice(rooms)
        what = some.choice(["member", "member", "member", "own join", "leave", "whole"])
        if what in ("own join", "leave"):
            kind = "" if what == "own join" else None
            changes.append(Change(at, room_id, None, kind, at + 99, received_ts_ms=now_ms))
        several = 1 if what == "member" and some.random() < 0.7 else 5
        for number, user_id in enumerate(some.sample(users, some.randint(1, several))):
            is_outlier = what == "whole" or some.random() < 0.1
            changes.append(
                Change(
                    at,
                    room_id,
                    user_id,
                    None if what == "leave" else some.choice(["join", "join", "leave"]),
                    -at - number if is_outlier else at + number,
                    some.choice([None, "join", "leave"]),
                    some.randint(1, 9),
                    is_outlier,
                    some.choice([now_ms - HOUR_MS - 1, now_ms, now_ms]),
                )
            )
    changes.append(Change(at + 100, "!a", users[0], "leave", at + 100, received_ts_ms=now_ms))
    numbers = iter(range(1, 99))
    there = {
        (room_id, user_id): Member(
            room_id, user_id, some.choice([None, n, -10_000 - n, 90_000 + n])
        )
        for room_id in rooms
        for user_id, n in zip(some.sample(users, some.randint(0, 5)), numbers, strict=False)
    }
    for c in changes:
        if c.user_id and c.membership == "join" and some.random() < 0.6:
            there[c.room_id, c.user_id] = Member(c.room_id, c.user_id, c.ordering)
    for room_id in rooms:
        if some.random() < 0.7:
            own = Member(room_id, f"@own:{HERE}", 90_000 + next(numbers), some.randint(1, 9))
            there[room_id, own.user_id] = own
    return changes, list(there.values()), now_ms - HOUR_MS


@pytest.mark.requirement("P3")
@pytest.mark.parametrize("first", range(0, 60, 20))
def test_as_the_rules_say(world: World, process: ThisProcess, first: int) -> None:
    for seed in range(first, first + 20):
        changes, members, not_before_ms = chance(seed)
        world.put(changes, members)
        found = joins(world, process, 10_000, not_before_ms)
        as_said = expected(changes, members, not_before_ms)
        assert {(join.destination, join.room_id) for join in found} == as_said, seed
        world.clear()


# Large rooms


@pytest.mark.requirement("H3", "P3")
def test_the_members_of_a_large_room_are_not_asked_for_one_by_one(
    world: World, process: ThisProcess
) -> None:
    """Partial state becomes whole: all members come at one position."""
    whole(world, 200, 20, newcomers=3)
    found = joins(world, process, 100)
    assert {join.destination for join in found} == {f"server{n}" for n in range(17, 20)}
    few = counts(process)
    assert few.total() <= 5
    world.clear()
    process.forget()
    members = 8_000 if process.is_postgres else MORE_THAN_SQLITE_TAKES
    whole(world, members, 2_000, newcomers=300)
    found = joins(world, process, 100)
    assert {join.destination for join in found} == {f"server{n}" for n in range(1_700, 2_000)}
    assert counts(process) == few
    assert process.sleeps >= members // 1_000 - 1, "others have their turns meanwhile"


@pytest.mark.requirement("H3", "P3")
def test_members_of_before_cost_no_look_at_a_room_and_no_object_each(
    world: World, process: ThisProcess
) -> None:
    """Only of who may be a newcomer is it asked who else of the server is in the room."""
    members, servers = 5_000, 100
    whole(world, members, servers)
    process.held = "left_behind"
    changes = SynapseStateChanges(process)
    _, rooms = world.drive(changes.page(after=0, up_to=100))
    gc.collect()
    before = len(gc.get_objects())
    found = begin(changes.server_joins(rooms, not_before_ms=0))
    world.reactor.advance(0)
    assert process.held is None, "all members are held now"
    gc.collect()
    held = len(gc.get_objects()) - before
    assert held < members / 10
    process.release()
    world.take_turns()
    assert found == [[]]
    assert counts(process)["earliest_members"] == 0
    # One newcomer among them: that one is looked for, and no other.
    world.clear()
    whole(world, members, servers, newcomers=1)
    process.forget()
    assert {join.destination for join in joins(world, process, 100)} == {"server99"}
    assert counts(process)["earliest_members"] == 1


def reader(process: ThisProcess, changes: Changes) -> tuple[JoinReader, list[ServerJoin]]:
    """One that records with the real tables. Gives what it tells of, too."""
    told: list[ServerJoin] = []
    table = NewcomerTable(process)
    federation = SynapseFederation(process, Rooms(process))
    read = JoinReader(
        process, changes, federation, table, lambda mine, own, until: told.extend(mine)
    )
    return read, told


def stored(world: World) -> dict[str, int]:
    """How many newcomers are stored, by room."""
    return dict(
        world.execute("SELECT room_id, COUNT(*) FROM synapse_sticky_newcomers GROUP BY room_id")
    )


@pytest.fixture
def tables(world: World, process: ThisProcess) -> Iterator[None]:
    world.drive(migrate(process, NewcomerTable(process)))
    yield
    for table in ("synapse_sticky_newcomers", "synapse_sticky_state_positions"):
        world.execute(f"DELETE FROM {table}")
    world.execute("DELETE FROM destination_rooms_sticky_events_backlog")


@pytest.mark.requirement("H1", "P3")
@pytest.mark.usefixtures("tables")
def test_a_large_room_keeps_no_other_waiting(world: World, process: ThisProcess) -> None:
    changes = Changes(process)
    read, told = reader(process, changes)
    read.start(world.drive(read.stored_position()))
    servers = 2_000
    at = whole(world, servers, servers, newcomers=servers, room="!large")
    small = [
        Change(at + n, f"!small{n}", f"@new{n}:elsewhere{n}", "join", at + n) for n in range(1, 200)
    ]
    world.put(small, [])
    # The large room's query takes its time.
    process.held = "memberships"
    process.forget()
    changes.position = at + 199
    read.wake()
    world.reactor.advance(0)
    assert len(told) == len(small)
    assert stored(world) == {change.room_id: 1 for change in small}
    assert len(process.transactions) < 20, "pages, not rooms, are what is asked for"
    assert position(world) < at, "after a restart the large room is read again"
    process.forget()
    process.release()
    world.take_turns()
    assert len(told) == len(small) + servers
    # So that none of them takes long, and none of its rows is locked for long.
    assert counts(process)["record_joins"] == servers / 50
    backlog = "SELECT COUNT(*) FROM destination_rooms_sticky_events_backlog WHERE room_id = ?"
    assert world.execute(backlog, "!large") == [(servers,)]
    world.reactor.advance(61)
    # Where nothing has changed, a position is stored once it is far from the last one.
    changes.position += 1_001
    read.wake()
    assert position(world) == changes.position


def position(world: World) -> int:
    """The one that is stored."""
    ((found,),) = world.execute("SELECT position FROM synapse_sticky_state_positions")
    return int(found)


@pytest.mark.requirement("H1", "H2", "P3")
@pytest.mark.usefixtures("tables")
def test_a_large_room_that_fails_is_tried_again(world: World, process: ThisProcess) -> None:
    changes = Changes(process)
    read, told = reader(process, changes)
    read.start(world.drive(read.stored_position()))
    at = whole(world, 1_100, 10, newcomers=10, room="!large")
    process.failing = "memberships"
    changes.position = at
    read.wake()
    assert stored(world) == {}
    process.failing = None
    world.reactor.advance(10)
    assert stored(world) == {"!large": 10}
    assert len(told) == 10


@pytest.mark.requirement("H7")
def test_another_acl_is_seen_with_the_room_that_has_it(world: World, process: ThisProcess) -> None:
    world.put([Change(100, "!a", "@u:there", "join", 100), Change(200, "!b", None, "", 200)], [])
    insert = (
        "INSERT INTO current_state_delta_stream (stream_id, room_id, type, state_key, event_id)"
        " VALUES (?, ?, 'm.room.server_acl', '', ?)"
    )
    world.execute(insert, 300, "!c", "$acl")
    world.execute(insert, 400, "!a", None)
    for room_id, at in (("!c", 300), ("!a", 400)):
        world.store._curr_state_delta_stream_cache.entity_has_changed(room_id, at)
    changes = Changes(process)
    changes.position = 400
    told: list[str] = []
    federation = SynapseFederation(process, Rooms(process))
    table = NewcomerTable(process)
    world.drive(migrate(process, table))
    reader = JoinReader(
        process, changes, federation, table, lambda mine, changed, until: told.extend(changed)
    )
    reader.start(0)
    world.take_turns()
    assert sorted(told) == ["!a", "!b", "!c"]
