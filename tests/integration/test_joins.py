"""Newcomers get every sticky event, from real homeservers (P3, P4, P5, P7, F3)."""

import re
import threading
import time
from functools import partial
from urllib.parse import quote

import pytest

from tests.conftest import Servers
from tests.integration.rooms import (
    NO_LIMITS,
    backlogged_rooms,
    in_thread,
    introduce,
    is_sticky_at,
    joined_line,
    keep_sending_until_joined,
    room_of,
    send_old_events,
    wait_until_all_pushed,
    wait_until_expired,
    wait_until_gone,
    wait_until_joined,
    wait_until_seen,
    wait_until_sticky,
)
from tests.lab import Client, Homeserver, wait_until
from tests.lab.client import ApiError


@pytest.mark.requirement("P3", "P4", "F1")
@pytest.mark.parametrize("history_visibility", ["shared", "invited", "joined"])
def test_newcomer_among_two(three: list[Homeserver], history_visibility: str) -> None:
    a, b, c = three
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a, history_visibility=history_visibility)
    old = send_old_events(room_id, [alice, bob], 1)
    carol.join(room_id, a.name)
    assert set(carol.collect_sticky(room_id, old)) == old


@pytest.mark.slow
@pytest.mark.requirement("P3")
def test_newcomer_among_four(servers: Servers) -> None:
    *residents, newcomer = servers(5)
    senders = [server.user() for server in residents]
    room_id = room_of(*senders, via=residents[0])
    old = send_old_events(room_id, senders, 10)
    user = newcomer.user()
    user.join(room_id, residents[1].name)
    assert set(user.collect_sticky(room_id, old)) == old


@pytest.mark.requirement("P3", "P7", "L3")
@pytest.mark.parametrize(
    ("history_visibility", "with_module"),
    [
        pytest.param("joined", True, marks=pytest.mark.slow),
        pytest.param("shared", False, marks=pytest.mark.slow),
        pytest.param("shared", True, marks=pytest.mark.slow),
        pytest.param("joined", False, marks=pytest.mark.slow),
    ],
)
def test_hundreds_of_old_events(
    servers: Servers, with_module: bool, history_visibility: str
) -> None:
    unlimited = {"config": NO_LIMITS}
    a, b, c = servers(unlimited, unlimited, {"module": with_module, **unlimited})
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a, history_visibility=history_visibility)
    old = send_old_events(room_id, [alice, bob], 130)
    carol.join(room_id, a.name)
    assert set(carol.collect_sticky(room_id, old, timeout_s=180)) == old
    # Beside ten processes a plain one may prune: how much it has staged is a matter of its speed.
    if with_module or a.receivers == 1:
        assert not c.log_has("from federation queue")
    # What was delivered is noted as such: nothing is sent for ever.
    for resident in (a, b):
        wait_until_all_pushed(resident, room_id)


@pytest.mark.slow
@pytest.mark.one_process
@pytest.mark.requirement("P3")
def test_module_without_config_and_with_all_of_it(servers: Servers) -> None:
    everything = {
        "joins": {"enabled": True, "window": 10, "retry_min": "1s", "confirm": False},
        "staging": {"keep_sticky": True},
        "visibility": {"servers": True, "users": True},
        "dummy_events": {"enabled": True, "per_minute": 60},
        "state_events": False,
    }
    a, b, c = servers({"config": None}, {"config": everything}, {"config": {}})
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a)
    old = send_old_events(room_id, [alice, bob], 15)
    carol.join(room_id, a.name)
    assert set(carol.collect_sticky(room_id, old)) == old
    for server in (a, b, c):
        assert server.log_has(
            "synapse-sticky runs in master: index, delivery, visibility, pruning, receipt, sending,"
            " extremities; loading: sliding, joins, parking, deferral\n"
        )
        for duty in ("sliding", "joins", "parking", "deferral"):
            assert server.log_has(f"{duty} is on\n")


@pytest.mark.one_process
def test_duties_can_be_switched_off(servers: Servers) -> None:
    off = {
        "joins": {"enabled": False},
        "staging": {"keep_sticky": False},
        "visibility": {"servers": False, "users": False},
        "dummy_events": {"enabled": False},
        **NO_LIMITS,
    }
    (server,) = servers({"config": off})
    # Delivery falls back to Synapse's own by itself.
    assert server.log_has(
        "synapse-sticky runs in master: index, delivery, sending; loading: sliding, deferral;"
        " off: visibility, joins, pruning, parking, receipt, extremities\n"
    )


