"""The newest of what a sender has waiting is delivered first, and who may send more (L4, L7)."""

import logging
import sqlite3
from collections.abc import Awaitable
from typing import Any

import pytest
from synapse.module_api.errors import ConfigError

from synapse_sticky.config import FederationConfig, LimitConfig, LocalConfig, parse
from synapse_sticky.handlers.deferral.handler import DeferralHandler, NewStickyEvent
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.deferral.waiting import Waiting
from synapse_sticky.handlers.sending.handler import LocalSend, SendingHandler
from synapse_sticky.index.key import key_of
from synapse_sticky.limits import LimitReport, Refusal
from tests.unit.settable import METRICS
from tests.unit.test_limits import HOUR_MS, NOW_MS, Here, Transaction, deferral, done

GATEWAY = "@gateway-7:there"
KEY = key_of("m.rtc.member", {"msc4354_sticky_key": "a"})


def event(number: int, key: int | None = KEY, sender: str = "@flapper:there") -> NewStickyEvent:
    sent_ms = NOW_MS + number
    return NewStickyEvent(
        f"${number}", "!room", sender, sent_ms + HOUR_MS, number, key, sent_ms + HOUR_MS
    )


def persist(here: Here, handler: DeferralHandler, events: list[NewStickyEvent]) -> int:
    """Gives how many of them are deferred."""
    txn = Transaction(here.database.cursor())
    deferred = handler.defer_txn(txn, events)  # type: ignore[arg-type]  # as far as needed
    for callback, args in txn.after:
        callback(*args)
    return len(deferred)


def release_until(here: Here, event_id: str) -> list[str]:
    """What is entered into the stream before the event."""
    for _ in range(1_000):
        if event_id in here.entered:
            return here.entered[: here.entered.index(event_id)]
        here.pass_ms(max(0, here.due_ms - here.now))
    raise AssertionError(f"{event_id} does not come")


@pytest.mark.requirement("L4", "L7")
def test_leave_of_one_that_flaps_goes_after_at_most_two_others() -> None:
    here = Here()
    handler = deferral(here, 2.0, 1)
    for number in range(200):
        persist(here, handler, [event(number)])
        here.pass_ms(200)
    persist(here, handler, [event(200)])
    here.entered.clear()
    assert len(release_until(here, "$200")) <= 2


@pytest.mark.requirement("L4", "L7")
def test_newest_is_first_after_a_restart() -> None:
    here = Here()
    # By ID, the order in which they are read, the newest is none of the first.
    persist(here, deferral(here, 0.001, 1), [event(number) for number in range(100, 50, -1)])
    here.due.clear()
    deferral(here, 2.0, 1)
    # $100 was delivered before.
    assert release_until(here, "$99") == []
    assert len(release_until(here, "$98")) == 1


@pytest.mark.requirement("L4")
def test_rows_of_an_earlier_layout_are_keys_of_their_own() -> None:
    here = Here()
    for statement in DeferredTable.migrations[0]:
        here.database.execute(statement)
    rows = [(f"${n}", "!room", "@a:there", "there", NOW_MS + HOUR_MS + n, n) for n in range(3)]
    insert = "INSERT INTO synapse_sticky_deferred VALUES (?, ?, ?, ?, ?, ?)"
    here.database.executemany(insert, rows)
    deferral(here, 2.0, 1)
    assert release_until(here, "$0") == ["$2", "$1"]
    # A process of the version before still writes its rows.
    columns = "event_id, room_id, sender, server, expires_at_ms, event_stream_ordering"
    here.database.execute(
        f"INSERT INTO synapse_sticky_deferred ({columns}) VALUES (?, ?, ?, ?, ?, ?)", rows[0]
    )


@pytest.mark.requirement("L4")
def test_keys_that_can_be_read() -> None:
    assert KEY == key_of("m.rtc.member", {"sticky_key": "a", "other": 1}) is not None
    assert key_of("m.rtc.member", {"sticky_key": "b"}) != KEY
    assert key_of("m.rtc.slot", {"sticky_key": "a"}) != KEY
    assert key_of("a", {"sticky_key": "bc"}) != key_of("ab", {"sticky_key": "c"})
    assert key_of("m.room.encrypted", {"sticky_key": "a"}) is None
    strange: list[object] = [None, [], "a", {}, {"sticky_key": 1}, {"msc4354_sticky_key": None}]
    assert [key_of("m.rtc.member", content) for content in strange] == [None] * len(strange)
    for key in ("\ud800", "x" * 65_536, ""):
        hashed = key_of("m.rtc.member", {"sticky_key": key})
        assert hashed is not None
        # The database takes it.
        found = sqlite3.connect(":memory:").execute("SELECT ?", (hashed,)).fetchone()
        assert found == (hashed,)


