"""What deferral does with the orders of administrators: hold, exempt, release, discard (E3)."""

from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import REGISTRY

from synapse_sticky.config import FederationConfig, LimitConfig, Mode
from synapse_sticky.handlers.deferral.handler import DeferralHandler, NewStickyEvent
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.limits import LimitReport
from synapse_sticky.metrics import LimitMetrics
from synapse_sticky.orders import Orders, Release
from tests.unit.test_limits import NOW_MS, Here, Transaction, done, table

EXPIRED = "deferred_expired"
FREE, HOURLY = LimitConfig(1_000.0, 1_000), LimitConfig(0.001, 1)


class HereWithTurns(Here):
    """One in which others have their turn, too."""

    before_insert: Callable[[], None] = staticmethod(lambda: None)

    on_last_page: Callable[[], None] = staticmethod(lambda: None)

    bad: str | None = None

    async def give_way(self) -> None:
        pass

    async def still_sticky(self, event_ids: Any) -> set[str]:
        if self.bad in event_ids:
            raise ValueError("for the test")
        return await super().still_sticky(event_ids)

    async def transact(self, what: str, function: Any, *args: Any) -> Any:
        found = await super().transact(what, function, *args)
        if what == "deferred" and not found:
            self.on_last_page()
        return found

    def attempt_txn(self, txn: Any, change: Callable[[], None]) -> Exception | None:
        self.before_insert()
        return super().attempt_txn(txn, change)


def deferral(
    here: Here, orders: Orders, limit: LimitConfig | None, mode: Mode = Mode.DEFER
) -> DeferralHandler:
    hs: Any = here
    none = dict.fromkeys(("per_server", "per_server_in_room", "per_room"))
    config = FederationConfig(mode=mode, per_sender=limit, **none)  # type: ignore[arg-type]
    report = LimitReport(here.now_ms, LimitMetrics("here"))
    handler = DeferralHandler(hs, hs, DeferredTable(hs), hs, config.applied(), report, orders)
    handler.install()
    done(handler.load())
    return handler


def limits_in(here: Here) -> set[str]:
    rows = here.database.execute("SELECT past_limit FROM synapse_sticky_deferred")
    return {limit for (limit,) in rows}


def counted(outcome: str, limit: str = "hold") -> float:
    labels = {"server_name": "here", "limit": limit}
    return REGISTRY.get_sample_value(f"synapse_sticky_{outcome}_total", labels) or 0


@pytest.mark.requirement("E3")
@pytest.mark.parametrize("limit", [None, FREE, HOURLY])
def test_a_held_server_waits_whatever_the_limit(limit: LimitConfig | None) -> None:
    here, orders = HereWithTurns(), Orders()
    handler = deferral(here, orders, limit)
    orders.set(held_servers=["there"])
    assert here.persist(handler, range(10)) == {f"${n}" for n in range(10)}
    assert limits_in(here) == {"hold"}
    here.pass_ms(600_000)
    assert here.entered == []
    orders.set()
    for _ in range(10):
        here.pass_ms(1_000)
    # Each in its turn, within the limit.
    assert len(here.entered) == (1 if limit is HOURLY else 10)
    assert len(table(here)) == (9 if limit is HOURLY else 0)


@pytest.mark.requirement("E3")
def test_what_waits_already_is_held_too_and_goes_on_then() -> None:
    here, orders = HereWithTurns(), Orders()
    handler = deferral(here, orders, LimitConfig(10.0, 1))
    deferred = here.persist(handler, range(6))
    assert len(deferred) == 5
    orders.set(held_servers=["there"])
    here.pass_ms(60_000)
    assert here.entered == []
    assert table(here) == deferred
    orders.set(held_servers=["elsewhere"])
    for _ in range(10):
        here.pass_ms(1_000)
    assert set(here.entered) == deferred
    assert here.persist(handler, range(6, 7)) == set()


@pytest.mark.requirement("E3")
def test_what_is_held_is_counted_once_however_often_it_is_tried() -> None:
    here, orders = HereWithTurns(), Orders()
    handler = deferral(here, orders, FREE)
    orders.set(held_servers=["there"])
    before = counted("deferred")
    txn: Any = Transaction(here.database.cursor())
    events = [NewStickyEvent(f"${n}", "!room", "@eve:there", NOW_MS + 1_000, n) for n in range(3)]
    for _ in range(2):
        assert len(handler.defer_txn(txn, events)) == 3
    for callback, args in txn.after:
        callback(*args)
    assert counted("deferred") == before + 3


@pytest.mark.requirement("E3")
@pytest.mark.parametrize("end", ["over", "released", "restart"])
def test_what_was_held_is_counted_as_it_is_released(end: str) -> None:
    here, orders = HereWithTurns(), Orders()
    handler = deferral(here, orders, FREE)
    orders.set(held_servers=["there"])
    here.persist(handler, range(3))
    before = counted("released")
    if end == "released":
        orders.set(held_servers=["there"], releases=[Release("a", "there", None, None)])
    elif end == "restart":
        here.due = []
        deferral(here, Orders(), FREE)
    else:
        orders.set()
    here.pass_ms(1_000)
    assert len(here.entered) == 3
    assert counted("released") == before + 3


