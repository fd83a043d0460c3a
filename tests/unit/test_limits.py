"""Limits and the release queue as Python sees them, and what is decided with them."""

import logging
import sqlite3
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import pytest
from prometheus_client import REGISTRY
from twisted.internet.defer import ensureDeferred

from synapse_sticky._core import Limiter, ReleaseQueue
from synapse_sticky.config import FederationConfig, LimitConfig, Mode
from synapse_sticky.handlers.deferral import tables
from synapse_sticky.handlers.deferral.handler import DeferralHandler, NewStickyEvent
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.limits import LimitReport, federation_limiter
from synapse_sticky.metrics import NOT_RECORDED
from tests.unit.settable import METRICS, Settable

NOW_MS = 1_800_000_000_000
HOUR_MS = 3_600_000


@pytest.mark.requirement("L7")
@pytest.mark.parametrize("servers", [1, 5, 500])
def test_a_call_of_500_people_passes_the_defaults(servers: int) -> None:
    limiter, queue = federation_limiter(FederationConfig()), ReleaseQueue()
    # All of them come at once, and go in the same millisecond.
    for _ in ("come", "go"):
        for person in range(500):
            server = f"server{person % servers}"
            sender = f"@person{person}:{server}"
            assert queue.admit(limiter, "!call", server, sender, NOW_MS) is None


@pytest.mark.requirement("L1", "L6")
def test_defaults_hold_a_flood_up() -> None:
    limiter, queue = federation_limiter(FederationConfig()), ReleaseQueue()
    admit = queue.admit
    by_one = [admit(limiter, "!room", "there", "@mallory:there", NOW_MS) for _ in range(600)]
    assert by_one == [None] * 60 + ["per_sender"] * 540
    by_many = [admit(limiter, "!room", "there", f"@{n}:there", NOW_MS) for n in range(5_000)]
    assert by_many.count(None) == 940
    assert set(by_many[940:]) == {"per_server_in_room"}
    assert admit(limiter, "!room", "elsewhere", "@bob:elsewhere", NOW_MS) is None


def test_a_transaction_is_charged_whole_or_not() -> None:
    limiter = Limiter({"per_server": (1, 10), "per_sender": (1, 3)}, 100)
    pdus = [("!a", "@x:o"), ("!a", "@x:o"), ("!b", None), (None, None)]
    assert limiter.admit_transaction("o", pdus, NOW_MS) is None
    refused = limiter.admit_transaction("o", pdus, NOW_MS)
    assert refused == ("per_sender", 1_000)
    assert limiter.admit_transaction("o", [(None, None)] * 6, NOW_MS) is None
    assert limiter.admit_transaction("o", [(None, None)], NOW_MS) == ("per_server", 1_000)


LIMITER: Any = Limiter({}, 1)
MAKE: Any = Limiter  # what mypy forbids must fail


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: MAKE([], 1), TypeError, "limits"),
        (lambda q: MAKE({"per_day": (1, 1)}, 1), ValueError, "limits' keys"),
        (lambda q: MAKE({1: (1, 1)}, 1), TypeError, "limits' keys"),
        (lambda q: MAKE({"per_room": 1}, 1), TypeError, "limits"),
        (lambda q: MAKE({"per_room": (True, 1)}, 1), TypeError, "per_second"),
        (lambda q: MAKE({"per_room": (0, 1)}, 1), ValueError, "per_second"),
        (lambda q: MAKE({"per_room": (10**400, 1)}, 1), ValueError, "per_second"),
        (lambda q: MAKE({"per_room": (1, 0)}, 1), ValueError, "burst_count"),
        (lambda q: MAKE({"per_room": (1, 2**40)}, 1), ValueError, "burst_count"),
        (lambda q: MAKE({}, -1), ValueError, "capacity"),
        (lambda q: LIMITER.admit_transaction(None, [], 0), TypeError, "origin"),
        (lambda q: LIMITER.admit_transaction("o", 5, 0), TypeError, "pdus"),
        (lambda q: LIMITER.admit_transaction("o", [5], 0), TypeError, r"rows\[0\]"),
        (lambda q: LIMITER.admit_transaction("o", [(5, None)], 0), TypeError, "room_id"),
        (lambda q: LIMITER.admit_user("@a:b", 1.5), TypeError, "now_ms"),
        (lambda q: q.admit(LIMITER, "!a", "s", None, 0), TypeError, "sender"),
        (lambda q: q.admit(None, "!a", "s", "@u:s", 0), TypeError, "limiter"),
        (lambda q: q.add("$1", "!a", "s", "@u:s", 2**70), ValueError, "expires_at_ms"),
        (lambda q: q.remove(b"$1"), TypeError, "event_id"),
        (lambda q: q.take(LIMITER, 0, -1), ValueError, "max_events"),
        (lambda q: q.expire(0, None), TypeError, "max_events"),
        (lambda q: q.next_due_ms("0"), TypeError, "now_ms"),
        (lambda q: q.waiting(0), TypeError, "server"),
        (lambda q: 1 in q, TypeError, "event_id"),
    ],
)
def test_a_bad_argument_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(ReleaseQueue())