def waiting(here: Here, **options: Any) -> Waiting:
    config = FederationConfig(**options)
    hs: Any = here
    return Waiting(hs, config, LimitReport(here.now_ms, METRICS.limits))


@pytest.mark.requirement("L7")
def test_exempt_user_is_not_held_up_by_the_limit_on_a_sender() -> None:
    here = Here()
    exempting = waiting(here, exempt_users=("@gateway-*:there",))
    # 200 join and leave at once.
    events = [event(number, None, GATEWAY) for number in range(400)]
    assert exempting.decide(events) == []
    others = [event(number, None, "@other:there") for number in range(1_000, 1_400)]
    assert len(exempting.decide(others)) == 340
    # Here it is the server that is past its limit in the room.
    assert {
        past.limit
        for past in exempting.decide([event(n, None, GATEWAY) for n in range(3_000, 4_000)])
    } == {"per_server_in_room"}


@pytest.mark.requirement("L7")
def test_exempt_user_waits_for_the_server_alone() -> None:
    here = Here()
    held = waiting(
        here, per_server_in_room=LimitConfig(20.0, 100), exempt_users=("@gateway-*:there",)
    )
    events = [event(number, None, GATEWAY) for number in range(150)]
    past = held.decide(events)
    held.committed(events, past)
    assert [new.limit for new in past] == ["per_server_in_room"] * 50
    here.now += 1_000
    # 2 a second is what others may.
    assert len(held.take(100)) == 20


def result(awaitable: Awaitable[Any]) -> Any:
    return done(awaitable)


@pytest.mark.requirement("E1", "L7")
def test_exempt_local_user() -> None:
    here = Here()
    hs: Any = here
    config = LocalConfig(exempt_users=("@gateway-*:here",))
    handler = SendingHandler(hs, hs, config, LimitReport(here.now_ms, METRICS.limits))

    async def no() -> bool:
        return False

    def refused(user_id: str) -> int:
        answers = [result(handler.check(LocalSend(user_id, no, no))) for _ in range(400)]
        return sum(answer is not None for answer in answers)

    assert refused("@gateway-7:here") == 0
    assert refused("@gateway:here") == 340


@pytest.mark.requirement("E1")
def test_local_refusal_names_its_limit() -> None:
    refusal = Refusal("per_user", 500)
    assert (
        refusal.error("local").msg == "Too Many Requests: too many sticky events (local.per_user)"
    )
    assert refusal.error().msg == "Too Many Requests"


@pytest.mark.requirement("E3")
def test_log_names_the_sender_in_one_line_for_all_of_a_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    here = Here()
    past = waiting(here, per_sender=LimitConfig(2.0, 1))
    for name in range(100):
        events = [event(1_000 * name + number, None, f"@{name}:there") for number in range(2)]
        past.committed(events, past.decide(events))
    assert [record.getMessage() for record in caplog.records] == [
        "per_sender: deferred 1 sticky events of there in !room, this one by '@0:there'; 1 of its"
        " events are deferred, the last for about 500 ms"
    ]


SECTIONS = ["federation", "local"]


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize(
    "glob",
    [
        "@*:*",
        "@a:*.example.org",
        "@a:exampl?.org",
        "@a",
        "a:b",
        "@:b",
        "@a:",
        "",
        "@a:b c",
        1,
        None,
    ],
)
def test_exempt_users_need_a_literal_server(section: str, glob: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse({section: {"exempt_users": [glob]}})
    assert f"{section}.exempt_users must be a list of user IDs such as" in error.value.msg
    with pytest.raises(ConfigError):
        parse({section: {"exempt_users": glob}})


@pytest.mark.parametrize("section", SECTIONS)
def test_exempt_users(section: str) -> None:
    globs = ["@gateway-*:example.org", "@rec:example.org:8448", "@b?t:[::1]:80", "@*:bridge.net"]
    config = parse({section: {"exempt_users": globs}})
    exempts = getattr(config, section).exempts_user()
    users = ["@gateway-1:example.org", "@rec:example.org:8448", "@bot:[::1]:80", "@x:bridge.net"]
    assert all(exempts(user) for user in users)
    others = [
        *("@gateway-1:example.org:8448", "@gateway-1:evil.org", "@gateway:example.org"),
        *("@gateway-1:evil.org:example.org", "@rec:example.org", "@x:y.bridge.net", "", "@"),
    ]
    assert not any(exempts(user) for user in others)
    assert not getattr(parse({}), section).exempts_user()("@gateway-1:example.org")
