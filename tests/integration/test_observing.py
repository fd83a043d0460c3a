"""Limits that are observed without being applied, from the same real flood in each mode (H6)."""

import re
from functools import partial
from typing import Any

import pytest

from tests.conftest import Servers
from tests.integration.rooms import (
    deferred,
    entered,
    has_event,
    limits,
    room_of,
    wait_until_taken_in,
)
from tests.integration.test_deferral import HOURLY, PLAIN, limit
from tests.integration.test_sending import SLOW, is_refused
from tests.lab import Client, Homeserver, clock, wait_until
from tests.lab.client import HOUR_MS, STICKY_PARAMETER, sticky_events

_WAITING = "synapse_sticky_deferred_waiting"
_RELEASED = 'synapse_sticky_released_total{limit="per_sender"}'
_OBSERVED = re.compile(r'observed_total{(limit=".*"),outcome="(\w+)"}')

BURST = 3
UNTIL_BURST_MS = 3_000_000
"""By then each sender may send as many again, and nothing has expired."""


def server_in(mode: str) -> dict[str, Any]:
    # Counts that hang on nothing but the events: neither on their order nor on the time.
    config = limits(mode, per_sender=limit(HOURLY, BURST))
    return {"config": config, "metrics": True, "module_name": clock.MODULE}


def counted(server: Homeserver) -> dict[str, float]:
    """What its limits did to events."""
    names = tuple(f"synapse_sticky_{name}" for name in ("refused", "deferred", "released"))
    counters = {
        # What is only observed is counted under another name.
        _OBSERVED.sub(r"\2_total{\1}", name).replace("observed_waiting", "deferred_waiting"): value
        for name, value in server.counters().items()
        if value
    }
    return {
        name: value
        for name, value in counters.items()
        if name.startswith(names) and "_created" not in name and value
    }


def left_behind(server: Homeserver, room_id: str) -> dict[str, list[Any]]:
    """All that a flood leaves in the database that does not hang on the order of its events."""
    sql = "SELECT {} FROM sticky_events WHERE room_id = ? ORDER BY 1"
    columns = "event_id, room_id, sender, expires_at, instance_name"
    rows: dict[str, list[Any]] = {
        "rows": server.query(sql.format(columns), room_id),
        "stream": server.query(sql.format("stream_id"), room_id),
    }
    tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'synapse_sticky_%'"
    for (table,) in server.query(tables):
        # Who is a newcomer hangs on who joined first.
        if table != "synapse_sticky_newcomers":
            rows[table] = server.query(f"SELECT COUNT(*) FROM {table}")
    return rows


def shown(reader: Client, room_id: str, flood: set[str], since: str) -> tuple[list[str], list[str]]:
    """What /sync gives of the room, bit by bit and as a whole."""
    bits = reader.collect_sticky(room_id, flood, since=since)
    return sorted(bits), sorted(sticky_events(reader.sync(), room_id))


