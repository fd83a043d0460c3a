"""A room is known before it is joined for the first time (F3, L3)."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from synapse.api.errors import NotFoundError
from synapse.api.room_versions import RoomVersion, RoomVersions
from synapse.events import EventBase, make_event_from_dict

from synapse_sticky.handlers.staging.first_joins.synapse import FirstJoins
from tests.unit.members import HERE, ThisProcess, World

pytestmark = pytest.mark.requirement("F3", "L3")

ROOM = "!room:there"
ALICE, BOB = "@alice:there", f"@bob:{HERE}"


class Residents:
    """What the room's servers answer to a join, and what this server knows when they are asked."""

    def __init__(self, world: World, client: Any) -> None:
        self._world = world
        self._client = client
        self.error: Exception | None = None
        self.known: list[str | None] = []

    async def send_join(
        self, destinations: Any, pdu: EventBase, room_version: Any, partial_state: bool = True
    ) -> Any:
        try:
            version: RoomVersion = await self._world.store.get_room_version(pdu.room_id)
            self.known.append(version.identifier)
        except NotFoundError:
            self.known.append(None)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(partial_state=partial_state)

    def answer(self, version: RoomVersion = RoomVersions.V11) -> Any:
        """What a join comes to, as the client has it sent."""
        join = event("m.room.member", BOB, state_key=BOB, content={"membership": "join"})
        return self._world.drive(
            self._client.send_join(["there"], join, version, partial_state=True)
        )

    def enter(self, version: RoomVersion = RoomVersions.V11) -> list[tuple[Any, ...]]:
        """What Synapse does with the answer. Gives the room's row."""
        create = event("m.room.create", ALICE, state_key="", content={"creator": ALICE})
        self._world.drive(
            self._world.store.upsert_room_on_join(
                room_id=ROOM, room_version=version, state_events=[create]
            )
        )
        sql = "SELECT room_version, creator, has_auth_chain_index FROM rooms WHERE room_id = ?"
        return self._world.execute(sql, ROOM)


def event(kind: str, sender: str, **fields: Any) -> EventBase:
    rest = {"auth_events": [], "prev_events": [], "depth": 1, "hashes": {}, "signatures": {}}
    named = {"room_id": ROOM, "type": kind, "sender": sender, "origin_server_ts": 1, **fields}
    return make_event_from_dict({**rest, **named}, RoomVersions.V11)


@pytest.fixture
def residents(world: World, process: ThisProcess) -> Iterator[Residents]:
    client: Any = world.hs.get_federation_client()
    made = Residents(world, client)
    client.send_join = made.send_join
    world.store.get_room_version_id.invalidate_all()
    yield made
    process.undo_to(0)
    del client.send_join


def test_it_is_known_when_the_join_is_sent(process: ThisProcess, residents: Residents) -> None:
    residents.answer()
    assert residents.known == [None], "without"
    FirstJoins(process).install()
    assert residents.answer().partial_state
    assert residents.known == [None, "11"]


@pytest.mark.parametrize("version", [RoomVersions.V1, RoomVersions.V10, RoomVersions.V12])
def test_its_row_is_the_one_that_synapse_makes(
    world: World, process: ThisProcess, residents: Residents, version: RoomVersion
) -> None:
    residents.answer(version)
    by_synapse = residents.enter(version)
    world.execute("DELETE FROM rooms WHERE room_id = ?", ROOM)
    world.store.get_room_version_id.invalidate_all()
    FirstJoins(process).install()
    residents.answer(version)
    assert residents.enter(version) == by_synapse == [(version.identifier, ALICE, True)]


@pytest.mark.requirement("H1")
def test_a_room_that_is_known_stays_as_it_is(
    world: World, process: ThisProcess, residents: Residents
) -> None:
    FirstJoins(process).install()
    made = "INSERT INTO rooms (room_id, room_version, creator, is_public) VALUES (?, ?, ?, TRUE)"
    world.execute(made, ROOM, "11", "@carol:there")
    residents.answer()
    residents.enter()
    assert world.execute("SELECT creator FROM rooms") == [("@carol:there",)]


@pytest.mark.requirement("H1")
def test_a_join_that_fails_can_be_tried_again(process: ThisProcess, residents: Residents) -> None:
    FirstJoins(process).install()
    residents.error = OSError("the resident is away")
    with pytest.raises(OSError, match="away"):
        residents.answer()
    residents.error = None
    residents.answer()
    assert residents.enter() == [("11", ALICE, True)]


@pytest.mark.requirement("H1")
def test_a_room_that_cannot_be_entered_is_joined_all_the_same(
    world: World,
    process: ThisProcess,
    residents: Residents,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(**arguments: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(world.store, "maybe_store_room_on_outlier_membership", fail)
    FirstJoins(process).install()
    assert residents.answer().partial_state
    assert caplog.text.count("Could not enter !room:there before it is joined") == 1
    process.failing = "name_creator"
    assert residents.enter() == [("11", ALICE, True)]
    assert caplog.text.count("Could not note who made !room:there") == 1
