"""An event's stickiness counts from when this server first had it (S2).

A homeserver that is real but for its reactor, and whose clock stands still until it is set.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any, cast

import pytest
from synapse.app.homeserver import SynapseHomeServer
from synapse.events import EventBase
from synapse.replication.http.federation import ReplicationFederationSendEventsRestServlet

from synapse_sticky.handlers.deferral.synapse import SynapseWriter
from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.parking.pdus import ParkedPdu
from synapse_sticky.handlers.staging.parking.synapse import SynapseStaging
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.handlers.staging.received import synapse
from synapse_sticky.handlers.staging.received.handler import ReceivedHandler
from synapse_sticky.handlers.staging.received.synapse import SynapseReceiving, note_handed_on
from synapse_sticky.handlers.staging.turns.synapse import SynapseTurns
from synapse_sticky.homeserver import Cursor, Homeserver, received
from synapse_sticky.homeserver.causes import Verdict
from synapse_sticky.homeserver.received import Received
from synapse_sticky.index.stream import StickyRow
from synapse_sticky.index.synapse import SynapseStickyStream
from tests.unit.test_limits_in_synapse import (
    FIELD,
    HOUR_MS,
    ROOM,
    Deferring,
    done,
    enter_event,
    insert,
    make_homeserver,
    run_sql,
    sticky_event,
    stream,
)

pytestmark = pytest.mark.usefixtures("restored")

ORIGIN, OTHER = "there", "elsewhere"
MINUTE_MS = 60_000
AHEAD_MS = 3 * HOUR_MS


class Stopped(Homeserver):
    """Its clock is Synapse's, which a test sets."""

    def __init__(self, hs: SynapseHomeServer) -> None:
        super().__init__(hs.get_module_api())
        self.brief = 0
        self._reactor: Any = hs.get_reactor()

    async def transact_briefly(self, what: str, function: Any, *args: Any) -> Any:
        self.brief += 1
        return await super().transact_briefly(what, function, *args)

    @property
    def now(self) -> int:
        return int(self._reactor.seconds() * 1_000)

    @now.setter
    def now(self, ms: int) -> None:
        self._reactor.rightNow = ms / 1_000

    def now_ms(self) -> int:
        return self.now


@pytest.fixture(scope="module")
def hs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SynapseHomeServer]:
    hs = make_homeserver(tmp_path_factory.mktemp("homeserver"))
    yield hs
    for connection in hs.get_datastores().main.db_pool._db_pool.connections.values():
        connection.close()


@pytest.fixture
def homeserver(hs: SynapseHomeServer) -> Iterator[Stopped]:
    homeserver = Stopped(hs)
    with closing(homeserver):
        yield homeserver
    for table in ("events", "event_json", "sticky_events", "federation_inbound_events_staging"):
        run_sql(homeserver, f"DELETE FROM {table}")
    run_sql(homeserver, "DROP TABLE IF EXISTS synapse_sticky_incomplete")
    run_sql(homeserver, "DROP TABLE IF EXISTS synapse_sticky_layouts")