@pytest.mark.requirement("F3", "P7")
def test_pushed_before_the_newcomer_has_finished_joining(servers: Servers) -> None:
    # With the module, a newcomer would know the room by then.
    a, b, c = servers({}, {"forwarded": True}, {"module": False})
    assert b.forwarder is not None
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a)
    old = send_old_events(room_id, [alice, bob], 3)
    # To finish its join the newcomer needs the second resident's keys: held up.
    b.forwarder.hold()
    finish = in_thread(lambda: carol.join(room_id, a.name))
    wait_until(lambda: c.log_has("Ignoring PDU for unknown room_id"), "the race")
    during = {alice.send_sticky(room_id)}
    b.forwarder.release()
    finish()
    assert set(carol.collect_sticky(room_id, old | during)) == old | during


@pytest.mark.requirement("E4", "P3")
@pytest.mark.parametrize("end", [pytest.param("stop", marks=pytest.mark.slow), "kill"])
def test_resident_ends_between_join_and_push(servers: Servers, end: str) -> None:
    a, b, c = servers({}, {}, {"forwarded": True})
    assert c.forwarder is not None
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a)
    old = send_old_events(room_id, [alice, bob], 5)
    introduce(c, a, b)
    c.forwarder.offline()
    carol.join(room_id, a.name)
    wait_until(lambda: c.forwarder and c.forwarder.refusals, "a push to be refused")
    wait_until_joined(bob, room_id, {carol.user_id})
    getattr(b, end)()
    c.forwarder.online()
    b.start()
    b.wait_until_ready()
    assert set(carol.collect_sticky(room_id, old)) == old


@pytest.mark.slow
@pytest.mark.requirement("E4", "P3")
def test_join_while_the_resident_is_down(servers: Servers) -> None:
    a, b, c = servers(3)
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a)
    old = send_old_events(room_id, [alice, bob], 3)
    introduce(b, c)  # else its join would wait for the keys of the one that is down
    b.kill()
    carol.join(room_id, a.name)
    b.start()
    b.wait_until_ready()
    keep_sending_until_joined(alice, room_id, bob, carol)
    assert set(carol.collect_sticky(room_id, old)) == old


@pytest.mark.slow
@pytest.mark.requirement("P3", "P7")
def test_newcomer_is_paused_at_the_join(servers: Servers) -> None:
    a, b, c = servers(3)
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a)
    old = send_old_events(room_id, [alice, bob], 20)
    carol.join(room_id, a.name)
    c.pause()
    try:
        wait_until_seen(b, c, room_id)
        late = {bob.send_sticky(room_id)}
    finally:
        c.resume()
    assert set(carol.collect_sticky(room_id, old | late)) == old | late


@pytest.mark.slow
@pytest.mark.requirement("P2", "P3")
def test_newcomer_is_unreachable_for_half_a_minute(servers: Servers) -> None:
    """Nor has the destination ever been reached before."""
    a, b, c = servers({}, {}, {"forwarded": True})
    forwarder = c.forwarder
    assert forwarder is not None
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a)
    old = send_old_events(room_id, [alice, bob], 10)
    introduce(c, a, b)
    forwarder.offline()
    carol.join(room_id, a.name)
    wait_until(
        lambda: forwarder.refusals and time.monotonic() - forwarder.refusals[0] > 30,
        "half a minute of refused connections",
    )
    assert len(forwarder.refusals) > 2
    forwarder.online()
    assert set(carol.collect_sticky(room_id, old)) == old


@pytest.mark.requirement("S2", "P3")
def test_expired_events_are_not_sent(three: list[Homeserver]) -> None:
    a, b, c = three
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a, history_visibility="joined")
    expired = alice.send_sticky(room_id, duration_ms=500)
    lasting = alice.send_sticky(room_id)
    wait_until_expired(a, expired)
    carol.join(room_id, a.name)
    assert expired not in carol.collect_sticky(room_id, {lasting})
    assert not is_sticky_at(c, expired)


@pytest.mark.slow
@pytest.mark.requirement("P4")
def test_remote_events_are_not_sent_by_a_third_server(servers: Servers) -> None:
    a, b, c = servers(3)
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a)
    of_alice = alice.send_sticky(room_id)
    wait_until_sticky(b, of_alice)
    of_bob = bob.send_sticky(room_id)
    wait_until_sticky(a, of_bob)
    introduce(b, c)  # else its join would wait for the keys of the one that is down
    b.kill()
    carol.join(room_id, a.name)
    assert set(carol.collect_sticky(room_id, {of_alice})) == {of_alice}
    wait_until_all_pushed(a, room_id)
    assert of_bob not in [e for (e,) in c.query("SELECT event_id FROM sticky_events")]
    b.start()
    b.wait_until_ready()
    keep_sending_until_joined(alice, room_id, bob, carol)
    assert set(carol.collect_sticky(room_id, {of_alice, of_bob})) == {of_alice, of_bob}


