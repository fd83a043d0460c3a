"""What it costs to check transactions of a server that sends many of them at once (L2, H3)."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from synapse.api.room_versions import RoomVersions
from synapse.app.homeserver import SynapseHomeServer
from synapse.events import make_event_from_dict
from twisted.internet.defer import Deferred

from synapse_sticky.config import FederationConfig, LimitConfig, Mode
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.receipt import staged
from synapse_sticky.handlers.receipt.handler import ReceiptHandler
from synapse_sticky.handlers.receipt.slack import Slack
from synapse_sticky.handlers.receipt.synapse import SynapseReceipt, transaction_of
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.limits import LimitReport, Refusal
from synapse_sticky.orders import Orders
from tests.unit.settable import METRICS
from tests.unit.staging import STAGING, CountingStore, has_no_scan, prepared
from tests.unit.test_limits_in_synapse import (
    FIELD,
    HOUR_MS,
    REFUSAL,
    ROOM,
    Receiving,
    done,
    make_homeserver,
)

STICKY = {FIELD: {"duration_ms": HOUR_MS}}


@pytest.fixture
def homeserver(tmp_path: Path) -> Iterator[Homeserver]:
    hs = make_homeserver(tmp_path)
    yield (homeserver := Homeserver(hs.get_module_api()))
    homeserver.close()
    for connection in hs.get_datastores().main.db_pool._db_pool.connections.values():
        connection.close()


class Checking:
    """Checks that end when they are told."""

    def __init__(self) -> None:
        self.checked: list[tuple[str, str]] = []
        self.outcomes: list[Deferred[Refusal | None]] = []

    async def check(self, transaction: Any) -> Refusal | None:
        self.checked.append((transaction.origin, transaction.transaction_id))
        self.outcomes.append(Deferred())
        return await self.outcomes[-1]


@pytest.mark.requirement("L2", "L6", "H3")
def test_of_a_server_one_transaction_is_checked_at_a_time(
    homeserver: Homeserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None that Synapse does not process is, and none gets past the check of another."""
    # What Synapse answers while it processes another transaction.
    server: Any = homeserver.hs.get_federation_server()
    monkeypatch.setattr(server, "_active_transactions", {"there": "another"})
    transaction: dict[str, Any] = {"pdus": [], "edus": []}
    refused = done(server.on_incoming_transaction("there", "first", "here", transaction))
    assert refused[0] == 429

    receiving, checking = Receiving(homeserver, monkeypatch), Checking()
    SynapseReceipt(homeserver).check_transactions(checking.check)
    first = receiving.send("first", STICKY)
    for number in range(100):
        assert receiving.send(f"second-{number}", STICKY) == [refused]
        assert receiving.send("first", STICKY) == [refused]
    assert (receiving.taken, checking.checked) == ([], [("there", "first")])
    # Neither does another server wait, nor what has no sticky event.
    receiving.send("first", STICKY, "elsewhere")
    assert checking.checked[1:] == [("elsewhere", "first")]
    receiving.send("plain", {}, "elsewhere")
    assert receiving.taken == ["plain"]

    checking.outcomes[0].callback(None)
    assert receiving.taken == ["plain", "first"]
    for number in range(100):
        receiving.send(f"third-{number}", STICKY)
    assert len(checking.checked) == 2
    for answer in receiving.answers:
        answer.callback("200")
    assert first == ["200"]
    # One that is refused holds up no later one, nor does one whose check fails.
    receiving.send("refused", STICKY)
    checking.outcomes[-1].callback(REFUSAL)
    receiving.send("unchecked", STICKY)
    checking.outcomes[-1].errback(OSError("the database is away"))
    receiving.answers[-1].callback("200")
    receiving.send("last", STICKY)
    assert [name for _, name in checking.checked[2:]] == ["refused", "unchecked", "last"]
    assert receiving.taken[-1] == "unchecked"


KINDS = ["sqlite", pytest.param("postgres", marks=pytest.mark.slow)]
ORIGIN, LIMIT = "there", 1_000