@pytest.mark.requirement("E3", "E4")
def test_what_is_held_is_held_after_a_restart() -> None:
    here, orders = HereWithTurns(), Orders()
    orders.set(held_servers=["there"])
    held = here.persist(deferral(here, orders, FREE), range(5))
    here.due = []
    deferral(here, orders, FREE)
    here.pass_ms(60_000)
    assert here.entered == []
    assert table(here) == held
    assert len(held) == 5


@pytest.mark.requirement("E3", "E4", "L4")
@pytest.mark.parametrize("is_held", [False, True])
def test_a_hold_may_begin_or_end_while_what_waits_is_loaded(is_held: bool) -> None:
    here, orders = HereWithTurns(), Orders()
    orders.set(held_servers=["there"])
    held = here.persist(deferral(here, orders, FREE), range(5))
    here.due = []
    before, then = (["elsewhere"], ["there"]) if is_held else (["there"], ["elsewhere"])
    orders = Orders()
    orders.set(held_servers=before)
    here.on_last_page = lambda: orders.set(held_servers=then)
    deferral(here, orders, FREE)
    for _ in range(5):
        here.pass_ms(1_000)
    assert set(here.entered) == (set() if is_held else held)


@pytest.mark.requirement("E3")
@pytest.mark.parametrize("when", ["before_insert", "on_commit"])
def test_one_that_is_under_way_as_a_hold_ends_is_not_forgotten(when: str) -> None:
    here, orders = HereWithTurns(), Orders()
    handler = deferral(here, orders, FREE)
    orders.set(held_servers=["there"])
    setattr(here, when, orders.set)
    assert len(here.persist(handler, range(3))) == 3
    for _ in range(3):
        here.pass_ms(1_000)
    assert len(here.entered) == 3


@pytest.mark.requirement("E3", "H3")
def test_what_waits_after_a_hold_is_not_counted_to_its_end() -> None:
    here, orders = HereWithTurns(), Orders()
    handler = deferral(here, orders, FREE)
    orders.set(held_servers=["there"])
    here.persist(handler, range(5))
    it: Any = here
    txn: Any = Transaction(here.database.cursor())
    assert [DeferredTable(it).count_txn(txn, "there", most) for most in (2, 9)] == [2, 5]


@pytest.mark.requirement("E3")
def test_held_events_expire() -> None:
    here, orders = HereWithTurns(), Orders()
    handler = deferral(here, orders, FREE)
    orders.set(held_servers=["there"])
    here.persist(handler, range(3), for_ms=1_000)
    here.persist(handler, range(3, 5))
    before = counted(EXPIRED)
    here.now += 30_000
    orders.set(held_servers=["there"])
    assert table(here) == {"$3", "$4"}
    assert here.entered == []
    assert counted(EXPIRED) == before + 3


@pytest.mark.requirement("E3")
def test_what_expires_while_the_database_fails_is_counted_as_expired() -> None:
    here = HereWithTurns()
    handler = deferral(here, Orders(), LimitConfig(1.0, 1))
    assert len(here.persist(handler, range(3), for_ms=10_000)) == 2
    before = {outcome: counted(outcome, "per_sender") for outcome in ("released", EXPIRED)}
    here.failures = 1
    here.pass_ms(2_000)
    assert here.failed == 1, "one of them has had its turn"
    for _ in range(4):
        here.pass_ms(20_000)
    assert table(here) == set()
    assert here.entered == []
    assert counted("released", "per_sender") == before["released"]
    assert counted(EXPIRED, "per_sender") == before[EXPIRED] + 2


@pytest.mark.requirement("E3")
@pytest.mark.parametrize("is_discard", [False, True])
@pytest.mark.parametrize(
    ("of", "is_meant"),
    [
        (("there", None, None), True),
        ((None, "!room", None), True),
        ((None, None, "@mallory:there"), True),
        (("there", "!room", "@mallory:there"), True),
        (("elsewhere", None, None), False),
        (("there", "!other", None), False),
        ((None, "!room", "@bob:there"), False),
    ],
)
def test_what_waits_is_released_or_discarded_once(
    of: tuple[str | None, str | None, str | None], is_meant: bool, is_discard: bool
) -> None:
    here, orders = HereWithTurns(), Orders()
    handler = deferral(here, orders, HOURLY)
    deferred = here.persist(handler, range(120))
    assert len(deferred) == 119
    order = Release("a", *of, is_discard=is_discard)
    orders.set(releases=[order])
    assert table(here) == (set() if is_meant else deferred)
    # In the order in which they came.
    in_order = [f"${n}" for n in range(120) if f"${n}" in deferred]
    assert here.entered == (in_order if is_meant and not is_discard else [])
    # It is read again and again, and was about what waited then.
    later = here.persist(handler, range(200, 205))
    orders.set(releases=[order])
    assert later <= table(here)
    here.pass_ms(1_000)
    assert not later & {*here.entered}


