"""Sticky events past a limit are persisted and delivered later, from real floods (L1, L4, L5, L7).

Flooding servers run plain Synapse, which limits nothing.
"""

import time
from functools import partial

import pytest

from tests.conftest import Servers
from tests.integration.rooms import (
    NO_LIMITS,
    deferred,
    entered,
    has_event,
    in_thread,
    introduce,
    is_sticky_at,
    limits,
    room_of,
    send_old_events,
    wait_until_sticky,
    wait_until_taken_in,
)
from tests.lab import Client, wait_until
from tests.lab.client import WITHOUT_TIMELINE, sticky_events

PLAIN = {"module": False}
HOURLY = 0.001
"""So slow that nothing is released within a test."""


def limit(per_second: float, burst_count: int) -> dict[str, float]:
    return {"per_second": per_second, "burst_count": burst_count}


def syncs_until(client: Client, room_id: str, event_id: str, since: str) -> int:
    """How many syncs it takes to see the event in the sticky section."""
    for number in range(1, 50):
        answer = client.sync(since, filter_=WITHOUT_TIMELINE)
        since = answer["next_batch"]
        if event_id in sticky_events(answer, room_id):
            return number
    raise AssertionError("not within 50 syncs")


@pytest.mark.slow
@pytest.mark.requirement("L1", "L4", "D7")
@pytest.mark.timeout(900)
def test_flood_of_one_server(servers: Servers) -> None:
    a, b, c = servers(PLAIN, PLAIN, {"config": limits(per_server=limit(20, 40))})
    mallory, bob, carol, dave = a.user(), b.user(), c.user(), c.user()
    room_id = room_of(mallory, bob, carol, dave, via=a)
    start_s = time.monotonic()
    watch = in_thread(partial(watch_the_rate, dave, room_id, dave.sync()["next_batch"], start_s))
    flood = send_old_events(room_id, [mallory], 600)
    wait_until_taken_in(c, room_id, flood)
    event_id = bob.send_sticky(room_id)
    wait_until_sticky(c, event_id)
    seen = carol.collect_sticky(room_id, flood, 120, filter_=WITHOUT_TIMELINE)
    assert flood <= seen.keys()
    watch()
    assert not deferred(c)
    assert len(entered(c, room_id)) == 601


def watch_the_rate(client: Client, room_id: str, since: str, start_s: float) -> None:
    """What was seen up to any moment is within the limit, late as the moment may be."""
    count = 0
    while count < 601:
        answer = client.sync(since, 10_000, WITHOUT_TIMELINE)
        since = answer["next_batch"]
        count += len(sticky_events(answer, room_id))
        most = 40 + 20 * (time.monotonic() - start_s)
        assert count <= most + 2, "faster than the limit and its burst, and bob's event"


@pytest.mark.slow
@pytest.mark.requirement("L1", "L4", "L6", "D7")
def test_victim_of_a_flood_that_came_before(servers: Servers) -> None:
    a, b, c = servers(PLAIN, PLAIN, {"config": limits(per_server=limit(20, 40))})
    mallory, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(mallory, bob, carol, via=a)
    since = carol.sync()["next_batch"]
    # All of it is there at once, as after an outage; the victim's event comes last.
    c.pause()
    try:
        flood = send_old_events(room_id, [mallory], 600)
        event_id = bob.send_sticky(room_id)
    finally:
        c.resume()
    wait_until_sticky(c, event_id)
    assert syncs_until(carol, room_id, event_id, since) <= 2
    assert flood <= carol.collect_sticky(room_id, flood, 120, filter_=WITHOUT_TIMELINE).keys()


@pytest.mark.slow
@pytest.mark.requirement("L1", "L4", "L6", "D7")
def test_flood_of_three_servers(servers: Servers) -> None:
    *flooders, b, c = servers(*[PLAIN] * 4, {"config": limits(per_room=limit(20, 30))})
    mallories = [server.user() for server in flooders]
    bob, carol = b.user(), c.user()
    room_id = room_of(*mallories, bob, carol, via=flooders[0])
    since = carol.sync()["next_batch"]
    flood = send_old_events(room_id, mallories, 60)
    wait_until_taken_in(c, room_id, flood)
    event_id = bob.send_sticky(room_id)
    # In its turn among four servers, although the room's allowance is used up.
    wait_until_sticky(c, event_id)
    assert syncs_until(carol, room_id, event_id, since) <= 2
    assert flood <= carol.collect_sticky(room_id, flood, 120, filter_=WITHOUT_TIMELINE).keys()


