"""What it costs to check transactions of a server that sends many of them at once (L2, H3)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from synapse_sticky.config import FederationConfig, LimitConfig, Mode
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.receipt import synapse
from synapse_sticky.handlers.receipt.handler import ReceiptHandler
from synapse_sticky.handlers.receipt.synapse import SynapseReceipt
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.limits import LimitReport, Refusal
from tests.unit.test_limits_in_synapse import (
    FIELD,
    HOUR_MS,
    REFUSAL,
    ROOM,
    Receiving,
    done,
    make_homeserver,
    run_sql,
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


def stage(homeserver: Homeserver, origin: str, event_id: str, event_json: str) -> None:
    run_sql(
        homeserver,
        "INSERT INTO federation_inbound_events_staging"
        " (origin, room_id, event_id, received_ts, event_json, internal_metadata)"
        " VALUES (?, ?, ?, 1, ?, '{}')",
        *(origin, ROOM, event_id, event_json),
    )


def processed(homeserver: Homeserver, event_id: str) -> None:
    run_sql(
        homeserver, "DELETE FROM federation_inbound_events_staging WHERE event_id = ?", event_id
    )


def counting_looks(homeserver: Homeserver) -> Callable[[], int]:
    """Gives how many texts the database has looked into so far."""
    looks = 0

    def like(pattern: str, text: str) -> bool:
        nonlocal looks
        looks += 1
        return pattern.strip("%") in text

    # SQLite has this function called for each LIKE.
    pool: Any = homeserver.store.db_pool
    for connection in pool._db_pool.connections.values():
        connection.create_function("like", 2, like)
    return lambda: looks


@pytest.mark.requirement("L2", "H3")
def test_each_staged_pdu_is_looked_into_once(
    homeserver: Homeserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many transactions are checked while it is staged, and whatever it is."""
    receiving, receipt = Receiving(homeserver, monkeypatch), SynapseReceipt(homeserver)
    config = FederationConfig(max_staged_per_server_in_room=50)
    report = LimitReport(homeserver.now_ms)
    ReceiptHandler(homeserver, receipt, DeferredTable(homeserver), config, report).install()
    looks = counting_looks(homeserver)
    now_ms = homeserver.now_ms()
    sent = staged = 0

    def more(count: int, event_json: str, origin: str = "there") -> None:
        nonlocal staged
        for _ in range(count):
            staged += 1
            stage(homeserver, origin, f"${staged}", event_json)

    def is_refused() -> bool:
        nonlocal sent
        sent += 1
        pdu = {**STICKY, "origin_server_ts": now_ms, "room_id": ROOM}
        if results := receiving.send(f"{sent}", pdu):
            assert results[0].value.code == 429
            return True
        receiving.answers[-1].callback("200")
        return False

    sticky = f'{{"{FIELD}": {{}}}}'
    more(40, "{}")
    more(49, sticky, "elsewhere")
    assert not is_refused()
    assert looks() == 0, "there are too few to be too many"
    more(1_560, "{}")
    assert [is_refused() for _ in range(20)] == [False] * 20
    assert looks() == 1_600
    more(49, sticky)
    assert [is_refused() for _ in range(20)] == [False] * 20
    more(1, sticky)
    assert [is_refused() for _ in range(20)] == [True] * 20
    assert looks() == 1_650
    # Some are processed, and are not counted any more.
    processed(homeserver, f"${staged}")
    assert not is_refused()
    assert looks() == 1_650


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
    report = LimitReport(homeserver.now_ms)
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
    homeserver: Homeserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synapse, "_MOST_KNOWN", 10)
    receipt = SynapseReceipt(homeserver)
    for number in range(30):
        stage(homeserver, f"server{number // 4}", f"${number}", "{}")
    for number in range(7):
        done(homeserver.transact("test", receipt.count_staged_txn, f"server{number}", 3))
        assert sum(map(len, receipt._known.values())) <= 10
    assert [*receipt._known] == ["server5", "server6"]
    processed(homeserver, "$27")
    assert done(homeserver.transact("test", receipt.count_staged_txn, "server6", 3)) == {}
    assert [*receipt._known] == ["server5"]