class Transaction:
    """A cursor of SQLite's, as handlers know it."""

    def __init__(self, cursor: sqlite3.Cursor) -> None:
        self._cursor = cursor
        self.execute = cursor.execute
        self.execute_batch = cursor.executemany
        self.fetchone = cursor.fetchone
        self.fetchall = cursor.fetchall
        self.after: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def call_after(self, callback: Callable[..., object], *args: Any) -> None:
        self.after.append((callback, args))


class Here(Settable):
    """A homeserver with a database in memory and a clock that stands still."""

    def __init__(self) -> None:
        self.server_name = "here"
        self.is_postgres = False
        self.now = NOW_MS
        self.database = sqlite3.connect(":memory:", isolation_level=None)
        self.entered: list[str] = []
        self.due: list[Callable[[], Awaitable[None]]] = []
        self.due_ms = 0
        self.failures = 0
        self.fails = "release"
        self.failed = 0
        self.spares = 0
        self.hooks = 0
        self.on_commit: Callable[[], None] = lambda: None
        self.attempts = 0
        self.gone: set[str] = set()
        self.tell_of_purge: Callable[[str], None] = lambda room_id: None
        self.transactions = 0

    def now_ms(self) -> int:
        return self.now + self.set_by_ms

    def steady_ms(self) -> int:
        return self.now

    def defer_by(self, defer_txn: Any) -> None:
        self.hooks += 1

    def on_event_changed(self, callback: Any) -> None: ...
    def wake(self, rooms: Any) -> None: ...

    def on_user_redacted(self, callback: Any) -> None: ...

    def on_room_purged(self, callback: Any) -> None:
        self.tell_of_purge = callback

    def handles(self, room_id: str) -> bool:
        return True

    def in_list(self, column: str, values: Collection[object]) -> tuple[str, list[object]]:
        return f"{column} IN ({', '.join('?' * len(values))})", list(values)

    async def existing(self, event_ids: Any) -> set[str]:
        return set(event_ids) - self.gone

    async def still_sticky(self, event_ids: Any) -> set[str]:
        return set(event_ids) - self.gone

    def attempt_txn(self, txn: Any, change: Callable[[], None]) -> Exception | None:
        self.attempts += 1
        try:
            change()
        except sqlite3.OperationalError as e:
            return e
        return None

    def enter_txn(self, txn: Any, events: list[NewStickyEvent]) -> None:
        self.entered += [event.event_id for event in events]

    def call_later(self, delay_ms: int, what: str, function: Any, *args: Any) -> "Here":
        self.due = [function]
        self.due_ms = self.now + delay_ms
        return self

    def in_background(self, what: str, function: Any, *args: Any) -> None:
        done(function(*args))

    def active(self) -> bool:
        return bool(self.due)

    def cancel(self) -> None:
        self.due = []

    async def transact(self, what: str, function: Any, *args: Any) -> Any:
        if what == self.fails and self.failures:
            if not self.spares:
                self.failures -= 1
                self.failed += 1
                raise sqlite3.OperationalError("the disk is full")
            self.spares -= 1
        self.transactions += 1
        return function(Transaction(self.database.cursor()), *args)

    transact_alone = transact

    async def transact_briefly(self, what: str, function: Any) -> Any:
        return await self.transact(what, function)

    def persist(
        self,
        handler: DeferralHandler,
        numbers: range,
        *,
        commits: bool = True,
        for_ms: int = HOUR_MS,
    ) -> set[str]:
        """What Synapse does with new events; gives those that were deferred."""
        txn = Transaction(self.database.cursor())
        events = [
            NewStickyEvent(f"${n}", "!room", "@mallory:there", NOW_MS + for_ms, n) for n in numbers
        ]
        txn.execute("BEGIN")
        deferred = set(handler.defer_txn(txn, events))  # type: ignore[arg-type]  # as far as needed
        txn.execute("COMMIT" if commits else "ROLLBACK")
        if commits:
            self.on_commit()
            for callback, args in txn.after:
                callback(*args)
        return deferred

    def release(self) -> None:
        """Lets what is due happen."""
        due, self.due = self.due, []
        for function in due:
            done(function())

    def pass_ms(self, ms: int) -> None:
        """Lets time pass, and what is due by then happen."""
        self.now += ms
        if self.due and self.due_ms <= self.now:
            self.release()