@pytest.mark.requirement("L6")
def test_each_limit_holds_up_its_own(servers: Servers) -> None:
    config = limits(per_sender=limit(HOURLY, 2), per_server_in_room=limit(HOURLY, 4))
    a, b, c = servers(PLAIN, PLAIN, {"config": config})
    mallory, mary, bob, carol = a.user(), a.user(), b.user(), c.user()
    room_id = room_of(mallory, mary, bob, carol, via=a)
    other_room_id = room_of(mallory, bob, carol, via=a)
    by_mallory = [mallory.send_sticky(room_id) for _ in range(4)]
    by_mary = [mary.send_sticky(room_id) for _ in range(3)]
    by_bob = [bob.send_sticky(room_id) for _ in range(2)]
    elsewhere = [mallory.send_sticky(other_room_id) for _ in range(2)]
    wait_until_taken_in(c, room_id, {*by_mallory, *by_mary, *by_bob})
    wait_until_taken_in(c, other_room_id, set(elsewhere))
    assert deferred(c) == {*by_mallory[2:], by_mary[2]}
    for name in ("per_sender", f"deferred 1 sticky events of {a.name} in {room_id}"):
        assert c.log_has(name)


@pytest.mark.slow
@pytest.mark.requirement("L3", "E4")
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_restart_in_the_middle(servers: Servers, end: str) -> None:
    # Slower than any machine takes events in, so that some wait.
    a, c = servers(PLAIN, {"config": limits(per_server=limit(2, 10))})
    mallory, carol = a.user(), c.user()
    room_id = room_of(mallory, carol, via=a)
    flood = send_old_events(room_id, [mallory], 120)
    wait_until(lambda: len(entered(c, room_id)) > 15 and deferred(c), "a release")
    getattr(c, end)()
    c.configure_module(limits(per_server=limit(20, 10)))
    waiting, released = deferred(c), entered(c, room_id)
    assert not waiting & set(released)
    assert len(released) == len(set(released))
    c.start()
    c.wait_until_ready()
    # What was not acknowledged before the end is sent again.
    wake_up = {mallory.send_sticky(room_id)}
    seen = carol.collect_sticky(room_id, flood | wake_up, 120, filter_=WITHOUT_TIMELINE)
    assert flood <= seen.keys()
    assert sorted(entered(c, room_id)) == sorted(flood | wake_up), "each once"
    assert not deferred(c)


@pytest.mark.requirement("L3", "E4")
@pytest.mark.parametrize(
    "config",
    [
        limits(per_server=limit(1000, 1000)),
        limits("off"),
        pytest.param(limits("observe", per_server=limit(HOURLY, 1)), marks=pytest.mark.slow),
        pytest.param(NO_LIMITS, marks=pytest.mark.slow),
    ],
)
def test_changed_limits_apply_to_what_waits(servers: Servers, config: dict[str, object]) -> None:
    a, c = servers(PLAIN, {"config": limits(per_server=limit(HOURLY, 1))})
    mallory, carol = a.user(), c.user()
    room_id = room_of(mallory, carol, via=a)
    flood = send_old_events(room_id, [mallory], 20)
    wait_until_taken_in(c, room_id, flood)
    assert len(deferred(c)) == 19
    c.configure_module(config)
    c.restart()
    assert flood <= carol.collect_sticky(room_id, flood).keys()


@pytest.mark.requirement("L5")
def test_event_through_a_third_server_is_charged_to_its_sender(servers: Servers) -> None:
    config = limits(per_server=limit(HOURLY, 3))
    a, b, c = servers(PLAIN, PLAIN, {"config": config, "forwarded": True})
    assert c.forwarder is not None
    mallory, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(bob, mallory, carol, via=b)
    introduce(a, c)
    c.forwarder.offline()
    flood = send_old_events(room_id, [mallory], 8)
    for event_id in flood:
        wait_until_sticky(b, event_id)
    # Its own server never gets to push them: they come as what bob's event refers to.
    a.kill()
    c.forwarder.online()
    by_bob = {bob.send_sticky(room_id)}
    wait_until_taken_in(c, room_id, flood | by_bob)
    assert by_bob <= set(entered(c, room_id))
    rows = c.query("SELECT event_id, server FROM synapse_sticky_deferred")
    assert len(rows) == 5
    assert {server for _, server in rows} == {a.name}