@pytest.mark.slow
@pytest.mark.requirement("L3", "F1")
def test_outlier_first_and_in_full_later(servers: Servers) -> None:
    a, b, c = servers(3)
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a)
    of_bob = bob.send_sticky(room_id)
    wait_until_sticky(a, of_bob)
    # As many as a server asks for when it misses events: it takes the one before as an outlier.
    for _ in range(10):
        alice.send(room_id)
    of_alice = alice.send_sticky(room_id)
    introduce(b, c)
    b.kill()
    carol.join(room_id, a.name)
    assert set(carol.collect_sticky(room_id, {of_alice})) == {of_alice}
    outlier = "SELECT 1 FROM events WHERE event_id = ? AND outlier"
    assert c.query(outlier, of_bob), "the case did not come about"
    b.start()
    b.wait_until_ready()
    keep_sending_until_joined(alice, room_id, bob, carol)
    old = {of_alice, of_bob}
    assert set(carol.collect_sticky(room_id, old)) == old


@pytest.mark.requirement("P3")
def test_rejoining_after_leaving(three: list[Homeserver]) -> None:
    a, b, c = three
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a)
    first = send_old_events(room_id, [alice, bob], 2)
    carol.join(room_id, a.name)
    assert set(carol.collect_sticky(room_id, first)) == first
    carol.leave(room_id)
    for user in (alice, bob):
        wait_until_gone(user, room_id, carol)
    meanwhile = send_old_events(room_id, [alice, bob], 2)
    for event_id in meanwhile:
        for server in (a, b):
            wait_until_sticky(server, event_id)
    assert not any(is_sticky_at(c, e) for e in meanwhile)
    carol.join(room_id, b.name)
    assert set(carol.collect_sticky(room_id, first | meanwhile)) >= meanwhile


@pytest.mark.requirement("P3")
def test_second_user_of_a_server_is_no_newcomer(three: list[Homeserver]) -> None:
    a, b, c = three
    alice, carol, dave = a.user(), c.user(), c.user()
    room_id = room_of(alice, carol, via=a)
    old = {alice.send_sticky(room_id)}
    carol.collect_sticky(room_id, old)
    wait_until_seen(a, c, room_id)
    dave.join(room_id)
    assert set(dave.collect_sticky(room_id, old)) == old
    wait_until_joined(alice, room_id, {dave.user_id})
    # The next newcomer comes after it in the stream: by then it has been read.
    bob = b.user()
    bob.join(room_id, a.name)
    wait_until_seen(a, b, room_id)
    assert a.output().count(joined_line(c, room_id)) == 1


@pytest.mark.requirement("P3")
def test_newcomer_while_the_sender_was_away(three: list[Homeserver]) -> None:
    """A server that left and is back has events that are still sticky."""
    a, b, c = three
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a)
    old = send_old_events(room_id, [alice, bob], 2)
    for event_id in old:
        wait_until_sticky(a, event_id)
    bob.leave(room_id)
    wait_until_gone(alice, room_id, bob)
    carol.join(room_id, a.name)
    wait_until_joined(alice, room_id, {carol.user_id})
    bob.join(room_id, a.name)
    assert set(carol.collect_sticky(room_id, old)) == old
    # Those who were there before and after are no newcomers.
    wait_until_seen(b, c, room_id)
    assert not b.log_has(joined_line(a, room_id))


@pytest.mark.slow
@pytest.mark.requirement("P3", "P7")
def test_sender_leaves_before_the_newcomer_has_everything(servers: Servers) -> None:
    a, b, c = servers({}, {}, {"forwarded": True})
    assert c.forwarder is not None
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a)
    old = send_old_events(room_id, [bob], 3)
    introduce(c, a, b)
    c.forwarder.offline()
    carol.join(room_id, a.name)
    wait_until_seen(b, c, room_id)
    bob.leave(room_id)
    wait_until_gone(alice, room_id, bob)
    c.forwarder.online()
    wait_until(lambda: b.log_has(f"{b.name} may not send in {room_id} now"), "the push to be held")
    assert room_id in backlogged_rooms(b)
    bob.join(room_id, a.name)
    assert set(carol.collect_sticky(room_id, old)) == old
    wait_until_all_pushed(b, room_id)


