"""Limits that are observed without being applied: the counts of deferral, and nothing else."""

import gc
import math
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pytest
from prometheus_client import REGISTRY

from synapse_sticky.config import FederationConfig, LimitConfig, LocalConfig, LocalMode, Mode
from synapse_sticky.handlers.deferral import observer as observer_module
from synapse_sticky.handlers.deferral.handler import DeferralHandler, NewStickyEvent
from synapse_sticky.handlers.deferral.observer import Observer
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.sending.handler import LocalSend, SendingHandler
from synapse_sticky.limits import LimitReport
from tests.unit.settable import METRICS
from tests.unit.test_limits import HOUR_MS, NOW_MS, Here, Transaction, done

_NAMES = ("deferred", "released", "refused", "observed")
_PREFIXES = tuple(f"synapse_sticky_{name}" for name in _NAMES)


class Cursor:
    """All that an observer may use of a transaction."""

    def __init__(self) -> None:
        self.after: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def call_after(self, callback: Callable[..., object], *args: Any) -> None:
        self.after.append((callback, args))


class There(Here):
    """The same homeserver, whose events may be redacted."""

    def __init__(self) -> None:
        super().__init__()
        gc.collect()  # what waited in another one is shown no more
        self.gone: set[str] = set()
        self.defer_txn: Any = None
        self.changed: Any = None

    def defer_by(self, defer_txn: Any) -> None:
        self.defer_txn = defer_txn

    def on_event_changed(self, callback: Any) -> None:
        self.changed = callback

    async def still_sticky(self, event_ids: Any) -> set[str]:
        return set(event_ids) - self.gone

    def redact(self, event_id: str) -> None:
        self.gone.add(event_id)
        self.changed(event_id)

    def take_in(self, events: Sequence[NewStickyEvent], attempts: int = 1) -> Collection[str]:
        """What Synapse does with new events, in a transaction that is tried so often."""
        deferred: Collection[str] = ()
        after: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        for attempt in range(1, attempts + 1):
            txn = self._cursor()
            self.database.execute("BEGIN")
            deferred = self.defer_txn(txn, events)
            self.database.execute("COMMIT" if attempt == attempts else "ROLLBACK")
            after += txn.after
        for callback, args in after:
            callback(*args)
        return deferred

    def _cursor(self) -> Any:
        return Cursor()


class Deferring(There):
    """One that really defers."""

    def _cursor(self) -> Any:
        return Transaction(self.database.cursor())


def limited(most: int = 1_000, **limits: LimitConfig) -> FederationConfig:
    none = dict.fromkeys(("per_server", "per_server_in_room", "per_sender", "per_room"))
    options: Any = {**none, **limits}
    return FederationConfig(mode=Mode.OBSERVE, max_deferred_per_server=most, **options)


def observing(config: FederationConfig) -> There:
    here = There()
    hs: Any = here
    Observer(hs, hs, hs, config, LimitReport(here.now_ms, METRICS.observed)).install()
    return here


def deferring(config: FederationConfig) -> There:
    here = Deferring()
    hs: Any = here
    report = LimitReport(here.now_ms, METRICS.limits)
    handler = DeferralHandler(hs, hs, DeferredTable(hs), hs, config, report)
    handler.install()
    done(handler.load())
    return here


def events(
    numbers: Iterable[int], sender: str = "@mallory:there", for_ms: int = HOUR_MS
) -> list[NewStickyEvent]:
    return [NewStickyEvent(f"${n}", "!room", sender, NOW_MS + for_ms, n) for n in numbers]


def counts() -> dict[str, float]:
    """What is counted, by name and limit; gauges as well."""
    found: dict[str, float] = defaultdict(float)
    for metric in REGISTRY.collect():
        for sample in metric.samples if metric.name.startswith(_PREFIXES) else ():
            if sample.labels["server_name"] != "here" or sample.name.endswith("_created"):
                continue
            name = metric.name.removeprefix("synapse_sticky_")
            # What is only observed is counted under another name.
            name = sample.labels.get("outcome", name.replace("observed", "deferred"))
            name = name.replace("deferred_expired", "expired")
            value = 0 if math.isnan(sample.value) else sample.value
            found[f"{name} {sample.labels.get('limit', '')}".strip()] += value
    return found


