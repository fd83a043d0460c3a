"""What the duties with limits put into Synapse: a homeserver that is real but for its reactor."""

import json
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg2
import pytest
from synapse.api.errors import SynapseError
from synapse.api.room_versions import RoomVersions
from synapse.app.homeserver import SynapseHomeServer
from synapse.config.homeserver import HomeServerConfig
from synapse.events import EventBase, make_event_from_dict
from synapse.rest.client.room import RoomSendEventRestServlet, RoomStateEventRestServlet
from synapse.types import UserID, create_requester
from twisted.enterprise.adbapi import ConnectionLost
from twisted.internet.defer import Deferred, ensureDeferred, execute, fail
from twisted.internet.testing import MemoryReactorClock

from synapse_sticky.config import FederationConfig, LimitConfig, Mode
from synapse_sticky.handlers.deferral.handler import NewStickyEvent
from synapse_sticky.handlers.deferral.synapse import SynapseWriter
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.extremities.synapse import SynapseExtremities
from synapse_sticky.handlers.receipt.handler import ReceiptHandler
from synapse_sticky.handlers.receipt.synapse import SynapseReceipt
from synapse_sticky.handlers.sending.handler import LocalSend
from synapse_sticky.handlers.sending.synapse import SynapseSending
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.received import Received
from synapse_sticky.limits import LimitReport, Refusal
from tests.unit.configuration import configuration
from tests.unit.settable import METRICS
from tests.unit.test_causes import of_postgres

FIELD = "msc4354_sticky"
PARAMETER = b"org.matrix.msc4354.sticky_duration_ms"
ROOM = "!room:there"
HOUR_MS = 3_600_000
SOFT_FAILED = {"soft_failed": True}
REFUSAL = Refusal("per_user", 1_500)


class Reactor(MemoryReactorClock):
    """A reactor with no thread but this one, and that never runs."""

    def callFromThread(self, function: Callable[..., object], *args: Any) -> None:  # noqa: N802
        function(*args)


def begin(coroutine: Any) -> list[Any]:
    """Has its result or failure, once there is one."""
    results: list[Any] = []
    ensureDeferred(coroutine).addBoth(results.append)
    return results


def done(coroutine: Any) -> Any:
    """The result of a coroutine that waits for nothing."""
    (result,) = begin(coroutine)
    if hasattr(result, "raiseException"):
        result.raiseException()
    return result


def make_homeserver(folder: Path) -> SynapseHomeServer:
    config = HomeServerConfig()
    config.parse_config_dict(configuration(folder), "", "")
    reactor: Any = Reactor()  # type: ignore[no-untyped-call]
    hs = SynapseHomeServer("here", config=config, reactor=reactor)
    hs.setup()
    run_synchronously(hs)
    return hs


def run_synchronously(hs: SynapseHomeServer) -> None:
    """Has the homeserver's transactions run in this thread, and at once."""
    store: Any = hs.get_datastores().main
    store.USE_DEDICATED_DB_THREADS_FOR_EVENT_FETCHING = False
    pool = store.db_pool._db_pool
    pool.runWithConnection = lambda *args, **options: execute(
        pool._runWithConnection, *args, **options
    )


@pytest.fixture(scope="module")
def hs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SynapseHomeServer]:
    hs = make_homeserver(tmp_path_factory.mktemp("homeserver"))
    yield hs
    for connection in hs.get_datastores().main.db_pool._db_pool.connections.values():
        connection.close()


@pytest.fixture
def homeserver(hs: SynapseHomeServer) -> Iterator[Homeserver]:
    homeserver = Homeserver(hs.get_module_api())
    yield homeserver
    homeserver.close()
    tables = ["events", "event_json", "sticky_events", "federation_inbound_events_staging"]
    for table in tables:
        run_sql(homeserver, f"DELETE FROM {table}")


def run_sql(homeserver: Homeserver, sql: str, *args: object) -> list[tuple[Any, ...]]:
    def run_txn(txn: Cursor) -> list[tuple[Any, ...]]:
        txn.execute(sql, args)
        return txn.fetchall() if sql.startswith("SELECT") else []

    return done(homeserver.transact("test", run_txn))  # type: ignore[no-any-return]


