"""What stopped delivery ends while the events are sticky: then they arrive (H7)."""

import time
from urllib.parse import quote

import pytest

from tests.conftest import Servers
from tests.integration.rooms import (
    NO_LIMITS,
    backlogged_rooms,
    introduce,
    room_of,
    wait_until_gone,
    wait_until_seen,
)
from tests.lab import Client, Homeserver, Peer, wait_until
from tests.lab.membership import allowed_to_fail
from tests.lab.peer import PeerRoom

SOON_S = 40
"""Four times as long as it may take from the restoration on."""

DENIES_THE_PEER = {"allow": ["*"], "deny": ["localhost"], "allow_ip_literals": True}
DENIES_THE_SERVER = {"allow": ["*"], "allow_ip_literals": False}
ALLOWS_ALL = {"allow": ["*"], "allow_ip_literals": True}
ACL = "m.room.server_acl"
PDUS_OF_A_TRANSACTION = 50

KILLED_OR_NOT = pytest.mark.parametrize(
    "is_killed",
    [pytest.param(False, marks=pytest.mark.workers), pytest.param(True, marks=pytest.mark.slow)],
)

HOST = "127.0.0.1"
"""Of the server under test: an ACL can tell it from the peer."""


def shared_with(alice: Client, eve: str) -> str:
    """A room in which both may do anything. The second user is not in it yet."""
    room_id = alice.create_room()
    levels = alice.request("GET", f"rooms/{quote(room_id)}/state/m.room.power_levels/")
    levels["users"][eve] = 100
    alice.send_state(room_id, "m.room.power_levels", levels)
    return room_id


def joined_for_long(server: Homeserver, peer: Peer, alice: Client, room_id: str) -> PeerRoom:
    """The peer joins, and is no newcomer any more. It is what the peer knows of the room."""
    room = peer.join(server, room_id, peer.user("eve"))
    wait_until_seen(server, peer, room_id)
    first = alice.send_sticky(room_id)
    wait_until_it_has(peer, {first})
    peer.advance(room, first)
    newcomers = "SELECT 1 FROM synapse_sticky_newcomers WHERE room_id = ?"
    wait_until(lambda: not server.query(newcomers, room_id), "it to be no newcomer", 120)
    return room


def says_nothing(method: str, path: str) -> tuple[int, object] | None:
    """As a newcomer that is still joining: it answers, and has not taken anything."""
    return (200, {"pdus": {}}) if "/send/" in path else None


def says_itself(method: str, path: str) -> tuple[int, object] | None:
    return None


def wait_until_it_has(peer: Peer, event_ids: set[str], timeout_s: float = SOON_S) -> None:
    """Waits until the peer has taken all of these events."""
    wait_until(
        lambda: event_ids <= peer.events.keys(),
        f"{len(event_ids)} events to arrive",
        timeout_s,
        lambda: f"{len(event_ids & peer.events.keys())} of them",
    )


def send_past(server: Homeserver, alice: Client, room_id: str, peer: Peer) -> None:
    """The ordinary queue is through with all that was before."""
    later = alice.send(room_id)
    wait_until_it_has(peer, {later}, 120)
    wait_until(lambda: server.log_has("got 200 response"), "the answer")


def deny_before_the_first_push(
    server: Homeserver, peer: Peer, alice: Client, room_id: str
) -> set[str]:
    """60 sticky events; the peer joins, and takes nothing before the ACL denies it. Gives their
    IDs."""
    old = {alice.send_sticky(room_id) for _ in range(60)}
    peer.override = says_nothing
    peer.join(server, room_id, peer.user("eve"))
    wait_until_seen(server, peer, room_id)
    alice.send_state(room_id, ACL, DENIES_THE_PEER)
    held = f"{peer.name} may not get events of {room_id} now"
    wait_until(lambda: server.log_has(held), "the push to be held")
    peer.override = says_itself
    return old


@pytest.mark.requirement("H7", "P3", "E4")
@KILLED_OR_NOT
def test_an_acl_put_right(servers: Servers, peer: Peer, is_killed: bool) -> None:
    (server,) = servers({"host": HOST, "config": NO_LIMITS})
    check_an_acl_put_right(server, peer, is_killed=is_killed)


def check_an_acl_put_right(server: Homeserver, peer: Peer, *, is_killed: bool) -> None:
    alice = server.user()
    room_id = alice.create_room()
    old = deny_before_the_first_push(server, peer, alice, room_id)
    if is_killed:
        server.kill()
        server.start()
        server.wait_until_ready()
    send_past(server, alice, room_id, peer)
    assert not old & peer.events.keys(), "none while it is denied"
    assert room_id in backlogged_rooms(server)
    alice.send_state(room_id, ACL, ALLOWS_ALL)
    new = {alice.send_sticky(room_id) for _ in range(5)}
    wait_until_it_has(peer, old | new)