@pytest.fixture(scope="module", params=KINDS)
def hs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SynapseHomeServer]:
    with prepared(request.param, tmp_path_factory.mktemp("homeserver")) as hs:
        yield hs


@pytest.fixture
def store(hs: SynapseHomeServer) -> Iterator[CountingStore]:
    with closing(CountingStore(hs)) as store:
        yield store
        store.sql(f"DELETE FROM {STAGING}")


class Checked:
    """Transactions of one sticky PDU, as this process checks them."""

    def __init__(self, store: CountingStore) -> None:
        self.store, self.sent = store, 0
        receipt, report = SynapseReceipt(store), LimitReport(store.now_ms, METRICS.limits)
        config = FederationConfig(max_staged_per_server_in_room=LIMIT)
        self.handler = ReceiptHandler(store, receipt, DeferredTable(store), config, report)
        self.handler.install()

    def retry_after_ms(self, origin: str = ORIGIN, room_id: str = ROOM) -> int | None:
        """None if it is accepted."""
        self.sent += 1
        pdu = {**STICKY, "origin_server_ts": self.store.now, "room_id": room_id}
        transaction = transaction_of(origin, f"{self.sent}", [pdu])
        refusal: Refusal | None = done(self.handler.check(transaction))
        return None if refusal is None else refusal.retry_after_ms

    def takes(self, count: int) -> None:
        """This process stages so many sticky PDUs."""
        for _ in range(count):
            self.sent += 1
            fields = {"type": f"m.{self.sent}", "sender": f"@a:{ORIGIN}", "room_id": ROOM}
            lists: dict[str, Any] = {"prev_events": [], "auth_events": [], "depth": 1}
            parts: dict[str, Any] = {"content": {}, "hashes": {}, "signatures": {}}
            pdu = {**fields, **lists, **parts, **STICKY, "origin_server_ts": self.store.now}
            event = make_event_from_dict(pdu, RoomVersions.V11)
            done(self.store.store.insert_received_event_to_staging(ORIGIN, event))


@pytest.fixture
def checked(store: CountingStore) -> Checked:
    return Checked(store)


def ids(name: str, count: int) -> list[str]:
    return [f"${name}{number}" for number in range(count)]


def read_json(store: CountingStore) -> int:
    """How many PDUs were read since the last time as they were received."""
    read = [args for sql, args in store.statements if "event_json" in sql]
    return sum(len(args[1]) if store.is_postgres else len(args) - 1 for args in read)


@pytest.mark.requirement("L2", "L6", "H3")
def test_what_a_check_reads_does_not_grow_with_what_is_staged(
    store: CountingStore, checked: Checked
) -> None:
    """Each PDU is read once as it was received, and none that this process has staged itself."""
    store.stage(ORIGIN, ROOM, ids("plain", 40))
    store.stage("elsewhere", ROOM, ids("elsewhere", LIMIT - 1), HOUR_MS)
    assert checked.retry_after_ms() is None
    assert read_json(store) == 0, "there are too few to be too many"
    read = []
    for count in (5_000, 15_000):
        store.stage(ORIGIN, ROOM, ids(f"more{count}-", count))
        store.now += 2_000  # until then this process does not count again
        store.analyze()
        for _ in range(20):
            checked.retry_after_ms()
        store.reset()
        assert [checked.retry_after_ms() for _ in range(20)] == [None] * 20
        read.append(store.rows)
        assert len(store.statements) <= 20 * 7
        assert read_json(store) == 0
    assert read[1] == read[0] <= 20 * 2_100
    assert has_no_scan(store.plans(), store.is_postgres)
    checked.takes(LIMIT - 1)
    assert checked.retry_after_ms() is None
    store.reset()
    checked.takes(1)
    assert [checked.retry_after_ms() is None for _ in range(20)] == [False] * 20
    assert read_json(store) == 0
    assert store.rows <= 20 * 5_000
    assert has_no_scan(store.plans(), store.is_postgres)
    # Neither other rooms, nor other servers.
    assert checked.retry_after_ms(room_id="!other") is None
    assert checked.retry_after_ms("elsewhere") is None