@pytest.mark.slow
@pytest.mark.requirement("L4", "S2")
def test_expiry_while_waiting(servers: Servers) -> None:
    a, c = servers(PLAIN, {"config": limits(per_server=limit(HOURLY, 1))})
    mallory, carol = a.user(), c.user()
    room_id = room_of(mallory, carol, via=a)
    first = mallory.send_sticky(room_id)
    wait_until_sticky(c, first)
    waits = mallory.send_sticky(room_id)
    short = {mallory.send_sticky(room_id, duration_ms=15_000) for _ in range(3)}
    wait_until_taken_in(c, room_id, {waits} | short)
    assert short <= deferred(c)
    wait_until(lambda: not short & deferred(c), "the events to expire")
    assert deferred(c) == {waits}
    assert entered(c, room_id) == [first]
    assert c.log_has("deferred: expired")


@pytest.mark.slow
@pytest.mark.requirement("S5", "L4")
def test_redacted_while_waiting(servers: Servers) -> None:
    a, c = servers(PLAIN, {"config": limits(per_server=limit(HOURLY, 1))})
    mallory, carol = a.user(), c.user()
    room_id = room_of(mallory, carol, via=a)
    events = [mallory.send_sticky(room_id) for _ in range(3)]
    wait_until_taken_in(c, room_id, set(events))
    mallory.redact(room_id, events[1])
    wait_until(lambda: events[1] not in deferred(c), "the redacted event to wait no longer")
    assert deferred(c) == {events[2]}
    c.configure_module(limits())
    c.restart()
    wait_until_sticky(c, events[2])
    assert not is_sticky_at(c, events[1])


@pytest.mark.requirement("C2", "L4")
def test_soft_failed_events_are_charged_when_they_become_deliverable(servers: Servers) -> None:
    config = limits(per_server=limit(HOURLY, 2))
    a, b, c = servers({**PLAIN, "forwarded": True}, PLAIN, {"config": config})
    assert a.forwarder is not None
    mallory, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(bob, mallory, carol, via=b)
    power = bob.request("GET", f"rooms/{room_id}/state/m.room.power_levels/")
    # Mallory's server does not learn that she may not send these any more.
    a.forwarder.offline()
    refusing = {**power, "events": {**power["events"], "org.example.call": 50}}
    state_id = bob.send_state(room_id, "m.room.power_levels", refusing)
    wait_until(lambda: has_event(c, state_id), "the state")
    soft_failed = [mallory.send_sticky(room_id) for _ in range(4)]
    for event_id in soft_failed:
        wait_until_sticky(c, event_id)
    assert c.log_has("Soft-failing")
    assert not deferred(c)
    # None of them was charged: two others get through first.
    bob.send_state(room_id, "m.room.power_levels", power)
    wait_until(lambda: len(deferred(c)) == 2, "two of four to be deferred")
    assert deferred(c) < set(soft_failed)
    assert deferred(c) | set(entered(c, room_id)) == set(soft_failed)
    assert not deferred(c) & set(entered(c, room_id))
    shown = set(entered(c, room_id))
    assert shown <= carol.collect_sticky(room_id, shown, filter_=WITHOUT_TIMELINE).keys()


@pytest.mark.requirement("L7")
def test_exempt_servers(servers: Servers) -> None:
    config = limits(per_server=limit(HOURLY, 1), exempt_servers=["127.0.0.?:*"])
    a, b, c = servers({**PLAIN, "host": "127.0.0.1"}, PLAIN, {"config": config})
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, carol, via=a)
    by_alice = send_old_events(room_id, [alice], 10)
    by_bob = send_old_events(room_id, [bob], 3)
    wait_until_taken_in(c, room_id, by_alice | by_bob)
    assert len(deferred(c)) == 2
    assert deferred(c) < by_bob