@pytest.mark.slow
@pytest.mark.one_process
@pytest.mark.requirement("H7", "P3")
def test_who_is_kicked_while_an_acl_denies_it_gets_nothing(servers: Servers, peer: Peer) -> None:
    (server,) = servers({"host": HOST, "config": NO_LIMITS})
    alice = server.user()
    room_id = alice.create_room()
    old = deny_before_the_first_push(server, peer, alice, room_id)
    alice.kick(room_id, peer.user("eve"))
    alice.send_state(room_id, ACL, ALLOWS_ALL)
    wait_until(lambda: room_id not in backlogged_rooms(server), "the push to end")
    assert not old & peer.events.keys()


def send_acl(server: Homeserver, peer: Peer, room: PeerRoom, eve: str, content: object) -> None:
    """The peer's user makes it the room's ACL."""
    event_id, pdu = peer.make(room, eve, content, kind=ACL, state_key="")
    peer.advance(room, event_id)
    answer = peer.to(server).send(event_id.strip("$"), [pdu])
    assert answer.json()["pdus"] == {event_id: {}}, answer.text


def acl_at(alice: Client, room_id: str) -> object:
    with allowed_to_fail(404):
        return alice.request("GET", f"rooms/{quote(room_id)}/state/{ACL}/")
    return None


@pytest.mark.requirement("H7", "P1", "E4")
@KILLED_OR_NOT
def test_what_was_sent_while_an_acl_denied_this_server(
    servers: Servers, peer: Peer, is_killed: bool
) -> None:
    """To a server that has been there for long: it refuses what the ordinary queue sends it."""
    (server,) = servers({"host": HOST, "config": NO_LIMITS})
    alice = server.user()
    eve = peer.user("eve")
    room_id = shared_with(alice, eve)
    room = joined_for_long(server, peer, alice, room_id)
    send_acl(server, peer, room, eve, DENIES_THE_SERVER)
    wait_until(lambda: acl_at(alice, room_id) == DENIES_THE_SERVER, "the ACL to arrive")
    peer.refuses = lambda event_id: True
    refused = [alice.send_sticky(room_id) for _ in range(5)]
    said = f"{peer.name} refuses"
    wait_until(lambda: server.log_has(said), "the refusals")
    wait_until(lambda: room_id in backlogged_rooms(server), "that to be noted")
    if is_killed:
        server.kill()
        server.start()
        server.wait_until_ready()
    refused += [alice.send_sticky(room_id) for _ in range(5)]
    wait_until(lambda: is_offered(peer, 6), "the refusals")
    assert not peer.events.keys() & {*refused}
    peer.refuses = lambda event_id: False
    send_acl(server, peer, room, eve, ALLOWS_ALL)
    wait_until_it_has(peer, {*refused})


def is_offered(peer: Peer, count: int) -> bool:
    """Was the peer sent so many events that it refused?"""
    return sum(1 for pdu in peer.received if pdu not in peer.events.values()) >= count


@pytest.mark.slow
@pytest.mark.one_process
@pytest.mark.requirement("H7", "P1", "H1")
@pytest.mark.parametrize("is_newcomer", [False, True])
def test_what_another_server_could_not_take_for_a_while(
    servers: Servers, peer: Peer, is_newcomer: bool
) -> None:
    """Nothing in the room says that it has passed."""
    (server,) = servers({"config": NO_LIMITS})
    alice = server.user()
    room_id = alice.create_room()
    if is_newcomer:
        peer.join(server, room_id, peer.user("eve"))
        wait_until_seen(server, peer, room_id)
    else:
        joined_for_long(server, peer, alice, room_id)
    peer.refuses = lambda event_id: True
    refused = {alice.send_sticky(room_id) for _ in range(10)}
    wait_until(lambda: is_offered(peer, 10), "the refusals")
    peer.refuses = refused.__contains__
    taken = {alice.send(room_id), alice.send_sticky(room_id)}
    wait_until_it_has(peer, taken)
    assert not refused & peer.events.keys()
    peer.refuses = lambda event_id: False
    wait_until_it_has(peer, refused, 4 * 60)
    # Others that were taken meanwhile are not sent again and again.
    assert sum(pdu == peer.events[e] for e in taken for pdu in peer.received) <= 2 * len(taken)