@pytest.mark.requirement("L2", "L6", "H1")
def test_who_is_far_from_a_bound_is_not_counted_each_time(
    store: CountingStore, checked: Checked
) -> None:
    """No more than half of what was left, and for two seconds."""
    store.stage(ORIGIN, ROOM, ids("first", 100), HOUR_MS)
    assert checked.retry_after_ms() is None
    store.reset()
    free = LIMIT - 1 - (LIMIT - 1) // 2 - 1
    assert [checked.retry_after_ms() for _ in range(free)] == [None] * free
    assert store.statements == []
    # Another one has none of it.
    assert checked.retry_after_ms("elsewhere") is None
    assert store.statements != []
    store.stage(ORIGIN, ROOM, ids("more", LIMIT), HOUR_MS)
    assert checked.retry_after_ms() is not None


@pytest.mark.requirement("L2", "L6", "H1")
def test_what_was_counted_stands_for_two_seconds(store: CountingStore, checked: Checked) -> None:
    assert checked.retry_after_ms() is None
    store.stage(ORIGIN, ROOM, ids("of another process", LIMIT), HOUR_MS)
    store.now += 1_999
    assert checked.retry_after_ms() is None
    store.now += 1
    assert checked.retry_after_ms() is not None


@pytest.mark.requirement("H1")
def test_so_many_origins_are_remembered_as_far_from_a_bound() -> None:
    slack = Slack(lambda: 0)
    for number in range(10_001):
        slack.found(f"s{number}", 10)
    assert not slack.take("s0", 1)
    assert slack.take("s10000", 10)
    assert not slack.take("s10000", 1)


@pytest.mark.requirement("L2", "H1")
def test_whether_it_was_answered_is_asked_of_what_is_refused_only(
    store: CountingStore, checked: Checked
) -> None:
    answers: list[str] = []

    async def is_answered(origin: str, transaction_id: str) -> bool:
        answers.append(transaction_id)
        return transaction_id == "2"

    checked.handler._receipt.is_answered = is_answered  # type: ignore[method-assign]
    assert checked.retry_after_ms() is None
    assert answers == []
    store.stage(ORIGIN, ROOM, ids("more", LIMIT), HOUR_MS)
    store.now += 2_000
    assert checked.retry_after_ms() is None, "Synapse repeats its answer"
    assert checked.retry_after_ms() is not None
    assert answers == ["2", "3"]


@pytest.mark.requirement("L2", "H1", "H3")
def test_what_has_expired_does_not_count(store: CountingStore, checked: Checked) -> None:
    """The room hangs: all of it stays staged."""
    store.stage(ORIGIN, ROOM, ids("short", 5_000), 5_000)
    store.now += 1_000
    told_ms = []
    for _ in range(3):
        told_ms.append(checked.retry_after_ms())
        store.now += 1_000
    assert told_ms[-1] == 5_000 - 3_000
    store.now += 2_000
    for room_id in (ROOM, "!other") * 15:
        assert checked.retry_after_ms(room_id=room_id) is None


@pytest.mark.requirement("L2", "H1")
def test_the_time_to_retry_says_when_it_can_go_well(store: CountingStore, checked: Checked) -> None:
    store.stage(ORIGIN, ROOM, ids("long", LIMIT - 10), HOUR_MS)
    store.stage(ORIGIN, ROOM, ids("short", 20), 30_000)
    # The room may go on.
    assert checked.retry_after_ms() == 1_000
    store.now += 12_000
    assert checked.retry_after_ms() == 18_000, "nothing was processed since"
    store.sql(f"DELETE FROM {STAGING} WHERE event_id IN ('$long1', '$long2', '$long3')")
    assert checked.retry_after_ms() == 1_000, "some were"
    store.sql(f"DELETE FROM {STAGING} WHERE event_id >= '$short'")
    assert checked.retry_after_ms() is None