@pytest.mark.slow
@pytest.mark.requirement("L4", "L7", "E4")
def test_last_event_of_one_that_flaps_comes_first(servers: Servers) -> None:
    """Also after a restart: the key is in the row of what waits."""
    a, c = servers(PLAIN, {"config": limits(per_sender=limit(HOURLY, 2))})
    flapper, carol = a.user(), c.user()
    room_id = room_of(flapper, carol, via=a)
    content = {"msc4354_sticky_key": "a"}
    joins = {flapper.send_sticky(room_id, content=content) for _ in range(40)}
    leave = flapper.send_sticky(room_id, content=content)
    wait_until_taken_in(c, room_id, joins | {leave})
    before = entered(c, room_id)
    assert len(before) == 2
    c.configure_module(limits(per_sender=limit(20, 1)))
    c.restart()
    assert joins | {leave} == carol.collect_sticky(room_id, joins | {leave}).keys()
    assert entered(c, room_id)[len(before) :].index(leave) <= 2


@pytest.mark.slow
@pytest.mark.requirement("L7")
@pytest.mark.timeout(900)
def test_one_account_for_200_participants(servers: Servers) -> None:
    """With the recipe of docs/limits.md none of their joins and leaves is refused or deferred."""
    a, c = servers({"config": {}}, {"config": {}})
    for section, server in (("local", a), ("federation", c)):
        server.configure_module({section: {"exempt_users": [f"@*:{a.name}"]}})
        server.restart()
    gateway, carol = a.user(), c.user()
    room_id = room_of(gateway, carol, via=a)
    sent = set()
    for state in ("join", "leave"):
        for number in range(200):
            content = {"msc4354_sticky_key": f"{number}", "state": state}
            sent.add(gateway.send_sticky(room_id, content=content))
    wait_until_taken_in(c, room_id, sent)
    assert sent == set(entered(c, room_id))
    assert not c.log_has("per_sender: deferred")


@pytest.mark.slow
@pytest.mark.requirement("L2", "L3", "L4", "L6")
def test_past_the_most_that_may_wait_a_server_is_refused(servers: Servers) -> None:
    most = 20
    # Slower than any machine takes events in, so that they wait.
    config = limits(per_server=limit(2, 5), max_deferred_per_server=most)
    a, b, c = servers(PLAIN, PLAIN, {"config": config})
    mallory, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(mallory, bob, carol, via=a)
    # More than one transaction of 50 waits at once.
    c.pause()
    try:
        flood = send_old_events(room_id, [mallory], 150)
    finally:
        c.resume()
    refused = f"max_deferred_per_server: refused 50 sticky events of {a.name}"
    wait_until(lambda: c.log_has(refused), "a refusal")
    event_id = bob.send_sticky(room_id)
    wait_until_sticky(c, event_id)
    assert not flood <= deferred(c) | set(entered(c, room_id))
    highest = 0

    def done() -> bool:
        nonlocal highest
        highest = max(highest, len(deferred(c)))
        return len(entered(c, room_id)) == 151

    wait_until(done, "all to be released", timeout_s=180)
    # At one short of the most a last transaction, of 50 at most, is taken.
    assert most < highest < most + 50
    assert flood <= carol.collect_sticky(room_id, flood, filter_=WITHOUT_TIMELINE).keys()


@pytest.mark.slow
@pytest.mark.requirement("L3")
@pytest.mark.parametrize("mode", ["defer", "reject"])
def test_overload_loses_nothing(servers: Servers, mode: str) -> None:
    config = limits(mode, per_server=limit(50, 100))
    a, b, c = servers(PLAIN, PLAIN, {"config": config})
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, carol, via=a)
    c.pause()
    try:
        finish = in_thread(partial(send_old_events, room_id, [bob], 250))
        flood = send_old_events(room_id, [alice], 250)
        finish()
    finally:
        c.resume()
    wait_until(lambda: len(entered(c, room_id)) == 500, "all to arrive", timeout_s=240)
    assert flood <= set(entered(c, room_id))
    assert not c.log_has("Pruning")


@pytest.mark.slow
@pytest.mark.requirement("L7")
@pytest.mark.timeout(900)
def test_call_of_500_people(servers: Servers) -> None:
    a, c = servers({"config": NO_LIMITS}, {})
    people = [a.user() for _ in range(500)]
    carol = c.user()
    room_id = room_of(people[0], carol, via=a)
    for person in people[1:]:
        person.join(room_id)
    # All of them come, and go, at once.
    started = {person.send_sticky(room_id) for person in people}
    ended = {person.send_sticky(room_id, content={"left": True}) for person in people}
    wait_until_taken_in(c, room_id, started | ended)
    assert set(entered(c, room_id)) == started | ended
    assert not c.log_has(": deferred ")
