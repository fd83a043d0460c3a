"""A panic of the Rust core is an error like any other, and what has panicked is made anew (H1)."""

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from synapse_sticky._core import (
    Limiter,
    PanickedError,
    ReleaseQueue,
    StickyIndex,
    sticky_until_ms,
)
from synapse_sticky.config import FederationConfig, LimitConfig, LocalConfig, Mode
from synapse_sticky.handlers.deferral.handler import DeferralHandler
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.receipt.handler import ReceiptHandler, ReceivedPdu, Transaction
from synapse_sticky.handlers.receipt.staged import Page, StickyPdu
from synapse_sticky.handlers.sending.handler import LocalSend, SendingHandler
from synapse_sticky.index import IndexFollower, StickyRow
from synapse_sticky.limits import LimitReport
from synapse_sticky.renewal import Renewed
from tests.lab.faults import panic_in
from tests.unit.process import Process
from tests.unit.settable import METRICS
from tests.unit.test_limits import HOUR_MS, NOW_MS, done, table

ROOT = Path(__file__).parents[2]
ROW = (1, "here", "!room", "$1", "@alice:here", NOW_MS + HOUR_MS)

pytestmark = pytest.mark.requirement("H1")


def is_unfit(duty: str) -> bool:
    labels = {"server_name": "here", "duty": duty, "state": "unfit"}
    return REGISTRY.get_sample_value("synapse_sticky_duty", labels) == 1


def panics(duty: str) -> float:
    labels = {"server_name": "here", "duty": duty}
    return REGISTRY.get_sample_value("synapse_sticky_panics_total", labels) or 0


@pytest.fixture(autouse=True)
def _all_are_on() -> None:
    for duty in ("index", "receipt", "deferral", "sending"):
        METRICS.set_duty(duty, "on")


# The core


