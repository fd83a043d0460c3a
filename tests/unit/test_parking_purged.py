"""A room that is deleted leaves no parked PDU behind that takes another's place (L3, H3).

The homeserver, its database and what it does to delete a room are the real ones.
"""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest
from synapse.app.homeserver import SynapseHomeServer

from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.parking import places
from synapse_sticky.handlers.staging.parking.handler import ParkingHandler
from synapse_sticky.handlers.staging.parking.origins.synapse import SynapseOrigins
from synapse_sticky.handlers.staging.parking.pdus import Outcome, ParkedPdu
from synapse_sticky.handlers.staging.parking.synapse import SynapseStaging
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.handlers.staging.parking.writing import ToPark
from synapse_sticky.handlers.staging.pdu import StagedPdu
from synapse_sticky.homeserver.received import Received
from synapse_sticky.homeserver.rooms import Rooms
from synapse_sticky.index.synapse import SynapseStickyStream
from tests.unit.staging import CountingStore, prepared
from tests.unit.test_limits_in_synapse import HOUR_MS, done
from tests.unit.test_parking_counts import dropped

DELETED, KEPT = "!deleted:there", "!kept:there"
ORIGIN, LIMIT = "there", 3


@pytest.fixture(scope="module")
def hs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SynapseHomeServer]:
    with prepared("sqlite", tmp_path_factory.mktemp("homeserver")) as hs:
        yield hs


@pytest.fixture
def store(hs: SynapseHomeServer) -> Iterator[CountingStore]:
    with closing(CountingStore(hs)) as store:
        for room_id in (DELETED, KEPT):
            store.sql("INSERT INTO rooms (room_id, is_public) VALUES (?, FALSE)", room_id)
        yield store
        store.sql("DELETE FROM synapse_sticky_incomplete")
        store.sql("DELETE FROM rooms")


class Parking:
    """The duty, with nothing parked."""

    def __init__(self, store: CountingStore) -> None:
        self.store, self.held, self.table = store, Held(), ParkedTable(store)
        self.held.is_heeded = True
        staging = SynapseStaging(store, self.held, Received(store))
        rooms, origins, stream = Rooms(store), SynapseOrigins(store), SynapseStickyStream(store)
        self.handler = ParkingHandler(store, rooms, staging, origins, self.table, self.held, stream)
        self.handler.install()

    def park(self, room_id: str, number: int) -> Outcome:
        pdu = ParkedPdu(ORIGIN, f"${room_id}{number}", room_id, "{}", "{}", ("$before",))
        now_ms = self.store.now_ms()
        parked: tuple[Outcome, object] = done(self.table.park(pdu, now_ms + HOUR_MS, now_ms))
        return parked[0]

    def parked(self) -> list[str]:
        rows = self.store.sql("SELECT room_id FROM synapse_sticky_incomplete ORDER BY room_id")
        return [room_id for (room_id,) in rows]


@pytest.fixture
def parking(store: CountingStore, monkeypatch: pytest.MonkeyPatch) -> Parking:
    monkeypatch.setattr(places, "MOST_OF_SERVER", LIMIT)
    return Parking(store)


@pytest.mark.requirement("L3", "H3")
def test_pdus_of_a_deleted_room_take_no_places(
    store: CountingStore, parking: Parking, caplog: pytest.LogCaptureFixture
) -> None:
    done(parking.handler.load())
    caplog.set_level(logging.INFO)
    before = dropped("purged", store.server_name)
    for number in range(LIMIT):
        assert parking.park(DELETED, number) is Outcome.PARKED
    assert parking.park(KEPT, 0) is Outcome.FULL
    done(store.store.purge_room(DELETED))
    assert parking.parked() == []
    assert dropped("purged", store.server_name) == before + LIMIT
    assert f"Forgot {LIMIT} parked PDUs of {DELETED}, which is gone here" in caplog.messages
    assert parking.park(KEPT, 0) is Outcome.PARKED


@pytest.mark.requirement("L3", "H3")
def test_a_deletion_that_was_not_heard_of(store: CountingStore, parking: Parking) -> None:
    """Such as one during a restart. It is found when the PDUs are due."""
    done(parking.handler.load())
    parking.park(DELETED, 0)
    parking.park(KEPT, 0)
    store.sql("DELETE FROM rooms WHERE room_id = ?", DELETED)
    done(parking.handler._trying.try_due())
    assert parking.parked() == [KEPT]


@pytest.mark.requirement("L3", "P7")
def test_pdus_of_a_room_that_is_being_joined_stay(store: CountingStore, parking: Parking) -> None:
    """This server is not in the room yet. Its history may be purged, too."""
    done(parking.handler.load())
    parking.park(KEPT, 0)
    store.store._invalidate_caches_for_room_events(KEPT)
    done(parking.handler._trying.try_due())
    assert parking.parked() == [KEPT]


@pytest.mark.requirement("L3", "H3")
def test_what_waits_for_the_table_is_forgotten_as_well(
    store: CountingStore, parking: Parking, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(parking.handler.load())
    park = ParkedTable.park

    async def cannot(*args: object, **options: object) -> Outcome:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(ParkedTable, "park", cannot)
    for room_id in (DELETED, KEPT):
        pdu = ParkedPdu(ORIGIN, f"${room_id}", room_id, "{}", "{}", ("$before",))
        sticky = {"duration_ms": HOUR_MS}
        staged = StagedPdu(pdu.event_id, sticky, store.now_ms(), store.now_ms())
        done(parking.handler._writer.park(ToPark(pdu, staged, "a reason")))
    assert sorted(parking.held.rooms().values()) == [DELETED, KEPT]
    done(store.store.purge_room(DELETED))
    assert [*parking.held.rooms().values()] == [KEPT]
    monkeypatch.setattr(ParkedTable, "park", park)
    done(parking.handler._writer._write_waiting())
    assert parking.parked() == [KEPT]