@pytest.mark.slow
@pytest.mark.requirement("H6", "L1", "L4", "S5")
@pytest.mark.one_process
def test_counts_as_if_and_touches_nothing(servers: Servers) -> None:
    a, off, defer, observe = servers(PLAIN, *map(server_in, ("off", "defer", "observe")))
    mallory, mary = a.user(), a.user()
    readers = [server.user() for server in (off, defer, observe)]
    room_id = room_of(mallory, mary, *readers, via=a)
    since = [reader.sync()["next_batch"] for reader in readers]
    by_mallory = [mallory.send_sticky(room_id) for _ in range(12)]
    by_mary = [mary.send_sticky(room_id) for _ in range(8)]
    flood = {*by_mallory, *by_mary}
    for server in (off, defer, observe):
        wait_until_taken_in(server, room_id, flood)

    # Nothing is different from a server without limits.
    assert left_behind(observe, room_id) == left_behind(off, room_id)
    assert set(entered(observe, room_id)) == flood
    by_observe = shown(readers[2], room_id, flood, since[2])
    assert by_observe == shown(readers[0], room_id, flood, since[0])
    assert by_observe[0] == sorted(flood)
    assert counted(off) == {}

    # And what is counted is not different from one that defers.
    assert len(deferred(defer)) == 14
    past = {'synapse_sticky_deferred_total{limit="per_sender"}': 14}
    for server in (defer, observe):
        wait_until_counted(server, {**past, _WAITING: 14})
    assert observe.log_has(f"sticky events of {a.name} would be deferred in {room_id}")
    assert defer.log_has(f": deferred 1 sticky events of {a.name} in {room_id}")
    assert not observe.log_has(": deferred ")

    # Later some of each sender's events have their turn, which is as if for the one that observes.
    # And a redacted event waits no longer.
    for server in (off, defer, observe):
        clock.set_ahead(server, UNTIL_BURST_MS)
    for server in (defer, observe):
        wait_until_counted(server, {**past, _RELEASED: 2 * BURST, _WAITING: 14 - 2 * BURST})
    assert set(entered(defer, room_id)) == {*by_mallory[: 2 * BURST], *by_mary[: 2 * BURST]}
    redacted = by_mallory[-1]
    mallory.redact(room_id, redacted)
    for server in (defer, observe):
        wait_until_counted(server, {**past, _RELEASED: 2 * BURST, _WAITING: 13 - 2 * BURST})

    # Still nothing is different from a server without limits.
    for reader in (readers[0], readers[2]):
        wait_until(partial(is_without, reader, room_id, redacted), "the redacted event to be gone")
    assert left_behind(observe, room_id) == left_behind(off, room_id)
    assert set(entered(observe, room_id)) == flood
    by_observe = shown(readers[2], room_id, flood - {redacted}, since[2])
    assert by_observe == shown(readers[0], room_id, flood - {redacted}, since[0])
    assert by_observe == (sorted(flood - {redacted}),) * 2
    assert counted(off) == {}


def is_without(reader: Client, room_id: str, event_id: str) -> bool:
    return event_id not in sticky_events(reader.sync(), room_id)


def wait_until_counted(server: Homeserver, expected: dict[str, float]) -> None:
    wait_until(
        lambda: counted(server) == expected,
        f"{server.name} to have counted {expected}",
        look=lambda: counted(server),
    )


@pytest.mark.slow
@pytest.mark.requirement("H6", "L2")
def test_past_the_most_that_may_wait_refusals_are_counted(servers: Servers) -> None:
    config = limits("observe", per_server=limit(HOURLY, 2), max_deferred_per_server=3)
    a, c = servers(PLAIN, {"config": config, "metrics": True})
    mallory, carol = a.user(), c.user()
    room_id = room_of(mallory, carol, via=a)
    flood = {mallory.send_sticky(room_id) for _ in range(9)}
    wait_until_taken_in(c, room_id, flood)
    assert set(entered(c, room_id)) == flood
    refused = 'synapse_sticky_refused_total{limit="max_deferred_per_server"}'
    wait_until(lambda: counted(c).get(refused) == 4, "four to be counted as refused")
    assert counted(c)[_WAITING] == 3
    assert c.log_has(f"sticky events of {a.name} would be refused in {room_id}")


@pytest.mark.requirement("H6", "E1")
@pytest.mark.one_process
def test_what_local_users_send_past_their_limit_is_counted(servers: Servers) -> None:
    options = [
        {"config": {"local": {**SLOW["local"], "mode": mode}}} for mode in ("observe", "off")
    ]
    observe, off = servers(*({**option, "metrics": True} for option in options))
    for server in (observe, off):
        alice = server.user()
        room_id = alice.create_room()
        assert not any(is_refused(alice, room_id) for _ in range(5))
        assert len(entered(server, room_id)) == 5
        # What is repeated was sent, so it is not past any limit.
        path = f"rooms/{room_id}/send/org.example.call/once"
        for _ in range(3):
            sent = alice.request("PUT", path, **{STICKY_PARAMETER: HOUR_MS})
        assert has_event(server, sent["event_id"])
    assert counted(observe) == {'synapse_sticky_refused_total{limit="per_user"}': 3}
    assert counted(off) == {}
    assert observe.log_has("would be refused; would be asked to retry")
