"""A room that is deleted leaves nothing behind that waits, and fails nothing (H1, H3).

The store, its database and its constraints are the real ones.
"""

from typing import Any

import pytest
from synapse.types import RoomID

from synapse_sticky.handlers.joins.synapse import SynapseFederation
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.homeserver.rooms import Rooms
from tests.unit.test_delivery import ROOMS, World, world  # noqa: F401  # a fixture
from tests.unit.test_joins import HOUR_MS, NOW_MS, Here, start
from tests.unit.test_limits import done

DELETED = "!deleted:here"


def backlog(homeserver: World) -> set[str]:
    def read_txn(txn: Any) -> set[str]:
        txn.execute("SELECT room_id FROM destination_rooms_sticky_events_backlog")
        return {room_id for (room_id,) in txn.fetchall()}

    found: set[str] = homeserver._transact(read_txn)
    return found


@pytest.mark.requirement("H1", "H3")
def test_a_backlog_transaction_of_a_deleted_room_fails_nothing(
    world: World,  # noqa: F811
) -> None:
    federation = SynapseFederation(world.process, Rooms(world.process))
    with world.example():
        with pytest.raises(Exception, match=r"(?i)foreign key"):
            done(
                world.store.mark_backlogged_sticky_events_sent(
                    "there", RoomID.from_string(DELETED), 5
                )
            )

        async def nothing(destination: str, limit: int) -> None: ...

        federation.serve_backlog_from(nothing)
        for room_id in (DELETED, ROOMS[0]):
            sent = world.store.mark_backlogged_sticky_events_sent(
                "there", RoomID.from_string(room_id), 5
            )
            done(sent)
        assert backlog(world) == {ROOMS[0]}


@pytest.mark.requirement("H1", "H3", "P3")
def test_a_join_of_a_room_that_is_deleted_since_holds_up_no_other(
    world: World,  # noqa: F811
) -> None:
    """The state changes of a room outlive the room."""
    federation = SynapseFederation(world.process, Rooms(world.process))
    newcomers = NewcomerTable(world.process)
    with world.example():
        done(migrate(world.process, newcomers))
        joins = [("there", DELETED), ("there", ROOMS[1])]
        done(newcomers.record_joins(7, joins, NOW_MS, federation.add_backlog_txn))
        assert ROOMS[1] in backlog(world)
        assert DELETED not in backlog(world)
        done(newcomers.forget_room(DELETED))
        assert [newcomer.room_id for newcomer in done(newcomers.newcomers())] == [ROOMS[1]]


class Purging(Here):
    """The homeserver, whose table is asked to forget rooms."""

    def __init__(self) -> None:
        super().__init__(NOW_MS + HOUR_MS, [12])
        self.is_in = True
        self.forgotten: list[str] = []

    async def is_in_room(self, room_id: str) -> bool:
        return self.is_in

    async def forget_room(self, room_id: str) -> None:
        self.forgotten.append(room_id)


@pytest.mark.requirement("H3", "P3")
def test_newcomers_of_a_deleted_room_are_forgotten() -> None:
    here = Purging()
    start(here)
    here.callbacks["on_room_purged"]("!room")
    assert here.forgotten == [], "its history alone was purged"
    assert done(here.callbacks["serve_backlog_from"]("there", 50)).event_ids == ["$12"]
    here.is_in = False
    here.callbacks["on_room_purged"]("!room")
    assert here.forgotten == ["!room"]
    here.clock_ms += HOUR_MS
    assert done(here.callbacks["serve_backlog_from"]("there", 50)) is None
    assert here.settled == []