def done(awaitable: Awaitable[Any]) -> Any:
    """The result of a coroutine that waits for nothing."""
    results: list[Any] = []
    ensureDeferred(awaitable).addBoth(results.append)  # type: ignore[arg-type]
    (result,) = results
    if hasattr(result, "raiseException"):
        result.raiseException()
    return result


def deferral(here: Here, per_second: float, burst_count: int) -> DeferralHandler:
    handler = unloaded(here, per_second, burst_count)
    done(handler.load())
    return handler


def unloaded(
    here: Here, per_second: float, burst_count: int, mode: Mode = Mode.DEFER
) -> DeferralHandler:
    config = FederationConfig(
        mode=mode,
        per_server=LimitConfig(per_second, burst_count),
        per_server_in_room=None,
        per_sender=None,
        per_room=None,
    )
    hs: Any = here
    report = LimitReport(here.now_ms, METRICS.limits)
    handler = DeferralHandler(hs, hs, DeferredTable(hs), hs, config, report)
    handler.install()
    return handler


def table(here: Here) -> set[str]:
    return {row[0] for row in here.database.execute("SELECT event_id FROM synapse_sticky_deferred")}


@pytest.mark.requirement("L4")
def test_retried_transaction_is_charged_once() -> None:
    here = Here()
    handler = deferral(here, 0.001, 5)
    for _ in range(4):
        assert here.persist(handler, range(3), commits=False) == set()
    assert here.persist(handler, range(3)) == set()
    # Two are left; the decisions stay as they were when the transaction comes again.
    for _ in range(3):
        assert here.persist(handler, range(3, 7), commits=False) == {"$5", "$6"}
        assert table(here) == set()
    assert here.persist(handler, range(3, 7)) == {"$5", "$6"}
    assert table(here) == {"$5", "$6"}


@pytest.mark.requirement("L3", "L4", "E4")
def test_failing_database_loses_nothing_and_charges_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    here = Here()
    handler = deferral(here, 1, 2)
    assert here.persist(handler, range(6)) == {"$2", "$3", "$4", "$5"}
    here.now += 2_000
    here.failures = 3
    for _ in range(3):
        here.release()
        assert here.entered == []
        assert table(here) == {"$2", "$3", "$4", "$5"}
    assert "Could not release sticky events, trying again in" in caplog.text
    here.release()
    assert here.entered == ["$5", "$4"], "paid for when they were taken"
    here.release()
    assert here.entered == ["$5", "$4"]
    here.now += 2_000
    here.release()
    assert here.entered == ["$5", "$4", "$3", "$2"]
    assert table(here) == set()


@pytest.mark.requirement("L4", "D7")
def test_flood_does_not_put_releases_off() -> None:
    here = Here()
    handler = deferral(here, 100, 10)
    for step in range(1_000):
        here.persist(handler, range(3 * step, 3 * step + 3))
        here.pass_ms(10)
    # 100 a second for 10 s, but for the first few, which did not wait.
    assert len(here.entered) == pytest.approx(990, abs=10)