@pytest.mark.requirement("L2", "L6", "E2", "E4")
def test_another_process_and_a_restart(store: CountingStore, checked: Checked) -> None:
    """What others stage counts, and what they process does not."""
    store.stage(ORIGIN, ROOM, ids("plain", 1_900))
    store.stage(ORIGIN, ROOM, ids("sticky", LIMIT - 1), HOUR_MS)
    assert [checked.retry_after_ms() for _ in range(3)] == [None] * 3
    store.stage(ORIGIN, ROOM, ["$by-another"], HOUR_MS)
    assert [checked.retry_after_ms() for _ in range(2)][-1] is not None
    anew = Checked(store)
    assert [anew.retry_after_ms() for _ in range(2)][-1] is not None
    store.sql(f"DELETE FROM {STAGING} WHERE event_id IN ('$sticky7', '$sticky900')")
    assert checked.retry_after_ms() is None
    assert anew.retry_after_ms() is None


@pytest.mark.requirement("L2", "L7")
def test_exempt_user_is_not_refused_for_the_limit_on_a_sender(
    homeserver: Homeserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiving, receipt = Receiving(homeserver, monkeypatch), SynapseReceipt(homeserver)
    config = FederationConfig(
        Mode.REJECT,
        per_server_in_room=LimitConfig(0.001, 7),
        per_sender=LimitConfig(0.001, 1),
        exempt_users=("@gateway-*:there",),
    )
    report = LimitReport(homeserver.now_ms, METRICS.limits)
    ReceiptHandler(homeserver, receipt, DeferredTable(homeserver), config, report).install()

    def is_refused(number: int, sender: str) -> bool:
        pdu = {**STICKY, "origin_server_ts": homeserver.now_ms(), "room_id": ROOM, "sender": sender}
        if results := receiving.send(f"{number} {sender}", pdu):
            assert results[0].value.code == 429
            return True
        receiving.answers[-1].callback("200")
        return False

    assert [is_refused(n, "@other:there") for n in range(3)] == [False, True, True]
    # Still counted for the server in the room.
    answers = [is_refused(n, "@gateway-1:there") for n in range(8)]
    assert answers == [False] * 6 + [True] * 2


@pytest.mark.requirement("H3")
def test_what_is_remembered_of_staged_pdus_is_bounded(
    store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "_MOST_KNOWN", 10)
    receipt = SynapseReceipt(store)
    counts = staged.StagedCounts(receipt, store.now_ms)
    receipt.tell_staged(counts.staged)

    def look(origin: str) -> bool:
        found: bool = done(store.transact("test", counts.look_txn, origin, 3))
        return found

    for number in range(8):
        store.stage(f"server{number}", ROOM, ids(f"{number}-", 4))
    for number in range(7):
        assert look(f"server{number}")
        assert len(counts) <= 10
    known = [f"server{number}" for number in range(8) if counts.is_known(f"server{number}")]
    assert known == ["server5", "server6"]
    store.sql(f"DELETE FROM {STAGING} WHERE event_id = '$6-0'")
    assert not look("server6")
    assert not counts.is_known("server6")
    # Of a single one, too.
    store.stage("server7", ROOM, ids("more", 20))
    store.stage("server7", ROOM, ids("sticky", 3), HOUR_MS)
    for _ in range(3):
        assert look("server7")
        assert len(counts) <= 10
        excess = done(store.transact("test", counts.excess_txn, "server7", ROOM, 3))
        assert excess.number == 1


@pytest.mark.requirement("H3", "L6")
def test_ids_that_are_too_long_are_not_remembered(
    store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first two room versions a PDU brings its ID along, of up to 60 kB."""
    monkeypatch.setattr(staged, "_PAGE", 10)
    counts = staged.StagedCounts(SynapseReceipt(store), store.now_ms)
    long = [f"$b{number}" + 59_000 * "x" for number in range(25)]
    # Those that a cut ID would not get past.
    long += [f"$b\0{number}" + 59_000 * "x" for number in range(25)]
    long += ["$b" + 255 * "y" + f"\U0010ffff{number}" for number in range(25)]
    store.stage("there", ROOM, long, HOUR_MS)
    store.stage("there", ROOM, ["$a", "$b12", "$c", "$" + 254 * "d"], HOUR_MS)
    for event_id in long:
        counts.staged("there", staged.StickyPdu(event_id, ROOM, store.now + HOUR_MS))
    for _ in range(len(long) // 10 + 2):
        assert done(store.transact("test", counts.look_txn, "there", 3))
    assert len(counts) == 4
    excess = done(store.transact("test", counts.excess_txn, "there", ROOM, 3))
    assert excess.number == 2


@pytest.mark.requirement("H3")
def test_what_this_process_stages_is_remembered_only_as_far_as_it_counts(
    store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two checks, too: what is staged is mostly processed before the next one."""
    monkeypatch.setattr(staged, "_MOST_KNOWN", 10)
    counts = staged.StagedCounts(SynapseReceipt(store), store.now_ms)
    for origin in ("first", "second"):
        store.stage(origin, ROOM, ids(origin, 4))
        assert done(store.transact("test", counts.look_txn, origin, 3))
    assert len(counts) == 8
    for event_id in ids("plain", 100):
        counts.staged("first", staged.StickyPdu(event_id, ROOM, 0))
        counts.staged("first", staged.StickyPdu(f"{event_id}-expired", ROOM, store.now))
    assert len(counts) == 8
    for number in range(8):
        counts.staged("first", staged.StickyPdu(f"$sticky{number}", ROOM, store.now + HOUR_MS))
        assert len(counts) <= 10
    assert not counts.is_known("second")
    # What counts is the last to go.
    assert len(counts) == 8
    for event_id in [f"$sticky{number}" for number in range(8)]:
        counts.staged("first", staged.StickyPdu(event_id, ROOM, store.now + HOUR_MS))
    assert len(counts) == 8


@pytest.mark.requirement("E3", "H3", "L6")
def test_what_a_held_server_has_waiting_is_bounded(store: CountingStore) -> None:
    """Ten times as much as others, and no exemption changes that. In one room no more may be
    staged than of anybody."""
    orders, most = Orders(), 60
    receipt, report = SynapseReceipt(store), LimitReport(store.now_ms, METRICS.limits)
    options: Any = {"max_deferred_per_server": most, "max_staged_per_server_in_room": 50}
    config = FederationConfig(exempt_servers=("configured",), **options)
    table = DeferredTable(store)
    handler = ReceiptHandler(store, receipt, table, config, report, orders)
    done(migrate(store, table))

    def refusal(origin: str, room_id: str = ROOM) -> str | None:
        pdu = {**STICKY, "origin_server_ts": store.now, "room_id": room_id}
        transaction = transaction_of(origin, f"{store.now}", [pdu])
        found: Refusal | None = done(handler.check(transaction))
        return None if found is None else found.limit

    def waiting(server: str, count: int) -> None:
        store.sql("DELETE FROM synapse_sticky_deferred")
        until_ms = store.now + HOUR_MS
        store.sql(
            "INSERT INTO synapse_sticky_deferred (event_id, room_id, sender, server, expires_at_ms,"
            " event_stream_ordering) VALUES "
            + ", ".join(f"('$d{n}', '!r', '@a:x', '{server}', {until_ms}, 1)" for n in range(count))
        )

    for server in ("there", "configured", "exempt"):
        orders.set(held_servers=[server], exempt_servers=["exempt"])
        waiting(server, 10 * most - 1)
        assert refusal(server) is None
        waiting(server, 10 * most)
        assert refusal(server) == "max_deferred_per_server"
    orders.set(exempt_servers=["exempt"])
    assert refusal("exempt") is None
    store.sql("DELETE FROM synapse_sticky_deferred")
    store.stage("exempt", ROOM, ids("staged", 50), HOUR_MS)
    assert refusal("exempt") is None
    orders.set(exempt_servers=["exempt"], held_servers=["exempt"])
    assert refusal("exempt") == "max_staged_per_server_in_room"
    assert refusal("exempt", "!other") is None
