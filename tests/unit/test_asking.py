"""What of a newcomer's answers is believed, and where the events are that it is asked for (P7)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synapse.api.room_versions import RoomVersions
from synapse.events import make_event_from_dict

from synapse_sticky.handlers.joins.confirmation.asking import AnswerKind, Place
from synapse_sticky.handlers.joins.confirmation.synapse import SynapseAsking
from tests.unit.members import Change, Member, ThisProcess, World

ROOM = "!a"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(Path(tmp_path_factory.mktemp("asking")), None)
    users = [f"@user{number}:here" for number in range(6)]
    changes = [Change(n, ROOM, user, "join", n, depth=6 + n) for n, user in enumerate(users, 1)]
    made.put(changes, [Member(ROOM, user, n) for n, user in enumerate(users, 1)])
    yield made
    made.close()


def pdu(sender: str, depth: int) -> dict[str, Any]:
    return {
        "type": "m.room.message",
        "room_id": ROOM,
        "sender": sender,
        "content": {},
        "depth": depth,
        "prev_events": [],
        "auth_events": [],
        "origin_server_ts": depth,
        "hashes": {"sha256": ""},
        "signatures": {},
    }


@pytest.mark.requirement("P7", "H3")
def test_an_answer_says_what_it_has_and_how_far_it_goes(world: World, process: ThisProcess) -> None:
    asking: Any = SynapseAsking(process)
    pdus = [pdu("@alice:here", 9), pdu("@bob:there", 8), pdu("@alice:here", 7)]
    ids = [make_event_from_dict(one, room_version=RoomVersions.V11).event_id for one in pdus]
    given: list[Any] = pdus

    async def get_json(destination: str, **options: Any) -> Any:
        return {"pdus": given}

    asking._client.get_json = get_json

    def ask(limit: int) -> Any:
        return world.drive(asking.has_events("there", ROOM, [ids[0]], limit))

    answer = ask(10)
    assert (answer.kind, answer.event_ids, answer.down_to) == (AnswerKind.SAYS, {*ids}, 0)
    # As many as it may have: it may have left out what is not deeper than the last.
    assert ask(3).down_to == 7
    # What goes beyond that is not looked at.
    assert (ask(2).event_ids, ask(2).down_to) == ({*ids[:2]}, 8)
    given = [None, [], "", {"depth": "7"}, {"depth": None, "sender": 5}, pdus[0]]
    answer = ask(len(given))
    assert (answer.kind, answer.event_ids - {""}, answer.down_to) == (AnswerKind.SAYS, {ids[0]}, 0)


@pytest.mark.requirement("P7", "H3")
def test_where_events_are(world: World, process: ThisProcess) -> None:
    """Of those that refer to an event, a few are enough. Others choose how many there are."""
    rows = world.execute("SELECT event_id FROM events ORDER BY depth")
    event_id, *later = [event_id for (event_id,) in rows]
    asking = SynapseAsking(process)
    assert world.drive(asking.places([event_id, "$other"])) == {event_id: Place(7, [])}
    for other in later:
        insert = "INSERT INTO event_edges (event_id, prev_event_id) VALUES (?, ?)"
        world.execute(insert, other, event_id)
    (place,) = world.drive(asking.places([event_id])).values()
    assert len(place.referring) == 3
    assert {*place.referring} < {*later}