@pytest.mark.requirement("P3")
def test_server_that_left_gets_nothing(servers: Servers) -> None:
    a, b, c = servers({}, {}, {"forwarded": True})
    assert c.forwarder is not None
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a)
    old = send_old_events(room_id, [alice], 2)
    introduce(c, a, b)
    c.forwarder.offline()
    carol.join(room_id, b.name)
    wait_until_seen(a, c, room_id)
    alice.kick(room_id, carol.user_id)
    c.forwarder.online()
    refused = f"{c.name} may not get events of {room_id} now"
    wait_until(lambda: a.log_has(refused), "the push to be given up")
    assert not any(is_sticky_at(c, e) for e in old)
    assert not backlogged_rooms(a)


@pytest.mark.slow
@pytest.mark.requirement("P3")
def test_server_that_the_acl_denies_gets_nothing(servers: Servers) -> None:
    a, b, c = servers({}, {}, {"forwarded": True, "host": "127.0.0.1"})
    assert c.forwarder is not None
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a)
    old = send_old_events(room_id, [alice], 2)
    introduce(c, a, b)
    c.forwarder.offline()
    carol.join(room_id, b.name)
    wait_until_seen(a, c, room_id)
    alice.send_state(room_id, "m.room.server_acl", {"allow": ["*"], "allow_ip_literals": False})
    c.forwarder.online()
    refused = f"{c.name} may not get events of {room_id} now"
    wait_until(lambda: a.log_has(refused), "the push to be given up")
    assert not any(is_sticky_at(c, e) for e in old)


@pytest.mark.slow
@pytest.mark.requirement("P3", "H7")
def test_once_the_acl_allows_this_server_again_all_is_pushed(servers: Servers) -> None:
    a, c, d = servers({}, {"host": "127.0.0.1"}, {"host": "127.0.0.1"})
    alice, carol, dora = a.user(), c.user(), d.user()
    room_id = room_of(alice, carol, via=a)
    old = send_old_events(room_id, [alice], 2)
    wait_until_all_pushed(a, room_id)
    path = f"rooms/{quote(room_id)}/state/m.room.power_levels"
    levels = alice.request("GET", path)
    levels["users"][carol.user_id] = 100
    alice.send_state(room_id, "m.room.power_levels", levels)
    wait_until(lambda: carol.request("GET", path) == levels, "the new levels to arrive")
    # No server can deny itself.
    carol.send_state(room_id, "m.room.server_acl", {"allow": ["127.0.0.1*"]})
    dora.join(room_id, c.name)
    denied = f"{a.name} may not send in {room_id} now"
    wait_until(lambda: a.log_has(denied), "the push to wait")
    carol.send_state(room_id, "m.room.server_acl", {"allow": ["*"]})
    assert set(dora.collect_sticky(room_id, old)) == old


@pytest.mark.slow
@pytest.mark.requirement("P3")
def test_server_outside_the_federation_whitelist_gets_nothing(servers: Servers) -> None:
    a, b, c = servers(3)
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a)
    alice.send_sticky(room_id)
    introduce(c, a)
    a.write_config(federation_domain_whitelist=[b.name])
    a.restart()
    of_bob = bob.send_sticky(room_id)
    carol.join(room_id, b.name)
    assert of_bob in carol.collect_sticky(room_id, {of_bob})
    wait_until_joined(alice, room_id, {carol.user_id})
    wait_until_all_pushed(b, room_id)
    assert not a.log_has(joined_line(c, room_id))
    assert not a.log_has(f"TX [{c.name}]")


@pytest.mark.requirement("P6")
def test_events_of_an_erased_user_are_not_sent(three: list[Homeserver]) -> None:
    a, _, c = three
    alice, eve, carol = a.user(), a.user(), c.user()
    room_id = room_of(alice, eve, via=a)
    of_eve = eve.send_sticky(room_id)
    of_alice = alice.send_sticky(room_id)
    admin = a.user(admin=True)
    admin.request("POST", f"/_synapse/admin/v1/deactivate/{eve.user_id}", {"erase": True})
    wait_until_gone(alice, room_id, eve)
    carol.join(room_id, a.name)
    assert set(carol.collect_sticky(room_id, {of_alice})) == {of_alice}
    wait_until_all_pushed(a, room_id)
    assert not is_sticky_at(c, of_eve)


@pytest.mark.requirement("S5")
def test_redacted_events_are_not_sent_as_sticky(three: list[Homeserver]) -> None:
    a, b, c = three
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a, history_visibility="joined")
    redacted, kept = alice.send_sticky(room_id), alice.send_sticky(room_id)
    alice.redact(room_id, redacted)
    carol.join(room_id, a.name)
    assert set(carol.collect_sticky(room_id, {kept})) == {kept}
    wait_until_all_pushed(a, room_id)
    assert not is_sticky_at(c, redacted)