def counted(since: dict[str, float]) -> dict[str, float]:
    """By how much it is more than then."""
    return {
        name: value - since.get(name, 0)
        for name, value in counts().items()
        if value != since.get(name, 0)
    }


def storm(here: There, seed: int) -> list[dict[str, float]]:
    """Floods, redactions and time, at random but for the seed. Gives what was counted by then."""
    dice, number = random.Random(seed), 0
    since, found = counts(), []
    for _ in range(150):
        batch = []
        for _ in range(dice.randrange(6)):
            number += 1
            server = dice.choice(["there", "elsewhere", "exempt.example", "here"])
            sender = f"@{dice.choice(['mallory', 'mary'])}:{server}"
            room_id = dice.choice(["!room", "!other"])
            expires_at_ms = here.now + dice.choice([300, 2_000, HOUR_MS])
            batch.append(NewStickyEvent(f"${number}", room_id, sender, expires_at_ms, number))
        here.take_in(batch, dice.randint(1, 3))
        if number and dice.random() < 0.3:
            here.redact(f"${dice.randint(1, number)}")
        here.pass_ms(dice.choice([0, 5, 40, 200, 700]))
        found.append(counted(since))
    return found


@pytest.mark.requirement("H6", "L4")
@pytest.mark.parametrize("seed", range(10))
def test_counts_are_those_of_deferral(seed: int) -> None:
    config = FederationConfig(
        per_server=LimitConfig(4, 8),
        per_server_in_room=LimitConfig(3, 5),
        per_sender=LimitConfig(2, 3),
        per_room=LimitConfig(5, 9),
        exempt_servers=("*.example",),
    )
    deferred = storm(deferring(config), seed)
    here = observing(config)
    assert storm(here, seed) == deferred
    names = {name.partition(" ")[0] for name in deferred[-1]}
    assert {"deferred", "released", "expired"} <= names
    # Nothing of it is anywhere: no table was made, nothing entered the stream.
    assert here.entered == []
    assert here.database.execute("SELECT * FROM sqlite_master").fetchall() == []


@pytest.mark.requirement("H6")
def test_nothing_is_deferred() -> None:
    here, since = observing(limited(per_server=LimitConfig(0.001, 2))), counts()
    assert here.take_in(events(range(5))) == ()
    assert counted(since) == {"deferred per_server": 3, "deferred_waiting": 3}


@pytest.mark.requirement("H6", "L4")
@pytest.mark.parametrize("make", [observing, deferring])
def test_a_transaction_that_is_tried_again_counts_once(
    make: Callable[[FederationConfig], There],
) -> None:
    here, since = make(limited(per_server=LimitConfig(0.001, 2))), counts()
    here.take_in(events(range(5)), attempts=4)
    assert counted(since) == {"deferred per_server": 3, "deferred_waiting": 3}
    # Nothing was charged twice either.
    here.pass_ms(1_000_000)
    assert counted(since) == {
        "deferred per_server": 3,
        "deferred_waiting": 2,
        "released per_server": 1,
    }


@pytest.mark.requirement("H6", "L2")
def test_what_a_full_server_sends_counts_as_refused() -> None:
    here, since = observing(limited(3, per_sender=LimitConfig(0.001, 1))), counts()
    here.take_in(events(range(6)), attempts=3)
    full = {"deferred per_sender": 3, "deferred_waiting": 3}
    assert counted(since) == {**full, "refused max_deferred_per_server": 2}
    # Its other users as well, although they are within their limit, and are not charged.
    here.take_in(events(range(6, 8), "@mary:there"), attempts=2)
    assert counted(since) == {**full, "refused max_deferred_per_server": 4}
    # But no other server.
    here.take_in(events(range(8, 10), "@bob:elsewhere"))
    assert counted(since)["deferred per_sender"] == 4
    # There is room again.
    here.pass_ms(1_000_000)
    here.take_in(events(range(10, 11), "@mary:there"))
    here.take_in(events(range(11, 12)))
    assert counted(since) == {
        "deferred per_sender": 5,
        "released per_sender": 2,
        "deferred_waiting": 3,
        "refused max_deferred_per_server": 4,
    }