class Process:
    """What a process does with PDUs of others; ``processed`` is all that Synapse does with them."""

    def __init__(self, homeserver: Stopped) -> None:
        self.homeserver, self.received = homeserver, Received(homeserver)
        self.table = ParkedTable(homeserver)
        self.processed: list[str] = []
        self.fails: Exception | None = None
        self.handler: Any = homeserver.hs.get_federation_event_handler()
        self.failed: list[int] = []

        async def on_receive_pdu(origin: str, pdu: EventBase) -> None:
            self.processed.append(pdu.event_id)
            if self.fails is not None:
                raise self.fails

        async def _process_pulled_events(origin: str, events: Any, backfilled: bool) -> None:
            self.processed += [event.event_id for event in events]

        homeserver.replace(self.handler, "on_receive_pdu", lambda _: on_receive_pdu)
        homeserver.replace(self.handler, "_process_pulled_events", lambda _: _process_pulled_events)
        self.staging = SynapseStaging(homeserver, Held(), self.received)

        async def fail(pdu: Any, staged: Any, why: str, verdict: Verdict) -> None:
            self.failed.append(staged.until_ms())

        self.staging.park_by(fail)
        receiving = SynapseReceiving(homeserver, self.received)
        self.times = ReceivedHandler(homeserver, receiving, self.received, self.table)
        self.times.install()
        self.turns = SynapseTurns(homeserver, Held())
        self.turns.tell_chosen(self.times.note_chosen_txn)

    def receive(self, event: EventBase, origin: str = ORIGIN) -> None:
        """As it is taken out of the staging area."""
        done(self.handler.on_receive_pdu(origin, event))

    def chosen(self, event: EventBase, origin: str = ORIGIN) -> None:
        """As Synapse asks for the next PDU of the room."""
        self.turns.choose_by(lambda txn, room_id: (origin, event.event_id))
        store: Any = self.homeserver.store
        assert done(store.get_next_staged_event_id_for_room(ROOM)) == (origin, event.event_id)

    def note_chosen(self, event_id: str) -> None:
        def note_txn(txn: Cursor) -> None:
            self.times.note_chosen_txn(txn, ORIGIN, event_id, self.homeserver.now)

        done(self.homeserver.transact("note", note_txn))

    def stage(self, event: EventBase, origin: str = ORIGIN) -> None:
        run_sql(
            self.homeserver,
            "INSERT INTO federation_inbound_events_staging"
            " (origin, event_id, room_id, received_ts, event_json, internal_metadata)"
            " VALUES (?, ?, ?, ?, ?, '{}')",
            *(origin, event.event_id, ROOM, self.homeserver.now, json.dumps(event.get_dict())),
        )

    def park(self, event: EventBase, origin: str = ORIGIN) -> None:
        now_ms = self.homeserver.now
        pdu = ParkedPdu(origin, event.event_id, ROOM, "{}", "{}", ())
        done(self.table.park(pdu, now_ms + HOUR_MS, now_ms, received_ts_ms=now_ms))

    def expires_ms(self, event: EventBase) -> int | None:
        """Enters the event into the stream. Gives when it expires there; None if it is not."""
        insert(self.homeserver, [event])
        sql = "SELECT expires_at FROM sticky_events WHERE event_id = ?"
        rows = run_sql(self.homeserver, sql, event.event_id)
        return rows[0][0] if rows else None


@pytest.fixture
def process(homeserver: Stopped) -> Process:
    return Process(homeserver)


def from_the_future(homeserver: Stopped) -> EventBase:
    return sticky_event(homeserver, 1, origin_server_ts=homeserver.now + AHEAD_MS)


@pytest.mark.requirement("S2", "L3")
def test_what_was_parked_or_staged_for_long(homeserver: Stopped, process: Process) -> None:
    """The row in the staging area is a new one whenever a parked PDU is tried."""
    done(process.table.prepare())
    event, received_ms = from_the_future(homeserver), homeserver.now
    process.park(event)
    homeserver.now += 58 * MINUTE_MS
    process.stage(event)
    process.receive(event)
    assert process.expires_ms(event) == received_ms + HOUR_MS


@pytest.mark.requirement("S2", "L3")
def test_the_index_has_the_same_time(homeserver: Stopped, hs: SynapseHomeServer) -> None:
    """It does not read again what this process persists."""
    noted: list[StickyRow] = []
    SynapseStickyStream(homeserver).on_persisted(noted.extend)
    process = Process(homeserver)
    event, received_ms = from_the_future(homeserver), homeserver.now
    process.stage(event)
    homeserver.now += 58 * MINUTE_MS
    process.receive(event)
    assert process.expires_ms(event) == received_ms + HOUR_MS
    assert {row.expires_at_ms for row in noted} == {received_ms + HOUR_MS}


@pytest.mark.requirement("S2", "L3")
def test_what_was_staged_for_long(homeserver: Stopped, process: Process) -> None:
    """Also while there is no table of parked PDUs."""
    event, received_ms = from_the_future(homeserver), homeserver.now
    process.stage(event)
    homeserver.now += 58 * MINUTE_MS
    process.receive(event)
    assert process.expires_ms(event) == received_ms + HOUR_MS


@pytest.mark.requirement("S2", "L3")
def test_whoever_sent_it_first(homeserver: Stopped, process: Process) -> None:
    done(process.table.prepare())
    event, received_ms = from_the_future(homeserver), homeserver.now
    process.park(event, OTHER)
    homeserver.now += 30 * MINUTE_MS
    process.stage(event)
    process.receive(event)
    assert process.expires_ms(event) == received_ms + HOUR_MS
    # And if it is parked once more, for this server, it expires when it would have.
    process.fails = sqlite3.OperationalError("database is locked")
    with pytest.raises(sqlite3.OperationalError):
        process.receive(event)
    assert {*process.failed} == {received_ms + HOUR_MS}