@pytest.mark.requirement("L4", "E4")
@pytest.mark.parametrize("fails", ["release", "drop_deferred"])
def test_failures_are_not_repeated_at_every_event(fails: str) -> None:
    here = Here()
    here.fails = fails
    handler = deferral(here, 10, 1)
    here.persist(handler, range(1_000_000, 1_000_005), for_ms=50)
    here.failures = 1_000
    for step in range(1_000):
        here.persist(handler, range(step, step + 1))
        here.pass_ms(10)
    assert here.failed == 4, "after 1, 2 and 4 s, not at each of a thousand events"
    here.failures = 0
    for _ in range(2_000):
        here.pass_ms(100)
    assert table(here) == set()


@pytest.mark.requirement("E4")
def test_next_run_takes_up_what_waits() -> None:
    here = Here()
    here.persist(deferral(here, 0.001, 1), range(4))
    here.entered.clear()
    deferral(here, 1_000, 1_000)
    here.release()
    assert sorted(here.entered) == ["$1", "$2", "$3"]
    assert table(here) == set()


@pytest.mark.requirement("E2", "H1", "H2")
def test_rows_that_the_database_refuses(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is deferred then, nothing waits, and the database is not asked for each event."""
    here = Here()
    handler = deferral(here, 0.001, 1)
    here.database.execute("ALTER TABLE synapse_sticky_deferred RENAME TO taken")
    assert here.persist(handler, range(3)) == set()
    assert here.persist(handler, range(3, 6)) == set()
    assert here.attempts == 1
    (told,) = (record.message for record in caplog.records if record.levelname == "ERROR")
    assert told.startswith("Could not defer 2 sticky events, so they are delivered now")
    assert not here.due

    here.database.execute("ALTER TABLE taken RENAME TO synapse_sticky_deferred")
    here.now += 1_200  # the first delay, at the longest
    assert here.persist(handler, range(6, 9)) == {"$6", "$7", "$8"}
    assert here.attempts == 2


@pytest.mark.requirement("E4", "L4")
@pytest.mark.parametrize("fails", ["migrate_deferral", "deferred"])
def test_until_it_is_loaded_nothing_is_deferred(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_PAGE", 2)
    here = Here()
    here.persist(deferral(here, 0.001, 1), range(4))
    here.entered.clear()
    here.release()
    handler = unloaded(here, 0.001, 1)
    # A page is read before the next one fails.
    here.fails, here.failures, here.spares = fails, 1, int(fails == "deferred")
    with pytest.raises(sqlite3.OperationalError):
        done(handler.load())
    assert here.failed == 1
    assert here.persist(handler, range(4, 10)) == set()
    handler._event_changed("$1")
    here.release()
    assert here.entered == []
    assert table(here) == {"$1", "$2", "$3"}

    done(handler.load())
    assert here.persist(handler, range(10, 12)) == {"$10", "$11"}, "those of before go first"
    here.pass_ms(1_000_000)
    assert here.entered == ["$1"]
    assert table(here) == {"$2", "$3", "$10", "$11"}


@pytest.mark.requirement("E4", "L4")
def test_without_limits_what_is_deferred_is_released() -> None:
    here = Here()
    here.persist(deferral(here, 0.001, 1), range(4))
    here.entered.clear()
    handler = unloaded(here, 0.001, 1, Mode.OFF)
    done(handler.load())
    here.release()
    assert sorted(here.entered) == ["$1", "$2", "$3"]
    assert table(here) == set()
    assert here.hooks == 1, "of the first run"


@pytest.mark.requirement("L4")
def test_events_that_cannot_be_decided_on_are_delivered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = Here()
    handler = deferral(here, 0.001, 1)
    with monkeypatch.context() as patched:
        patched.setattr(here, "now_ms", lambda: "late")
        assert here.persist(handler, range(4)) == set()
    assert "Could not decide on 4 sticky events, delivering them" in caplog.text
    assert here.persist(handler, range(4, 6)) == {"$5"}


@pytest.mark.requirement("L4", "S2")
def test_what_expires_is_dropped() -> None:
    here = Here()
    handler = deferral(here, 0.001, 1)
    here.persist(handler, range(4))
    here.now += HOUR_MS
    here.release()
    assert here.entered == []
    assert table(here) == set()


@pytest.mark.requirement("H3", "L4", "L7")
def test_what_waits_of_a_purged_room_gives_up_its_places() -> None:
    """A new event after a rejoin is not behind dead ones."""
    here = Here()
    handler = deferral(here, 1, 1)
    assert len(here.persist(handler, range(1_200))) == 1_199
    here.gone = table(here) - {"$7"}
    here.failures, here.fails = 1, "deferred_of_room"
    here.tell_of_purge("!other")
    here.release()
    assert len(table(here)) == 1_199
    here.tell_of_purge("!room")
    here.transactions = 0
    for _ in range(5):
        here.release()
    assert here.failed == 1
    assert table(here) == {"$7"}, "what is left of the room is deferred as before"
    assert here.transactions < 10
    here.persist(handler, range(2_000, 2_001))
    here.pass_ms(2_000)
    here.pass_ms(2_000)
    assert here.entered == ["$7", "$2000"]


@pytest.mark.requirement("H3", "E4", "L7")
def test_what_was_purged_while_nobody_heard_of_it_is_dropped_at_the_start() -> None:
    here = Here()
    deferred = here.persist(deferral(here, 1, 1), range(200))
    here.gone = deferred - {"$50", "$60"}
    here.due.clear()
    handler = deferral(here, 1, 1)
    assert len(handler._waiting) == 2
    for _ in range(4):
        here.release()
    assert table(here) <= {"$50", "$60"}


@pytest.mark.requirement("E3")
def test_what_is_released_is_counted_by_the_limit_that_deferred_it() -> None:
    def released(limit: str) -> float:
        labels = {"server_name": "here", "limit": limit}
        return REGISTRY.get_sample_value("synapse_sticky_released_total", labels) or 0

    here, before = Here(), released("per_server")
    handler = deferral(here, 1, 1)
    assert len(here.persist(handler, range(4))) == 3
    here.pass_ms(1_000)
    assert released("per_server") == before + 1
    # So it is after a restart; a version of before has not noted which limit it was.
    here.due.clear()
    here.database.execute(
        "UPDATE synapse_sticky_deferred SET past_limit = NULL WHERE event_id ="
        " (SELECT MIN(event_id) FROM synapse_sticky_deferred)"
    )
    handler, unknown = deferral(here, 1, 1), released(NOT_RECORDED)
    here.pass_ms(1_000)
    here.pass_ms(1_000)
    assert len(handler._waiting) == 0
    assert released("per_server") == before + 2
    assert released(NOT_RECORDED) == unknown + 1


def test_report_is_sampled(caplog: pytest.LogCaptureFixture) -> None:
    now_ms = NOW_MS
    report = LimitReport(lambda: now_ms, METRICS.limits)
    caplog.set_level(logging.INFO)
    for _ in range(100):
        report.refused("per_server", "there", "in !room", 1_234, 50)
        report.refused("per_user", "@alice:here", "", 500, 1)
    assert len(caplog.records) == 2
    text = "per_server: refused 50 sticky events of there in !room; asked to retry in 1234 ms"
    assert caplog.records[0].getMessage() == text
    now_ms += 10_000
    report.refused("per_server", "there", "in !room", 1_234, 50)
    assert "refused 5000 sticky events of there" in caplog.records[2].getMessage()
    # What is only observed is told apart.
    observing = LimitReport(lambda: now_ms, METRICS.observed)
    observing.deferred("per_sender", "there", "!room", 7, 3_500, "@a:there")
    observing.refused("max_deferred_per_server", "there", "in !room", None, 2)
    observing.refused("per_user", "@alice:here", "", 500, 1)
    observing.expired(["$1", "$2"], ["per_sender", "per_server"])
    assert [record.getMessage() for record in caplog.records[3:]] == [
        "per_sender: 1 sticky events of there would be deferred in !room, this one by '@a:there'; 7"
        " of its events would be deferred, the last for about 3500 ms",
        "max_deferred_per_server: 2 sticky events of there would be refused in !room",
        "per_user: 1 sticky events of @alice:here would be refused; would be asked to retry in"
        " 500 ms",
        "deferred: 2 sticky events of other servers would expire before their turn, such as $1",
    ]
    caplog.clear()
    # A clock that goes back does not silence it.
    now_ms -= HOUR_MS
    report.refused("per_server", "there", "in !room", 1_234, 1)
    assert len(caplog.records) == 1