def stream(homeserver: Homeserver) -> list[str]:
    """The event IDs in the sticky events stream."""
    return [e for (e,) in run_sql(homeserver, "SELECT event_id FROM sticky_events ORDER BY 1")]


# Deferral


def sticky_event(
    homeserver: Homeserver,
    number: int,
    metadata: dict[str, Any] | None = None,
    **fields: Any,
) -> EventBase:
    now_ms = homeserver.now_ms()
    event = make_event_from_dict(
        {
            "type": "org.example.call",
            "room_id": ROOM,
            "sender": "@mallory:there",
            "content": {"number": number},
            "origin_server_ts": now_ms + 5_000,
            "depth": number,
            "auth_events": [],
            "prev_events": [],
            "hashes": {},
            "signatures": {},
            FIELD: {"duration_ms": HOUR_MS},
            **fields,
        },
        RoomVersions.V11,
        metadata or {},
    )
    event.internal_metadata.stream_ordering = number
    run_sql(
        homeserver,
        "INSERT INTO event_json (event_id, room_id, internal_metadata, json, format_version)"
        " VALUES (?, ?, '{}', '{}', 3)",
        *(event.event_id, ROOM),
    )
    return event


class Deferring:
    """Defers some of what it is asked for, and remembers that."""

    def __init__(self) -> None:
        self.asked: list[NewStickyEvent] = []
        self.defers: Collection[str] = set()

    def __call__(self, txn: Cursor, events: Sequence[NewStickyEvent]) -> Collection[str]:
        self.asked += events
        return {event.event_id for event in events if event.event_id in self.defers}


@pytest.fixture
def deferring(homeserver: Homeserver) -> Deferring:
    deferring = Deferring()
    writer = SynapseWriter(homeserver, Received(homeserver))
    assert writer.handles(ROOM)
    writer.defer_by(deferring)
    return deferring


def enter_event(homeserver: Homeserver, event: EventBase) -> None:
    """As Synapse has it of an event that it has persisted."""
    row = {
        "event_id": event.event_id,
        "room_id": event.room_id,
        "stream_ordering": event.internal_metadata.stream_ordering,
        "topological_ordering": event.depth,
        "depth": event.depth,
        "type": event.type,
        "processed": True,
        "outlier": False,
    }
    done(homeserver.store.db_pool.simple_insert("events", row))


def insert(homeserver: Homeserver, events: list[EventBase]) -> None:
    done(homeserver.transact("test", homeserver.store.insert_sticky_events_txn, events))


@pytest.mark.requirement("L4", "S2")
def test_a_deferred_event_enters_the_stream_later(
    homeserver: Homeserver, deferring: Deferring
) -> None:
    first, second = sticky_event(homeserver, 1), sticky_event(homeserver, 2)
    deferring.defers = {second.event_id}
    now_ms = homeserver.now_ms()
    insert(homeserver, [first, second])
    assert stream(homeserver) == [first.event_id]
    assert [event.event_id for event in deferring.asked] == [first.event_id, second.event_id]
    # A time of sending in the future prolongs nothing.
    assert all(0 <= event.expires_at_ms - now_ms - HOUR_MS < 5_000 for event in deferring.asked)
    sql = "SELECT event_id, room_id, sender, expires_at, event_stream_ordering FROM sticky_events"
    assert run_sql(homeserver, sql) == [
        (first.event_id, ROOM, "@mallory:there", deferring.asked[0].expires_at_ms, 1)
    ]
    enter_txn = SynapseWriter(homeserver, Received(homeserver)).enter_txn
    gone = NewStickyEvent("$gone", ROOM, "@mallory:there", now_ms, 3)
    # The first is there already.
    for _ in range(2):
        done(homeserver.transact("test", enter_txn, [*reversed(deferring.asked), gone]))
        assert stream(homeserver) == sorted([first.event_id, second.event_id])
    assert run_sql(homeserver, f"{sql} WHERE event_id = ?", second.event_id) == [
        (second.event_id, ROOM, "@mallory:there", deferring.asked[1].expires_at_ms, 2)
    ]