@pytest.mark.requirement("S2", "L3", "H1")
def test_what_is_asked_when_it_is_chosen_is_not_asked_again(
    homeserver: Stopped, process: Process
) -> None:
    """Each staged PDU is chosen before it is processed, and that reads its row anyway."""
    done(process.table.prepare())
    event, parked_ms = from_the_future(homeserver), homeserver.now
    process.park(event, OTHER)
    homeserver.now += 30 * MINUTE_MS
    process.stage(event)
    process.chosen(event)
    asked = homeserver.brief
    homeserver.now += MINUTE_MS
    process.receive(event)
    assert homeserver.brief == asked
    assert process.expires_ms(event) == parked_ms + HOUR_MS
    # Once. Whoever else receives it asks.
    process.receive(event)
    process.receive(event, OTHER)
    assert homeserver.brief == asked + 2


@pytest.mark.requirement("S2", "H1", "D7")
def test_a_pdu_is_chosen_if_the_parked_ones_cannot_be_read(
    homeserver: Stopped, process: Process
) -> None:
    done(process.table.prepare())
    run_sql(homeserver, "DROP TABLE synapse_sticky_incomplete")
    # Synapse would take this one.
    process.stage(sticky_event(homeserver, 2), OTHER)
    homeserver.now += MINUTE_MS
    event, received_ms = from_the_future(homeserver), homeserver.now
    process.stage(event)
    homeserver.now += MINUTE_MS
    process.chosen(event)
    process.receive(event)
    assert process.expires_ms(event) == received_ms + HOUR_MS


@pytest.mark.requirement("H1", "L3")
def test_whoever_chooses_waits_for_no_locked_table(homeserver: Stopped, process: Process) -> None:
    """A room would stand for as long, and a connection would be taken. Only Postgres has such."""
    done(process.table.prepare())
    homeserver.is_postgres = True
    asked: list[str] = []

    class Asked:
        def execute(self, sql: str, *_: object) -> None:
            asked.append(sql)

        def fetchall(self) -> list[Any]:
            return []

    process.times.note_chosen_txn(cast(Cursor, Asked()), ORIGIN, "$1", homeserver.now)
    wait, look_up = asked
    assert "lock_timeout" in wait
    assert "synapse_sticky_incomplete" in look_up


@pytest.mark.requirement("H1")
def test_what_is_chosen_and_never_processed_is_forgotten(
    homeserver: Stopped, process: Process
) -> None:
    first = from_the_future(homeserver)
    process.stage(first)
    for number in range(1_001):
        event_id = f"${number}" if number else first.event_id
        process.note_chosen(event_id)
    asked = homeserver.brief
    process.receive(first)
    assert homeserver.brief == asked + 1


@pytest.mark.requirement("S2", "F1")
def test_what_is_fetched_counts_from_the_fetch(homeserver: Stopped, process: Process) -> None:
    """Those before it may take long."""
    event, fetched_ms = from_the_future(homeserver), homeserver.now
    plain = sticky_event(homeserver, 2, **{FIELD: None})
    done(process.handler._process_pulled_events(ORIGIN, [plain, event], backfilled=False))
    assert process.processed == [plain.event_id, event.event_id]
    homeserver.now += 10 * MINUTE_MS
    assert process.expires_ms(event) == fetched_ms + HOUR_MS
    assert process.received.at_ms(plain.event_id) is None


@pytest.mark.requirement("S2", "F1")
@pytest.mark.parametrize("defers", [False, True])
def test_an_outlier_counts_from_when_it_became_one(
    homeserver: Stopped, process: Process, defers: bool
) -> None:
    deferring = Deferring()
    if defers:
        SynapseWriter(homeserver, process.received).defer_by(deferring)
    event, received_ms = from_the_future(homeserver), homeserver.now
    enter_event(homeserver, event)
    run_sql(homeserver, "UPDATE events SET received_ts = ?", received_ms)
    homeserver.now += 20 * MINUTE_MS
    process.receive(event)
    deferring.defers = {event.event_id}
    expires_ms = process.expires_ms(event)
    if defers:
        (new,) = deferring.asked
        expires_ms = new.expires_at_ms
    assert expires_ms == received_ms + HOUR_MS