@pytest.mark.requirement("H3", "H6", "L6")
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer_module, "MAX_FOLLOWED", 10)
    here, since = observing(limited(4, per_server=LimitConfig(0.001, 1))), counts()
    for server in range(20):
        numbers = range(10 * server, 10 * server + 4)
        here.take_in(events(numbers, f"@mallory:server{server}"), attempts=2)
    # All are counted, and ten are followed.
    assert counted(since) == {"deferred per_server": 60, "deferred_waiting": 10}
    here.pass_ms(HOUR_MS)
    assert counted(since) == {"deferred per_server": 60, "expired per_server": 10}


@pytest.mark.requirement("H3", "H6")
def test_many_events_are_dropped_in_pieces() -> None:
    here, since = observing(limited(2_000, per_server=LimitConfig(0.001, 1))), counts()
    here.take_in(events(range(1_201)))
    left = []
    here.pass_ms(HOUR_MS)
    while here.due:
        left.append(counted(since)["deferred_waiting"])
        assert here.due_ms - here.now == 20, "the reactor has its turn"
        here.pass_ms(20)
    assert left == [700, 200]
    assert counted(since) == {"deferred per_server": 1_200, "expired per_server": 1_200}


@pytest.mark.requirement("H1", "H2", "H6")
def test_failures_are_told_once_and_reach_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = observing(limited(per_server=LimitConfig(0.001, 1)))

    def fails(*args: object) -> Any:
        raise ValueError("for the test")

    with monkeypatch.context() as patched:
        patched.setattr(here, "now_ms", fails)
        for _ in range(3):
            assert here.take_in(events(range(3))) == ()
    since = counts()
    with monkeypatch.context() as patched:
        patched.setattr(LimitReport, "deferred", fails)
        here.take_in(events(range(10, 13)))
    assert [record.getMessage() for record in caplog.records] == [
        "Could not observe sticky events; the next such errors are hidden"
    ]
    # It goes on as if nothing had been.
    here.take_in(events(range(20, 22)))
    assert counted(since)["deferred per_sender"] == 2, "behind the sender's first"


@pytest.mark.requirement("H2", "H6", "S5")
def test_redactions_are_asked_about_again_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here, since = observing(limited(per_server=LimitConfig(0.001, 1))), counts()
    here.take_in(events(range(4)))
    asked = 0

    async def fails(event_ids: object) -> set[str]:
        nonlocal asked
        asked += 1
        raise OSError("for the test")

    with monkeypatch.context() as patched:
        patched.setattr(here, "still_sticky", fails)
        for number in range(100):
            here.redact(f"${2 + number % 2}")
            here.pass_ms(100)
    assert asked == 1, "in ten seconds, whatever wakes it"
    assert len(caplog.records) == 1
    assert counted(since)["deferred_waiting"] == 3
    here.pass_ms(10_000)
    assert counted(since) == {"deferred per_server": 3, "deferred_waiting": 1}


@pytest.mark.requirement("E1", "H6")
@pytest.mark.parametrize("mode", [LocalMode.REJECT, LocalMode.OBSERVE])
def test_local_users(mode: LocalMode, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    here, since = There(), counts()
    hs: Any = here
    observes = mode is LocalMode.OBSERVE
    report = LimitReport(here.now_ms, METRICS.observed if observes else METRICS.limits)
    sending = SendingHandler(hs, hs, LocalConfig(mode, LimitConfig(0.001, 3)), report)

    async def is_exempt() -> bool:
        return False

    request = LocalSend("@alice:here", is_exempt, is_exempt)
    refusals = [done(sending.check(request)) is not None for _ in range(5)]
    assert refusals == [False] * 3 + [not observes] * 2
    assert counted(since) == {"refused per_user": 2}
    assert ("would be refused" in caplog.text) is observes