@pytest.mark.requirement("E3", "E4")
@pytest.mark.parametrize("is_discard", [False, True])
def test_an_order_is_about_what_waited_as_it_was_made(is_discard: bool) -> None:
    """Whoever sees it later, or once more after a restart, leaves out what has come since."""
    here, orders = HereWithTurns(), Orders()
    handler = deferral(here, orders, HOURLY)
    here.persist(handler, range(5))
    # A row of version 0.1.0.
    here.database.execute("UPDATE synapse_sticky_deferred SET deferred_ms = NULL WHERE rowid = 1")
    made_ms = here.now_ms()
    here.now += 1
    later = here.persist(handler, range(5, 10))
    order = Release("a", "there", None, None, is_discard, made_ms)
    orders.set(releases=[order])
    assert table(here) == later
    here.due, restarted = [], Orders()
    deferral(here, restarted, HOURLY)
    restarted.set(releases=[order])
    assert table(here) == later
    assert len(later) == 5


@pytest.mark.requirement("E3")
def test_what_is_held_can_be_released() -> None:
    here, orders = HereWithTurns(), Orders()
    handler = deferral(here, orders, FREE)
    orders.set(held_servers=["there"])
    held = here.persist(handler, range(5))
    orders.set(held_servers=["there"], releases=[Release("a", "there", None, None)])
    assert set(here.entered) == held
    assert here.persist(handler, range(5, 6)) == {"$5"}


@pytest.mark.requirement("E3", "E4")
def test_an_order_that_fails_is_done_later(caplog: pytest.LogCaptureFixture) -> None:
    here, orders = HereWithTurns(), Orders()
    handler = deferral(here, orders, HOURLY)
    deferred = here.persist(handler, range(5))
    here.fails, here.failures = "deferred_of", 1
    order = Release("a", "there", None, None)
    orders.set(releases=[order])
    assert table(here) == deferred
    assert "Could not do what was ordered, trying again in" in caplog.text
    for _ in range(10):
        here.pass_ms(10_000)
    assert set(here.entered) == deferred


@pytest.mark.requirement("E3", "E4")
def test_the_end_of_a_hold_is_not_forgotten_if_the_database_fails_then() -> None:
    here, orders = HereWithTurns(), Orders()
    handler = deferral(here, orders, FREE)
    orders.set(held_servers=["there"])
    held = here.persist(handler, range(5))
    here.fails, here.failures = "deferred", 1
    orders.set()
    assert here.failed == 1
    for _ in range(3):
        here.pass_ms(10_000)
    assert set(here.entered) == held


@pytest.mark.requirement("E3", "E4")
@pytest.mark.parametrize("is_discard", [False, True])
def test_what_an_order_could_not_do_before_it_was_over_has_its_turn(is_discard: bool) -> None:
    here, orders = HereWithTurns(), Orders()
    handler = deferral(here, orders, LimitConfig(1.0, 1))
    deferred = here.persist(handler, range(5))
    here.fails, here.failures = "drop_deferred" if is_discard else "release", 1
    orders.set(releases=[Release("a", "there", None, None, is_discard)])
    orders.set()
    assert here.failed == 1
    here.pass_ms(2_000)
    here.persist(handler, range(5, 7))
    for _ in range(10):
        here.pass_ms(2_000)
    assert deferred <= set(here.entered)


@pytest.mark.requirement("E3", "H1")
def test_one_that_cannot_be_released_does_not_hold_up_the_order() -> None:
    here, orders = HereWithTurns(), Orders()
    handler = deferral(here, orders, HOURLY)
    deferred = here.persist(handler, range(5))
    here.bad = "$3"
    orders.set(releases=[Release("a", "there", None, None)])
    assert set(here.entered) == deferred - {"$3"}
    here.bad = None
    for _ in range(10):
        here.pass_ms(10_000)
    assert set(here.entered) == deferred


@pytest.mark.requirement("E3", "L7")
def test_who_is_exempt_does_not_wait() -> None:
    here, orders = HereWithTurns(), Orders()
    handler = deferral(here, orders, HOURLY)
    assert len(here.persist(handler, range(3))) == 2
    orders.set(exempt_users=["@mallory:there"])
    assert here.persist(handler, range(3, 6)) == set()
    orders.set(exempt_servers=["there"])
    assert here.persist(handler, range(6, 9)) == set()
    # A hold comes first.
    orders.set(exempt_servers=["there"], held_servers=["there"])
    assert len(here.persist(handler, range(9, 12))) == 3
    orders.set()
    assert len(here.persist(handler, range(12, 15))) == 3


@pytest.mark.requirement("E3", "H6")
@pytest.mark.parametrize("mode", [Mode.OFF, Mode.OBSERVE])
def test_without_limits_nothing_is_held(mode: Mode) -> None:
    here, orders = HereWithTurns(), Orders()
    held = here.persist(deferral(here, orders, HOURLY), range(3))
    assert len(held) == 2
    orders.set(held_servers=["there"])
    here.due = []
    # The way out: `mode: off` releases all at the start.
    deferral(here, orders, HOURLY, mode)
    for _ in range(3):
        here.pass_ms(1_000)
    assert set(here.entered) == held