@pytest.mark.requirement("S2", "S4")
def test_what_has_expired_meanwhile_is_not_entered(homeserver: Stopped, process: Process) -> None:
    event = from_the_future(homeserver)
    process.stage(event)
    homeserver.now += HOUR_MS
    process.receive(event)
    assert process.expires_ms(event) is None
    assert stream(homeserver) == []


@pytest.mark.requirement("S2")
def test_what_was_sent_before_it_was_received_expires_as_ever(
    homeserver: Stopped, process: Process
) -> None:
    event = sticky_event(homeserver, 1, origin_server_ts=homeserver.now - MINUTE_MS)
    process.stage(event)
    process.receive(event)
    assert process.expires_ms(event) == homeserver.now - MINUTE_MS + HOUR_MS


@pytest.mark.requirement("S2", "E2")
def test_the_receiving_process_hands_the_time_on(
    homeserver: Stopped, process: Process, hs: SynapseHomeServer
) -> None:
    event, received_ms = from_the_future(homeserver), homeserver.now
    process.stage(event)
    homeserver.now += 10 * MINUTE_MS
    process.receive(event)

    async def serialize(*_: object) -> dict[str, Any]:
        return {}

    context = SimpleNamespace(serialize=serialize)
    payload = done(
        ReplicationFederationSendEventsRestServlet._serialize_payload(
            store=homeserver.store,
            room_id=ROOM,
            event_and_contexts=[(event, context)],  # type: ignore[list-item]
            backfilled=False,
        )
    )
    persister = Received(homeserver)
    handler = SimpleNamespace(**{synapse._ENTRY: persister})
    note_handed_on(handler, json.loads(json.dumps(payload)))
    assert persister.at_ms(event.event_id) == received_ms
    # One without the module, or of another version, hands nothing on.
    for content in ({}, {synapse._RECEIVED: None}):
        note_handed_on(handler, content)
    note_handed_on(SimpleNamespace(), payload)


@pytest.mark.requirement("S2", "H1")
def test_a_pdu_is_processed_if_the_time_cannot_be_found_out(
    homeserver: Stopped, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object) -> None:
        raise sqlite3.OperationalError("no such table")

    event = from_the_future(homeserver)
    process.stage(event)
    homeserver.now += MINUTE_MS
    monkeypatch.setattr(homeserver, "transact_briefly", fails)
    process.receive(event)
    assert process.processed == [event.event_id]
    assert process.expires_ms(event) == homeserver.now + HOUR_MS


@pytest.mark.requirement("L6", "H3")
def test_what_is_remembered_is_bounded(
    homeserver: Stopped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(received, "_MOST", 2)
    known = Received(homeserver)
    for number in range(5):
        known.note(f"${number}", number)
    assert [known.at_ms(f"${number}") for number in range(5)] == [None, None, None, 3, 4]
    known.note("$3", 7)
    assert known.at_ms("$3") == 3


@pytest.mark.requirement("S2", "H3")
def test_it_is_found_by_an_index(homeserver: Stopped, process: Process) -> None:
    """Whoever sends much makes the look-up no slower."""
    done(process.table.prepare())
    sql = "SELECT name FROM sqlite_master WHERE tbl_name = 'synapse_sticky_incomplete'"
    assert "synapse_sticky_incomplete_event" in {name for (name,) in run_sql(homeserver, sql)}


@pytest.mark.requirement("S2", "H1")
def test_of_an_event_is_asked_once_in_a_transaction(homeserver: Stopped) -> None:
    asked: list[tuple[str, ...]] = []

    class Counted:
        def execute(self, sql: str, args: tuple[str, ...]) -> None:
            asked.append(args)

        def fetchall(self) -> list[Any]:
            return []

    known = Received(homeserver)
    first, second = Counted(), Counted()
    for txn, event_ids in ((first, ["$1", "$2"]), (first, ["$2"]), (second, ["$2"])):
        known.learn_txn(cast(Cursor, txn), event_ids)
    known.learn_txn(cast(Cursor, second), ["$3"])
    assert len(asked) == 3
