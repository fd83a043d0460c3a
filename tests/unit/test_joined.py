"""Which rooms a user has joined of late, by what Synapse's tables have of it (D5, H3)."""

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any, cast

import pytest
from immutabledict import immutabledict
from synapse.types import RoomStreamToken

from synapse_sticky.handlers.sliding.joined.synapse import SynapseJoinedRooms
from synapse_sticky.handlers.sliding.pages import Shown
from synapse_sticky.index import Position
from tests.unit.process import Process
from tests.unit.test_limits import done

ME, YOU = "@me:here", "@you:here"
WRITERS = ("first", "second")
MINUTE_MS = 60_000


class Store:
    """Synapse's, which knows at which position the last hour began, and who changed anything."""

    def __init__(self) -> None:
        self.hour_began = 1
        self.looked_up = 0
        self.changed: dict[str, list[tuple[str, int]]] = {}

    async def find_first_stream_ordering_after_ts(self, ts: int) -> int:
        self.looked_up += 1
        return self.hour_began

    async def get_sliding_sync_membership_changes(
        self, user_id: str, after: RoomStreamToken, up_to: RoomStreamToken
    ) -> dict[str, object]:
        changes = self.changed.get(user_id, [])
        return {room_id: None for room_id, at in changes if after.stream < at}


class World:
    def __init__(self) -> None:
        self.process = cast(Any, Process())
        self.store = self.process.store = Store()
        for columns in (
            "local_current_membership (room_id, user_id, membership, event_stream_ordering)",
            "room_memberships (event_id, membership)",
            "current_state_delta_stream"
            " (room_id, instance_name, stream_id, type, state_key, event_id, prev_event_id)",
        ):
            self.process.database.execute(f"CREATE TABLE {columns}")
        self.joined = SynapseJoinedRooms(self.process, WRITERS)
        self.last: dict[tuple[str, str], str] = {}
        self.at = 0

    def change(self, room_id: str, membership: str = "join", user_id: str = ME) -> None:
        """A member event of the user, persisted by the one or the other writer."""
        self.at += 1
        writer, event_id = WRITERS[self.at % 2], f"$event-{self.at}"
        before = self.last.get((room_id, user_id))
        self.last[room_id, user_id] = event_id
        execute = self.process.database.execute
        execute("INSERT INTO room_memberships VALUES (?, ?)", (event_id, membership))
        execute(
            "INSERT INTO current_state_delta_stream VALUES (?, ?, ?, 'm.room.member', ?, ?, ?)",
            (room_id, writer, self.at, user_id, event_id, before),
        )
        execute(
            "DELETE FROM local_current_membership WHERE room_id = ? AND user_id = ?",
            (room_id, user_id),
        )
        execute(
            "INSERT INTO local_current_membership VALUES (?, ?, ?, ?)",
            (room_id, user_id, membership, self.at),
        )
        self.store.changed.setdefault(user_id, []).append((room_id, self.at))

    def within_the_hour(self, room_ids: Collection[str], up_to: int) -> set[str]:
        token = RoomStreamToken(stream=up_to)
        found: set[str] = done(self.joined.joined_within_the_hour(ME, {*room_ids}, token))
        return found

    def after(self, position: Position, room_ids: Collection[str]) -> set[str]:
        token = RoomStreamToken(stream=self.at)
        found: set[str] = done(self.joined.joined_after(ME, {*room_ids}, position, token))
        return found


ROOMS = ("!old", "!new", "!renamed", "!back", "!left", "!yours")


@pytest.mark.requirement("D5")
def test_joins_are_told_from_other_changes() -> None:
    world = World()
    for room_id in ("!old", "!renamed", "!back", "!left"):
        world.change(room_id)
    world.store.hour_began = world.at + 1
    before = Position(world.at)
    world.change("!new")
    world.change("!renamed")  # a join after a join
    for membership in ("leave", "join"):
        world.change("!back", membership)
    world.change("!left", "leave")
    world.change("!yours", user_id=YOU)
    assert world.within_the_hour(ROOMS, world.at) == world.after(before, ROOMS) == {"!new", "!back"}
    assert world.within_the_hour(["!new"], world.at) == world.after(before, ["!new"]) == {"!new"}
    # "!back" was joined again only after the first of these.
    assert world.within_the_hour(ROOMS, before.stream_id + 1) == {"!new"}


@pytest.mark.requirement("D5", "E2")
def test_a_writer_may_be_further_than_others() -> None:
    world = World()
    for room_id in ("!first", "!second"):
        world.change(room_id)
    by_writer = {WRITERS[1]: "!first", WRITERS[0]: "!second"}
    for writer, room_id in by_writer.items():
        other = ({*by_writer.values()} - {room_id}).pop()
        assert world.after(Position(0, {writer: 2}), by_writer.values()) == {other}
    shown = world.joined.shown_by(
        SimpleNamespace(
            room_key=RoomStreamToken(stream=1, instance_map=immutabledict({WRITERS[0]: 2})),
            un_partial_stated_rooms_key=7,
            account_data_key=8,
        )
    )
    assert shown == Shown(Position(1, {WRITERS[0]: 2}), 7, 8)


@pytest.mark.requirement("H3")
def test_where_the_hour_began_is_looked_up_once_a_minute() -> None:
    world = World()
    for _ in range(5_000):
        assert world.within_the_hour(ROOMS, world.at) == set()
    assert world.store.looked_up == 1
    world.process.pass_ms(2 * MINUTE_MS)
    assert world.within_the_hour(ROOMS, world.at) == set()
    assert world.store.looked_up == 2


@pytest.mark.requirement("H3")
def test_who_has_changed_nothing_costs_no_query() -> None:
    world = World()
    world.change("!old")
    before = world.process.transactions
    assert world.after(Position(world.at), ROOMS) == set()
    assert world.process.transactions == before
