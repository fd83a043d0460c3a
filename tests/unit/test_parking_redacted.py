"""Parked PDUs of a sender who is redacted give up their places (S5, L3).

The homeserver and its database are the real ones, of either kind.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from synapse.app.homeserver import SynapseHomeServer

from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.parking import redacted
from synapse_sticky.handlers.staging.parking.handler import ParkingHandler
from synapse_sticky.handlers.staging.parking.origins.synapse import SynapseOrigins
from synapse_sticky.handlers.staging.parking.pdus import ParkedPdu
from synapse_sticky.handlers.staging.parking.synapse import SynapseStaging
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.homeserver.received import Received
from synapse_sticky.homeserver.rooms import Rooms
from synapse_sticky.index.synapse import SynapseStickyStream
from tests.unit.staging import CountingStore, prepared
from tests.unit.test_limits_in_synapse import HOUR_MS, done
from tests.unit.test_parking_counts import dropped

pytestmark = pytest.mark.requirement("S5", "L3")

ROOM, OTHER, THERE = "!room:there", "!other:there", "there"
# With what LIKE and JSON have signs of their own for.
MALLORY, BOB, ODD = "@mallory_a%:there", "@mallory-ab:there", '@é"\\!:there'


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def hs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SynapseHomeServer]:
    with prepared(request.param, tmp_path_factory.mktemp("homeserver")) as hs:
        yield hs


@pytest.fixture
def store(hs: SynapseHomeServer) -> Iterator[CountingStore]:
    with closing(CountingStore(hs)) as store:
        for room_id in (ROOM, OTHER):
            store.sql("INSERT INTO rooms (room_id, is_public) VALUES (?, FALSE)", room_id)
        yield store
        for table in ("synapse_sticky_incomplete", "rooms", "room_ban_redactions"):
            store.sql(f"DELETE FROM {table}")


class Parking:
    """The duty, with whatever a test parks."""

    def __init__(self, store: CountingStore) -> None:
        self.store, self.table, held = store, ParkedTable(store), Held()
        staging, origins = SynapseStaging(store, held, Received(store)), SynapseOrigins(store)
        stream = SynapseStickyStream(store)
        self.handler = ParkingHandler(
            store, Rooms(store), staging, origins, self.table, held, stream
        )
        self.handler.install()
        done(self.handler.load())
        self.senders = self.handler._redacted
        # As in a process that receives transactions.
        self.senders.load()

    def park(self, number: int, sender: str, room_id: str = ROOM, **content: Any) -> str:
        event_id = f"${number}"
        pdu = {"sender": sender, "content": content, "room_id": room_id}
        text = json.dumps(pdu, separators=(",", ":"))
        now_ms = self.store.now_ms()
        parked = ParkedPdu(THERE, event_id, room_id, text, "{}", ())
        done(self.table.park(parked, now_ms + HOUR_MS, now_ms))
        return event_id

    def parked(self) -> list[str]:
        rows = self.store.sql("SELECT event_id FROM synapse_sticky_incomplete ORDER BY event_id")
        return [event_id for (event_id,) in rows]

    def redact(self, user_id: str, until: int | None = None, room_id: str = ROOM) -> None:
        self.store.sql(
            "INSERT INTO room_ban_redactions"
            " (room_id, user_id, redacting_event_id, redact_end_ordering) VALUES (?, ?, '$ban', ?)",
            *(room_id, user_id, until),
        )
        self.senders.note(room_id, user_id)

    def pass_a_moment(self) -> None:
        done(self.senders._forgetting.run())


@pytest.fixture
def parking(store: CountingStore) -> Parking:
    return Parking(store)


def test_those_of_the_sender_in_the_room_alone(parking: Parking) -> None:
    before = dropped("redacted", parking.store.server_name)
    parking.park(1, MALLORY)
    kept = [
        parking.park(2, BOB),
        parking.park(3, BOB, quoted={"sender": MALLORY}),
        parking.park(4, MALLORY, OTHER),
    ]
    parking.redact(MALLORY)
    parking.pass_a_moment()
    assert parking.parked() == kept
    assert dropped("redacted", parking.store.server_name) == before + 1


def test_a_name_of_any_signs(parking: Parking) -> None:
    parking.park(1, ODD)
    kept = parking.park(2, BOB)
    parking.redact(ODD)
    parking.pass_a_moment()
    assert parking.parked() == [kept]


def test_not_after_the_redaction_has_ended(parking: Parking) -> None:
    kept = parking.park(1, MALLORY)
    parking.redact(MALLORY, until=7)
    # A message about somebody else, and one about an erased user.
    parking.senders.note(ROOM, BOB)
    parking.senders.note("", BOB)
    parking.pass_a_moment()
    assert parking.parked() == [kept]


@pytest.mark.requirement("H3")
def test_a_few_at_a_time(parking: Parking, store: CountingStore) -> None:
    users = [f"@mallory{number}:there" for number in range(3 * redacted.MOST_AT_ONCE)]
    for number, user_id in enumerate(users):
        parking.park(number, user_id)
        parking.redact(user_id)
    for left in (10, 5, 0):
        parking.pass_a_moment()
        assert len(parking.parked()) == left
    # Strangers choose how many there are.
    for number in range(3_000):
        parking.senders.note(ROOM, f"@{number}:there")
    assert len(parking.senders._redacted) == 1_000