@pytest.mark.requirement("L4", "S1", "S2")
def test_only_deliverable_events_are_deferred(homeserver: Homeserver, deferring: Deferring) -> None:
    ago = homeserver.now_ms() - 2 * HOUR_MS
    metadata: list[dict[str, Any]] = [
        SOFT_FAILED,
        {"policy_server_spammy": True},
        {"spam_checker_spammy": True},
    ]
    fields: list[dict[str, Any]] = [{"origin_server_ts": ago}, {FIELD: {"duration_ms": -1}}]
    events = [sticky_event(homeserver, n, m) for n, m in enumerate(metadata, start=10)]
    events += [sticky_event(homeserver, n, **f) for n, f in enumerate(fields, start=20)]
    outlier = sticky_event(homeserver, 29)
    outlier.internal_metadata.outlier = True
    rejected = make_event_from_dict(
        sticky_event(homeserver, 30).get_dict(), RoomVersions.V11, rejected_reason="test"
    )
    deliverable = sticky_event(homeserver, 31)
    insert(homeserver, [*events, outlier, rejected, deliverable])
    assert [event.event_id for event in deferring.asked] == [deliverable.event_id]
    assert stream(homeserver) == sorted([events[0].event_id, deliverable.event_id])


@pytest.mark.requirement("L4")
def test_an_event_is_deferred_once_it_is_not_soft_failed_any_more(
    homeserver: Homeserver, deferring: Deferring
) -> None:
    first, second = (sticky_event(homeserver, n, SOFT_FAILED) for n in (1, 2))
    insert(homeserver, [first, second])
    for event in (first, second):
        enter_event(homeserver, event)
    assert deferring.asked == []
    deferring.defers = {first.event_id}
    ids = {first.event_id, second.event_id}
    done(homeserver.transact("test", homeserver.store.un_soft_fail_sticky_events_txn, ids))
    assert {event.event_id for event in deferring.asked} == ids
    assert stream(homeserver) == [second.event_id]