@pytest.mark.slow
@pytest.mark.requirement("P3")
def test_room_whose_state_is_still_partial(servers: Servers) -> None:
    """The resident itself joined without the room's full state (a faster join)."""
    a, b, c, d = servers(4)
    alice, bob, carol, dave = a.user(), b.user(), c.user(), d.user()
    introduce(a, c)  # its keys will be needed when it is paused
    room_id = room_with_partial_state(a, b, d, alice, bob, dave)
    try:
        of_bob = bob.send_sticky(room_id)
        carol.join(room_id, d.name)
        assert set(carol.collect_sticky(room_id, {of_bob})) == {of_bob}
        assert has_partial_state(b, room_id)
    finally:
        a.resume()
    wait_until(lambda: not has_partial_state(b, room_id), "the full state")
    # Those whom the full state brought were there before: they are no newcomers.
    of_alice = alice.send_sticky(room_id)
    wait_until_sticky(b, of_alice)
    eve = d.user()
    eve.join(room_id)
    wait_until_joined(bob, room_id, {eve.user_id})
    for server in (a, d):
        assert not b.log_has(joined_line(server, room_id))


def room_with_partial_state(
    a: Homeserver, b: Homeserver, d: Homeserver, alice: Client, bob: Client, dave: Client
) -> str:
    """A room that ``b`` has partial state of; ``a``, which could give the rest, is paused."""
    # Once it is paused it cannot be asked for its keys, and without them there is no join.
    introduce(a, b, d)
    for _ in range(20):
        room_id = room_of(alice, dave, via=a)
        wait_until(lambda: not has_partial_state(d, room_id), "the other's full state")  # noqa: B023
        paused = threading.Event()
        finish = in_thread(partial(join_unless_paused, bob, room_id, a, paused))
        wait_until(partial(joins_are_answered, a, room_id, 2), "the second join to be answered")
        paused.set()
        a.pause()
        try:
            finish()
        except ApiError:
            pass  # too early: the answer was still on its way
        if has_partial_state(b, room_id):
            return room_id
        a.resume()
    raise AssertionError("no join left partial state")


def join_unless_paused(
    user: Client, room_id: str, via: Homeserver, paused: threading.Event
) -> None:
    """Tries again, as the user's server backs off from one that was paused."""
    while True:
        try:
            user.join(room_id, via.name)
            return
        except ApiError:
            if paused.wait(0.25):
                raise


def joins_are_answered(server: Homeserver, room_id: str, count: int) -> bool:
    """Has the server answered this many /send_join for the room?"""
    path = f"send_join/{quote(room_id, safe='')}"
    lines = server.output().splitlines()
    return sum("Processed request" in line and path in line for line in lines) >= count


def has_partial_state(server: Homeserver, room_id: str) -> bool:
    return bool(server.query("SELECT 1 FROM partial_state_rooms WHERE room_id = ?", room_id))


@pytest.mark.slow
@pytest.mark.requirement("P7")
def test_asking_in_vain_does_not_back_the_newcomer_off(servers: Servers) -> None:
    long = {"federation": {"destination_min_retry_interval": "10m"}}
    a, c = servers({"extra": long, "config": NO_LIMITS}, {"forwarded": True, "config": NO_LIMITS})
    assert c.forwarder is not None
    alice, carol = a.user(), c.user()
    room_id = room_of(alice, via=a)
    old = send_old_events(room_id, [alice], 40)
    carol.join(room_id, a.name)
    # All is acknowledged at once, but taken in one by one: the newcomer is asked meanwhile.
    wait_until(lambda: c.query("SELECT 1 FROM sticky_events"), "the first to be taken in")
    wait_until(lambda: sent_to(a, c), "the acknowledgement")
    c.forwarder.offline()
    wait_until(lambda: c.forwarder is not None and c.forwarder.refusals, "a question")
    c.forwarder.online()
    assert set(carol.collect_sticky(room_id, old)) == old
    new = {alice.send_sticky(room_id)}
    assert new <= carol.collect_sticky(room_id, new).keys()
    wait_until_all_pushed(a, room_id)


def sent_to(server: Homeserver, destination: Homeserver) -> bool:
    """Has the server seen a transaction acknowledged?"""
    return bool(
        re.search(
            rf"\[{destination.name}\] Completed request: 200.* PUT .*/federation/v1/send/",
            server.output(),
        )
    )