@pytest.mark.slow
@pytest.mark.one_process
@pytest.mark.requirement("H7", "E4")
def test_a_whitelist_put_right_at_a_restart(servers: Servers, peer: Peer) -> None:
    (server,) = servers({"config": NO_LIMITS})
    alice = server.user()
    room_id = alice.create_room()
    joined_for_long(server, peer, alice, room_id)
    wait_until(lambda: server.query("SELECT 1 FROM synapse_sticky_whitelists"), "it to be known")
    server.write_config(federation_domain_whitelist=[server.name])
    server.restart()
    missed = {alice.send_sticky(room_id) for _ in range(3)}
    select = "SELECT allowed FROM synapse_sticky_whitelists"
    wait_until(lambda: server.query(select) != [("null",)], "the new one to be known")
    assert not missed & peer.events.keys()
    server.write_config()
    server.restart()
    wait_until_it_has(peer, missed)


@pytest.mark.slow
@pytest.mark.one_process
@pytest.mark.requirement("H7", "P2", "E4")
def test_a_server_that_was_never_reached(servers: Servers) -> None:
    """It was in the room before. Synapse cannot catch up with it."""
    a, b, c = servers({}, {}, {"forwarded": True})
    assert c.forwarder is not None
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, carol, via=a)
    introduce(c, b)
    c.forwarder.offline()
    bob.join(room_id, a.name)
    missed = {bob.send_sticky(room_id) for _ in range(3)}
    wait_until(lambda: b.log_has(f"TX [{c.name}]"), "an attempt")
    b.kill()
    # As after some more attempts.
    now_ms = int(time.time() * 1000)
    b.change(
        f"UPDATE destinations SET retry_last_ts = {now_ms}, retry_interval = 3000000,"
        f" failure_ts = {now_ms} WHERE destination = '{c.name}'"
    )
    b.start()
    b.wait_until_ready()
    c.forwarder.online()
    is_up = f"origin '{c.name}' as up"
    # It first learns from the other server who is in the room.
    wait_until(lambda: carol.send(room_id) and b.log_has(is_up), "a contact", 240)
    assert carol.collect_sticky(room_id, missed, SOON_S).keys() >= missed


@pytest.mark.slow
@pytest.mark.requirement("H7", "P3")
def test_both_ends_with_the_module(servers: Servers) -> None:
    a, c = servers({"config": NO_LIMITS}, {"host": HOST, "forwarded": True, "config": NO_LIMITS})
    assert c.forwarder is not None
    alice, carol = a.user(), c.user()
    room_id = alice.create_room("joined")
    old = {alice.send_sticky(room_id) for _ in range(60)}
    introduce(c, a)
    c.forwarder.hold()
    carol.join(room_id, a.name)
    wait_until_seen(a, c, room_id)
    # It asks for the room's state after the join. An ACL would deny it that, too.
    partial = "SELECT 1 FROM partial_state_rooms WHERE room_id = ?"
    wait_until(lambda: not c.query(partial, room_id), "the state to be whole")
    alice.send_state(room_id, ACL, DENIES_THE_SERVER)
    c.forwarder.release()
    held = f"{c.name} may not get events of {room_id} now"
    wait_until(lambda: a.log_has(held), "the push to be held")
    new = {alice.send_sticky(room_id) for _ in range(5)}
    seen = carol.collect_sticky(room_id, new)
    # What was under way when the ACL was sent gets through: one transaction, and no second one.
    assert len(seen.keys() & old) <= PDUS_OF_A_TRANSACTION
    alice.send_state(room_id, ACL, ALLOWS_ALL)
    assert carol.collect_sticky(room_id, old | new, SOON_S).keys() >= old | new


@pytest.mark.slow
@pytest.mark.one_process
@pytest.mark.requirement("H7", "P3")
def test_our_own_leaving_and_coming_back(servers: Servers) -> None:
    """Before the first push gets through, nobody of this server is in the room any more."""
    a, c = servers({"config": NO_LIMITS}, {"forwarded": True, "config": NO_LIMITS})
    assert c.forwarder is not None
    alice, carol = a.user(), c.user()
    room_id = alice.create_room()
    old = {alice.send_sticky(room_id) for _ in range(60)}
    introduce(c, a)
    c.forwarder.hold()
    carol.join(room_id, a.name)
    wait_until_seen(a, c, room_id)
    alice.leave(room_id)
    c.forwarder.release()
    held = f"{a.name} may not send in {room_id} now"
    wait_until(lambda: a.log_has(held), "the push to be held")
    wait_until_gone(carol, room_id, alice)
    alice.join(room_id, c.name)
    new = {alice.send_sticky(room_id) for _ in range(5)}
    assert carol.collect_sticky(room_id, old | new, SOON_S).keys() >= old | new