def test_no_wheel_can_be_told_to_panic() -> None:
    features = re.findall(r"^features = (.*)$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert features == ['["extension-module"]']
    assert re.findall(r"^default = (.*)$", (ROOT / "Cargo.toml").read_text(), re.M) == ["[]"]


CALLS: list[tuple[str, Callable[[Callable[[str], object]], Any], Callable[[Any], object]]] = [
    ("StickyIndex", lambda tell: StickyIndex("here", on_panic=tell), lambda o: o.insert([ROW])),
    ("StickyIndex", lambda tell: StickyIndex("here", on_panic=tell), lambda o: o.in_step({})),
    ("StickyIndex", lambda tell: StickyIndex("here", on_panic=tell), len),
    ("Limiter", lambda tell: Limiter({}, 1, on_panic=tell), lambda o: o.admit_user("@a:b", 0)),
    ("ReleaseQueue", lambda tell: ReleaseQueue(on_panic=tell), lambda o: o.next_due_ms(0)),
    ("ReleaseQueue", lambda tell: ReleaseQueue(on_panic=tell), lambda o: "$1" in o),
]


@pytest.mark.parametrize(("name", "make", "call"), CALLS)
def test_what_has_panicked_is_of_no_use(name: str, make: Any, call: Any) -> None:
    told: list[str] = []
    broken, other = make(told.append), make(told.append)
    panic_in(name, 1)
    for _ in range(3):
        with pytest.raises(PanickedError, match=f"{name} panicked in Rust"):
            call(broken)
    assert len(told) == 1
    call(other)
    assert issubclass(PanickedError, Exception)


def test_a_queue_that_panics_takes_the_limiter_with_it() -> None:
    told: list[str] = []
    queue = ReleaseQueue(on_panic=lambda message: told.append("queue"))
    limiter = Limiter({}, 1, on_panic=lambda message: told.append("limiter"))
    panic_in("ReleaseQueue", 1)
    with pytest.raises(PanickedError):
        queue.take(limiter, NOW_MS, 1)
    with pytest.raises(PanickedError):
        limiter.admit_user("@a:b", NOW_MS)
    assert told == ["queue", "limiter"]


@pytest.mark.parametrize("what", ["sticky_until_ms", "field", "origin_server_ts", "received_ts_ms"])
def test_a_function_or_an_argument_panics(what: str) -> None:
    panic_in(what, 1)
    with pytest.raises(PanickedError, match=what):
        sticky_until_ms({"duration_ms": 1}, NOW_MS, NOW_MS)
    assert sticky_until_ms({"duration_ms": 1}, NOW_MS, NOW_MS) == NOW_MS + 1


@pytest.mark.parametrize("what", ["rows", "event_id"])
def test_a_row_panics_and_the_index_is_as_it_was(what: str) -> None:
    index = StickyIndex("here")
    panic_in(what, 1)
    with pytest.raises(PanickedError, match=what):
        index.insert([ROW])
    assert len(index) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_who_is_told_may_fail() -> None:
    def fails(message: str) -> None:
        raise OSError("for the test")

    index = StickyIndex("here", on_panic=fails)
    panic_in("StickyIndex", 1)
    with pytest.raises(PanickedError):
        len(index)


# What is made anew


def renewed(process: Process, **more: Any) -> Renewed[StickyIndex]:
    hs: Any = process
    return Renewed(hs, "index", lambda tell: StickyIndex("here", on_panic=tell), **more)


def break_(one: Renewed[StickyIndex]) -> None:
    panic_in("StickyIndex", 1)
    with pytest.raises(PanickedError):
        len(one.it)


def test_another_one_is_there_at_once_and_whole_after_a_while(
    caplog: pytest.LogCaptureFixture,
) -> None:
    process, whole = Process(), []
    one = renewed(process, on_whole=lambda: whole.append(True))
    first, before = one.it, panics("index")
    break_(one)
    assert one.it is not first
    assert len(one.it) == 0
    assert not one.is_whole
    process.take_turns()
    assert is_unfit("index")
    assert panics("index") == before + 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "index is unfit: StickyIndex panicked in Rust: a test asked for it" in caplog.text
    process.pass_ms(2_000)
    assert one.is_whole
    assert not is_unfit("index")
    assert whole == [True]


@pytest.mark.requirement("H2")
def test_panic_after_panic_it_waits_for_longer(caplog: pytest.LogCaptureFixture) -> None:
    """Somebody may know how to make one."""
    process, count = Process(), 0
    one = renewed(process)
    for _ in range(36_000):
        if one.is_whole:
            count += 1
            break_(one)
            # It is woken by others before the panic is known.
            one.filling.wake()
            process.take_turns()
            assert not one.is_whole
        process.pass_ms(100)
        assert len(process.timers) <= 1
    # 1, 2, 4, 8, 16, 32 and then 60 s, give or take a fifth.
    assert 40 < count < 90
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == count


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_making_it_may_panic_too() -> None:
    process = Process()
    one = renewed(process)
    panic_in("a constructor", 1)
    break_(one)
    process.take_turns()
    process.pass_ms(10_000)
    assert one.is_whole
    assert len(one.it) == 0


def test_one_that_panics_while_it_is_filled_is_filled_again() -> None:
    process = Process()
    fills = 0

    async def fill() -> None:
        nonlocal fills
        fills += 1
        if fills == 1:
            break_(one)

    one = renewed(process, fill=fill)
    break_(one)
    process.take_turns()
    process.pass_ms(1_200)  # the first delay, at the longest
    assert fills == 1
    assert not one.is_whole
    process.pass_ms(2_400)  # the second delay, at the longest
    assert fills == 2
    assert one.is_whole


# The duties


class Stream:
    """A sticky events stream of one writer, and what is told of it."""

    writers = ("here",)

    def __init__(self, *rows: StickyRow) -> None:
        self.all = list(rows)
        self.advance: Callable[[], None] = lambda: None
        self.reads = 0
        self.fails = False

    def positions(self) -> dict[str, int]:
        return {"here": max((row.stream_id for row in self.all), default=0)}

    async def rows(self, *, after: int, up_to: int, limit: int) -> list[StickyRow]:
        self.reads += 1
        if self.fails:
            raise OSError("the database is away")
        return [row for row in self.all if after < row.stream_id <= up_to][:limit]

    async def rows_at(self, stream_ids: Mapping[str, int]) -> list[StickyRow]:
        return [row for row in self.all if row.event_id in stream_ids]

    def on_advance(self, callback: Callable[[], None]) -> None:
        self.advance = callback

    def on_event_changed(self, callback: Any) -> None: ...
    def on_room_purged(self, callback: Any) -> None: ...
    def on_retention_changed(self, callback: Any) -> None: ...
    def on_user_redacted(self, callback: Any) -> None: ...

    def on_persisted(self, callback: Any) -> None: ...


def row(number: int, room_id: str = "!room") -> StickyRow:
    expires_at_ms = NOW_MS + HOUR_MS
    return StickyRow(number, "here", room_id, f"${number}", "@alice:here", expires_at_ms, True)


def following(process: Process, stream: Any) -> IndexFollower:
    hs: Any = process
    follower = IndexFollower(hs, stream)
    follower.start()
    return follower


@pytest.mark.requirement("D1", "P3")
@pytest.mark.parametrize("at", ["a question", "an insertion", "the expiry"])
def test_the_index_is_filled_from_the_table(at: str) -> None:
    process, stream = Process(), Stream(row(1), row(2, "!other"))
    told: list[set[str]] = []
    follower = following(process, stream)
    assert follower.in_step()
    follower.on_new_events(lambda rooms: told.append(set(rooms)))
    panic_in("StickyIndex", 1)
    if at == "a question":
        with pytest.raises(PanickedError):
            follower.has_taken_in({"here": 2})
    elif at == "an insertion":
        stream.all.append(row(3))
        with pytest.raises(PanickedError):
            # Not the first call: that is the question whether there is anything new.
            follower.index.insert([])
        stream.advance()
    else:
        process.pass_ms(10_000)
    process.take_turns()
    assert not follower.in_step(), "the database answers meanwhile"
    assert is_unfit("index")
    assert not follower.is_whole
    told.clear()
    process.pass_ms(60_000)
    assert follower.in_step()
    assert not is_unfit("index")
    assert all(known.event_id in follower.index for known in stream.all)
    # Whoever keeps to what the index says is told once it has all of it.
    assert told == [{"!room", "!other"}]
    # What is done every ten seconds goes on.
    process.now += HOUR_MS
    process.pass_ms(20_000)
    assert len(follower.index) == 0


def deferring(process: Process) -> DeferralHandler:
    limit = LimitConfig(1, 2)
    config = FederationConfig(
        per_server=limit, per_server_in_room=None, per_sender=None, per_room=None
    )
    hs: Any = process
    handler = DeferralHandler(
        hs, hs, DeferredTable(hs), hs, config, LimitReport(process.now_ms, METRICS.limits)
    )
    handler.install()
    done(handler.load())
    return handler


@pytest.mark.requirement("L4", "E4")
@pytest.mark.parametrize("at", ["a decision", "a release", "the commit"])
def test_the_queue_is_filled_from_its_rows(at: str) -> None:
    process = Process()
    handler = deferring(process)
    deferred = process.persist(handler, range(10))
    assert deferred == {f"${n}" for n in range(2, 10)}
    if at == "the commit":
        # Nobody but the transaction's own decision is asked before it.
        process.on_commit = lambda: panic_in("ReleaseQueue", 1)
        deferred |= process.persist(handler, range(10, 12))
        assert len(deferred) == 10
    else:
        panic_in("ReleaseQueue", 1)
    if at == "a decision":
        assert process.persist(handler, range(10, 13)) == set()
    process.take_turns()
    process.pass_ms(30_000)
    assert panic_is_over()
    assert table(process) == set()
    assert set(process.entered) == deferred
    assert len(process.entered) == len(deferred)
    assert not is_unfit("deferral")


def panic_is_over() -> bool:
    """Has what was armed happened?"""
    return len(ReleaseQueue()) == 0


@pytest.mark.requirement("L4")
def test_while_the_queue_is_made_anew_events_are_delivered() -> None:
    process = Process()
    handler = deferring(process)
    process.persist(handler, range(10))
    panic_in("ReleaseQueue", 1)
    assert process.persist(handler, range(10, 12)) == set(), "its own transaction"
    process.take_turns()
    assert is_unfit("deferral")
    assert process.persist(handler, range(12, 20)) == set()
    assert len(table(process)) == 8
    process.pass_ms(1_300)
    assert not is_unfit("deferral")
    assert process.persist(handler, range(20, 30)), "the limits apply again"


@pytest.mark.requirement("E1")
def test_local_users_send_while_the_limiter_is_made_anew() -> None:
    process = Process()
    hs: Any = process
    config = LocalConfig(per_user=LimitConfig(0.001, 1))
    sending = SendingHandler(hs, Sink(), config, LimitReport(process.now_ms, METRICS.limits))

    async def no() -> bool:
        return False

    def send() -> bool:
        return done(sending.check(LocalSend("@alice:here", no, no))) is None

    assert [send(), send()] == [True, False]
    panic_in("Limiter", 1)
    with pytest.raises(PanickedError):
        send()
    process.take_turns()
    assert is_unfit("sending")
    assert [send(), send(), send()] == [True, True, True]
    process.pass_ms(1_300)
    assert not is_unfit("sending")
    assert [send(), send()] == [True, False], "full buckets"


class Sink:
    """A side of Synapse's that is told what to ask, and asks nothing."""

    def limit_sticky(self, check: object) -> None: ...
    def check_transactions(self, check: object) -> None: ...

    async def is_answered(self, origin: str, transaction_id: str) -> bool:
        return False

    def tell_staged(self, staged: object) -> None: ...

    def has_more_txn(self, txn: object, origin: str, at_most: int) -> bool:
        return False

    def page_txn(self, *_: object) -> Page:
        return Page([], "", 0)

    def pdus_txn(self, *_: object) -> list[StickyPdu]:
        return []

    def staged_txn(self, *_: object) -> list[str]:
        return []


@pytest.mark.requirement("L2")
def test_transactions_are_accepted_while_the_limiter_is_made_anew() -> None:
    process = Process()
    hs: Any = process
    config = FederationConfig(mode=Mode.REJECT, per_server=LimitConfig(0.001, 1))
    report = LimitReport(process.now_ms, METRICS.limits)
    receipt = ReceiptHandler(hs, Sink(), DeferredTable(hs), config, report)
    sent = 0

    def accepts() -> bool:
        nonlocal sent
        sent += 1
        pdu = ReceivedPdu("!room", "@eve:there", {"duration_ms": HOUR_MS}, process.now)
        transaction = Transaction("there", str(sent), [pdu], [{"number": sent}])
        return done(receipt.check(transaction)) is None

    assert [accepts(), accepts()] == [True, False]
    panic_in("Limiter", 1)
    with pytest.raises(PanickedError):
        accepts()
    process.take_turns()
    assert is_unfit("receipt")
    assert [accepts(), accepts()] == [True, True]
    process.pass_ms(1_300)
    assert [accepts(), accepts()] == [True, False], "full buckets"