@pytest.mark.requirement("L4")
def test_events_that_cannot_be_read_are_delivered(
    homeserver: Homeserver, deferring: Deferring, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = sticky_event(homeserver, 1)
    with monkeypatch.context() as patched:
        patched.setattr(homeserver, "now_ms", lambda: None)
        insert(homeserver, [event])
    assert deferring.asked == []
    assert stream(homeserver) == [event.event_id]


# Receipt


class Receiving:
    """What is given to Synapse, which answers when it is told."""

    def __init__(self, homeserver: Homeserver, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[str] = []
        self.answers: list[Deferred[str]] = []
        server: Any = homeserver.hs.get_federation_server()
        monkeypatch.setattr(server, "on_incoming_transaction", self._take)
        monkeypatch.setattr(server, "_started_handling_of_staged_events", True)
        self.server = server

    async def _take(self, origin: str, transaction_id: str, *_: object) -> str:
        self.taken.append(transaction_id)
        answer: Deferred[str] = Deferred()
        self.answers.append(answer)
        return await answer

    def send(self, transaction_id: str, pdu: dict[str, Any], origin: str = "there") -> list[Any]:
        transaction = {"pdus": [pdu], "edus": []}
        return begin(
            self.server.on_incoming_transaction(origin, transaction_id, "here", transaction)
        )


@pytest.mark.requirement("L1", "L2")
def test_transactions_are_checked_before_synapse_has_them(
    homeserver: Homeserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiving = Receiving(homeserver, monkeypatch)
    checked: list[str] = []

    async def check(transaction: Any) -> Refusal | None:
        checked.append(transaction.transaction_id)
        return REFUSAL if transaction.transaction_id.startswith("refused") else None

    SynapseReceipt(homeserver).check_transactions(check)
    pdu = {FIELD: {"duration_ms": HOUR_MS}}
    (refused,) = receiving.send("refused", pdu)
    assert (refused.value.code, refused.value.errcode) == (429, "M_LIMIT_EXCEEDED")
    assert refused.value.error_dict(None)["retry_after_ms"] == 1_500
    assert refused.value.headers == {"Retry-After": "2"}
    assert receiving.taken == []
    first = receiving.send("first", pdu)
    # Synapse answers another, and the same one, but processes neither: that costs nothing.
    receiving.send("refused-as-second", pdu)
    receiving.send("first", pdu)
    receiving.send("plain", {})
    assert checked == ["refused", "first"]
    assert receiving.taken == ["first", "refused-as-second", "first", "plain"]
    for answer in receiving.answers[1:]:
        answer.callback("429")
    receiving.send("still-second", pdu)
    assert checked == ["refused", "first"]
    receiving.answers[0].errback(OSError("failed"))
    assert first
    receiving.send("later", pdu)
    assert checked[2:] == ["later"]


@pytest.mark.requirement("L2")
def test_a_check_that_fails_refuses_nothing(
    homeserver: Homeserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiving = Receiving(homeserver, monkeypatch)

    async def check(transaction: Any) -> Refusal | None:
        raise OSError("the database is away")

    SynapseReceipt(homeserver).check_transactions(check)
    receiving.send("first", {FIELD: {}})
    assert receiving.taken == ["first"]


@pytest.mark.requirement("L4")
def test_a_server_with_too_much_deferred_or_staged_is_refused(
    homeserver: Homeserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiving = Receiving(homeserver, monkeypatch)
    deferred = DeferredTable(homeserver)
    config = FederationConfig(
        Mode.DEFER, LimitConfig(2.0, 1), None, None, None, max_deferred_per_server=3
    )
    report = LimitReport(homeserver.now_ms, METRICS.limits)
    # The table of a first start is not there yet.
    ReceiptHandler(homeserver, SynapseReceipt(homeserver), deferred, config, report).install()
    now_ms = homeserver.now_ms()
    pdu = {FIELD: {"duration_ms": HOUR_MS}, "origin_server_ts": now_ms, "room_id": ROOM}

    def is_refused(transaction_id: str) -> bool:
        if results := receiving.send(transaction_id, pdu):
            assert results[0].value.error_dict(None)["retry_after_ms"] == 1_000
            return True
        receiving.answers[-1].callback("200")
        return False

    def stage(number: int, event_json: str) -> None:
        run_sql(
            homeserver,
            "INSERT INTO federation_inbound_events_staging"
            " (origin, room_id, event_id, received_ts, event_json, internal_metadata)"
            " VALUES ('there', ?, ?, ?, ?, '{}')",
            *(ROOM, f"$staged{number}", now_ms, event_json),
        )

    assert not is_refused("first")
    events = [
        NewStickyEvent(f"${n}", ROOM, "@mallory:there", now_ms + for_ms, n)
        for n, for_ms in enumerate([HOUR_MS, -1, HOUR_MS])
    ]
    done(
        homeserver.transact(
            "test", deferred.insert_txn, [(event, "there", "per_room") for event in events]
        )
    )
    for number in range(5):
        stage(number, "{}")
    assert not is_refused("plain PDUs do not count")
    stage(5, json.dumps(pdu | {FIELD: {"duration_ms": 0}}))
    assert not is_refused("what has expired does not count")
    stage(6, json.dumps(pdu))
    assert is_refused("two deferred and one staged")
    done(deferred.drop(["$0"]))
    assert not is_refused("one deferred and one staged")


# Sending


class Servlet(SimpleNamespace):
    """As Synapse makes them; what was called is in ``calls``."""


@pytest.fixture
def servlets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """The calls that reach Synapse: the servlet, and the arguments."""
    calls: list[tuple[Any, Any]] = []

    async def original(servlet: Any, request: Any, *args: Any, **options: Any) -> None:
        calls.append((servlet, (request, *args, options)))

    # Both are put back at the end.
    monkeypatch.setattr(RoomSendEventRestServlet, "_do", original)
    monkeypatch.setattr(RoomStateEventRestServlet, "on_PUT", original)
    return calls


def request_with(value: bytes) -> Any:
    return SimpleNamespace(args={PARAMETER: [value]})


@pytest.mark.requirement("S3")
def test_the_parameter_is_that_of_homeservers_with_the_module(
    homeserver: Homeserver, servlets: list[tuple[Any, Any]]
) -> None:
    ours: Any = Servlet(
        event_creation_handler=homeserver.hs.get_event_creation_handler(),
        delayed_events_handler=homeserver.hs.get_delayed_events_handler(),
    )
    others: Any = Servlet(event_creation_handler=object(), delayed_events_handler=object())
    send, put = RoomSendEventRestServlet, RoomStateEventRestServlet
    sending = SynapseSending(homeserver)
    sending.check_parameter()
    bad = request_with(b"1_000")
    with pytest.raises(SynapseError, match="must be an integer"):
        done(send._do(ours, bad, None, ROOM, "m.a", None))  # type: ignore[arg-type]
    done(send._do(others, bad, None, ROOM, "m.a", None))  # type: ignore[arg-type]
    assert servlets.pop() == (others, (bad, None, ROOM, "m.a", None, {}))

    # Without the option, PUT /state stays as it is.
    good = request_with(b"1000")
    arguments: dict[str, Any] = {"room_id": ROOM, "event_type": "m.a", "state_key": ""}
    done(put.on_PUT(ours, good, **arguments))
    assert servlets.pop()[0] is ours
    sending.accept_sticky_state()
    for request in (good, bad):
        done(put.on_PUT(others, request, **arguments))
        assert servlets.pop()[0] is others
    with pytest.raises(SynapseError, match="must be an integer"):
        done(put.on_PUT(ours, bad, **arguments))
    with pytest.raises(SynapseError, match=r"not possible for m\.room\.member"):
        done(put.on_PUT(ours, good, **{**arguments, "event_type": "m.room.member"}))
    done(put.on_PUT(ours, good, **arguments))
    servlet, passed = servlets.pop()
    assert passed == (good, ROOM, "m.a", {"state_key": ""})
    assert servlet is not ours
    assert servlet.event_creation_handler is not ours.event_creation_handler

    # It is taken out with the module.
    homeserver.close()
    done(send._do(ours, bad, None, ROOM, "m.a", None))  # type: ignore[arg-type]
    done(put.on_PUT(ours, bad, **arguments))
    assert [called[0] for called in servlets] == [ours, ours]


_DEFAULTS = {"ratelimit": True, "txn_id": None, "delay_id": None}


@pytest.mark.requirement("E1", "S3")
def test_events_are_checked_before_they_are_sent_or_scheduled(
    homeserver: Homeserver, monkeypatch: pytest.MonkeyPatch, servlets: list[tuple[Any, Any]]
) -> None:
    events: Any = homeserver.hs.get_event_creation_handler()
    delayed: Any = homeserver.hs.get_delayed_events_handler()
    sent: list[Any] = []
    refuses = False

    async def original(requester: Any, *args: Any, **options: Any) -> str:
        sent.append((*args, options))
        return "sent"

    async def check(request: LocalSend) -> Refusal | None:
        assert request.user_id == "@alice:here"
        assert not await request.is_exempt()
        assert not await request.is_repeated()
        return REFUSAL if refuses else None

    monkeypatch.setattr(events, "create_and_send_nonmember_event", original)
    monkeypatch.setattr(delayed, "add", original)
    sending = SynapseSending(homeserver)
    sending.limit_sticky(check)
    sending.accept_sticky_state()
    alice = create_requester(UserID("alice", "here"), device_id="DEVICE")
    sticky, plain = {"room_id": ROOM, FIELD: {"duration_ms": 5}}, {"room_id": ROOM}
    send = events.create_and_send_nonmember_event
    assert done(send(alice, sticky, txn_id="1")) == "sent"
    refuses = True
    for refused in (
        send(alice, sticky, txn_id="1"),
        delayed.add(alice, room_id=ROOM, sticky_duration_ms=5),
    ):
        with pytest.raises(SynapseError) as error:
            done(refused)
        assert error.value.debug_context == "synapse_sticky_per_user"
    assert sent == [(sticky, {**_DEFAULTS, "txn_id": "1"})]
    for free in (
        send(alice, plain),
        send(alice, sticky, delay_id="delay"),
        send(alice, sticky, ratelimit=False),
        delayed.add(alice, room_id=ROOM, sticky_duration_ms=None),
    ):
        assert done(free) == "sent"

    # State that is sticky goes the same way.
    refuses = False
    servlet: Any = Servlet(event_creation_handler=events, delayed_events_handler=delayed)
    arguments = {"room_id": ROOM, "event_type": "m.a", "state_key": ""}
    done(RoomStateEventRestServlet.on_PUT(servlet, request_with(b"7"), **arguments))
    sticky_servlet, _ = servlets.pop()
    sent.clear()
    done(sticky_servlet.event_creation_handler.create_and_send_nonmember_event(alice, plain))
    done(sticky_servlet.delayed_events_handler.add(alice, room_id=ROOM, sticky_duration_ms=None))
    assert sent == [
        ({"room_id": ROOM, FIELD: {"duration_ms": 7}}, _DEFAULTS),
        ({"room_id": ROOM, "sticky_duration_ms": 7},),
    ]


# Extremities


@pytest.mark.requirement("F2")
def test_forward_extremities_are_counted(homeserver: Homeserver) -> None:
    extremities = SynapseExtremities(homeserver)
    assert extremities.threshold == 10
    assert done(extremities.count(ROOM)) == 0
    # No local user is there who could send one.
    assert done(extremities.able(ROOM)).users == ()


@pytest.mark.requirement("F2", "H2")
def test_synapse_leaves_out_what_the_module_does(homeserver: Homeserver) -> None:
    """Synapse's own list is what it asks the database by."""
    extremities = SynapseExtremities(homeserver)
    assert extremities.left_out_since_ms(ROOM) is None
    extremities.leave_out(ROOM)
    asked: list[Any] = []

    async def get_rooms_with_many_extremities(
        min_count: int, limit: int, room_id_filter: Collection[str]
    ) -> list[str]:
        asked.append(list(room_id_filter))
        return []

    creation: Any = homeserver.hs.get_event_creation_handler()
    homeserver.enter(
        creation.store, "get_rooms_with_many_extremities", get_rooms_with_many_extremities
    )
    done(creation._send_dummy_events_to_fill_extremities())
    assert extremities.left_out_since_ms(ROOM) is not None
    extremities.leave_in(ROOM)
    extremities.leave_in(ROOM)
    done(creation._send_dummy_events_to_fill_extremities())
    assert asked == [[ROOM], []]


@pytest.mark.requirement("H2", "H7")
@pytest.mark.parametrize(
    "error",
    [
        ConnectionLost(),
        sqlite3.OperationalError("database is locked"),
        *(of_postgres(sqlstate) for sqlstate in ("57P01", "54000", None)),
        psycopg2.InterfaceError("connection already closed"),
    ],
    ids=repr,
)
def test_an_error_of_the_database_refuses_no_dummy_event(
    homeserver: Homeserver, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Also where Twisted raises its own in place of the driver's."""
    store: Any = homeserver.store
    monkeypatch.setattr(store.db_pool._db_pool, "runWithConnection", lambda *_, **__: fail(error))
    with pytest.raises(type(error)) as raised:
        done(SynapseExtremities(homeserver).send(ROOM, "@alice:here"))
    assert raised.value is error


@pytest.mark.requirement("H2", "H7")
@pytest.mark.parametrize(
    ("code", "is_refused"), [(502, False), (500, False), (409, False), (403, True)]
)
def test_synapse_says_whether_it_refuses_a_dummy_event(
    homeserver: Homeserver, code: int, is_refused: bool
) -> None:
    async def create_event(*_: object, **__: object) -> None:
        raise SynapseError(code, "No")

    homeserver.enter(homeserver.hs.get_event_creation_handler(), "create_event", create_event)
    (outcome,) = begin(SynapseExtremities(homeserver).send(ROOM, "@alice:here"))
    assert outcome == "SynapseError: 403: No" if is_refused else outcome.value.code == code


@pytest.mark.requirement("H2")
def test_a_change_of_a_rooms_state_is_noticed(
    homeserver: Homeserver, caplog: pytest.LogCaptureFixture
) -> None:
    """As it comes from this process, and from another one."""
    changed: list[str] = []

    def note(room_id: str) -> None:
        changed.append(room_id)
        raise OSError("out of order")

    SynapseExtremities(homeserver).on_state_changed(note)
    store: Any = homeserver.store

    def change_txn(txn: Any) -> None:
        store._invalidate_state_caches_and_stream(txn, ROOM, {"@a:here"})

    done(store.db_pool.runInteraction("test", change_txn))
    row = SimpleNamespace(cache_func="cs_cache_fake", keys=["!other:there"], invalidation_ts=1)
    store.process_replication_rows("caches", "other", 1, [row])
    assert changed == [ROOM, "!other:there"]
    assert f"Could not note that the state of {ROOM} changed" in caplog.text
