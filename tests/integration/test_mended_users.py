"""What kept something from local users ends while the events are sticky: then they get it (H7)."""

from typing import Any
from urllib.parse import quote

import pytest

from tests.conftest import Servers
from tests.integration.rooms import entered, room_of
from tests.integration.test_mended import KILLED_OR_NOT
from tests.lab import Homeserver, wait_until
from tests.lab.client import (
    WITHOUT_TIMELINE,
    ApiError,
    ignore,
    sliding_sticky_events,
    sticky_events,
    token_of,
)
from tests.lab.spam import PARTIAL_STATE_HOLDER, hold_state, release_state


@pytest.mark.requirement("H7", "D6", "D4", "E2", "E4")
@KILLED_OR_NOT
def test_who_is_not_ignored_any_more_while_the_app_is_closed(
    servers: Servers, is_killed: bool
) -> None:
    (server,) = servers({})
    check_who_is_not_ignored_any_more(server, is_killed=is_killed)


def check_who_is_not_ignored_any_more(server: Homeserver, *, is_killed: bool) -> None:
    """Whatever process answers afterwards; also a connection of sliding sync that begins anew."""
    alice, mallory, bob = server.user(), server.user(), server.user()
    room_id = room_of(alice, mallory, bob, via=server)
    ignore(bob, mallory)
    hidden = [mallory.send_sticky(room_id) for _ in range(3)]
    seen = [alice.send_sticky(room_id)]

    def shows(answer: Any, expected: list[str]) -> bool:
        found = sticky_events if "next_batch" in answer else sliding_sticky_events
        return found(answer, room_id) == expected

    def sync(since: str | None = None) -> Any:
        return bob.sync(since, filter_=WITHOUT_TIMELINE)

    wait_until(lambda: shows(sync(), seen) and shows(bob.sliding_sync(), seen), "both to see it")
    before, sliding = sync(), bob.sliding_sync(conn_id="first")
    assert shows(before, seen)
    assert shows(sliding, seen)
    ignore(bob)
    if is_killed:
        server.kill()
        server.start()
        server.wait_until_ready()
    since = token_of(sliding)
    wait_until(lambda: shows(sync(before["next_batch"]), hidden), "them in /sync")
    wait_until(lambda: shows(bob.sliding_sync(since=since), hidden), "them in sliding sync")
    after = sync(before["next_batch"])
    assert shows(after, hidden)
    assert shows(sync(after["next_batch"]), [])
    anew = bob.sliding_sync(since=since)
    assert shows(anew, hidden)
    assert not bob.sliding_sync(anew)["has_section"]
    assert not bob.sliding_sync(since=token_of(anew))["has_section"]
    # The connection of before goes on from its pos.
    goes_on = bob.sliding_sync(sliding, conn_id="first")
    assert shows(goes_on, hidden)
    assert not bob.sliding_sync(goes_on, conn_id="first")["has_section"]
    later = mallory.send_sticky(room_id)
    wait_until(lambda: shows(sync(after["next_batch"]), [later]), "the next one in /sync")
    since = token_of(anew)
    wait_until(lambda: shows(bob.sliding_sync(since=since), [later]), "and in sliding sync")
    assert shows(sync(), [*hidden, *seen, later]), "a first sync"


@pytest.mark.slow
@pytest.mark.one_process
@pytest.mark.requirement("H7", "D5", "D8")
@pytest.mark.parametrize("is_sliding", [False, True])
def test_who_is_not_banned_any_more(three: list[Homeserver], is_sliding: bool) -> None:
    server = three[0]
    alice, bob = server.user(), server.user()
    room_id = room_of(alice, bob, via=server)
    before = alice.send_sticky(room_id)
    answer = bob.sliding_sync() if is_sliding else bob.sync(filter_=WITHOUT_TIMELINE)
    alice.ban(room_id, bob.user_id)
    missed = alice.send_sticky(room_id)
    if is_sliding:
        answer = bob.sliding_sync(answer)
        assert sliding_sticky_events(answer, room_id) == []
    else:
        answer = bob.sync(answer["next_batch"], filter_=WITHOUT_TIMELINE)
        assert sticky_events(answer, room_id) == []
    alice.request("POST", f"rooms/{quote(room_id)}/unban", {"user_id": bob.user_id})
    bob.join(room_id)
    if is_sliding:
        assert {before, missed} == {*sliding_sticky_events(bob.sliding_sync(answer), room_id)}
    else:
        answer = bob.sync(answer["next_batch"], filter_=WITHOUT_TIMELINE)
        assert {before, missed} == {*sticky_events(answer, room_id)}


@pytest.mark.slow
@pytest.mark.one_process
@pytest.mark.requirement("H7")
def test_who_is_not_shadow_banned_any_more(three: list[Homeserver]) -> None:
    """What such a user sends is never there. What they send afterwards is."""
    server = three[0]
    alice, bob, admin = server.user(), server.user(), server.user(admin=True)
    room_id = room_of(alice, bob, via=server)
    path = f"/_synapse/admin/v1/users/{alice.user_id}/shadow_ban"
    admin.request("POST", path)
    alice.send_sticky(room_id)
    admin.request("DELETE", path)
    sent = alice.send_sticky(room_id)
    assert sticky_events(bob.sync(filter_=WITHOUT_TIMELINE), room_id) == [sent]


@pytest.mark.slow
@pytest.mark.requirement("H7", "D1", "D2", "D5")
def test_a_room_that_is_blocked_no_more(three: list[Homeserver]) -> None:
    """Whoever is in it gets what is sticky meanwhile. Whoever could not join gets it then."""
    server, other, _ = three
    alice, bob, carol = server.user(), server.user(), other.user()
    admin = server.user(admin=True)
    room_id = room_of(alice, carol, via=server)
    sent = [alice.send_sticky(room_id)]
    before, sliding = bob.sync(filter_=WITHOUT_TIMELINE), bob.sliding_sync()
    path = f"/_synapse/admin/v1/rooms/{quote(room_id)}/block"
    admin.request("PUT", path, {"block": True})
    sent.append(alice.send_sticky(room_id))
    assert carol.collect_sticky(room_id, {*sent})
    sent.append(carol.send_sticky(room_id))
    assert alice.collect_sticky(room_id, {*sent})
    with pytest.raises(ApiError) as refused:
        bob.join(room_id)
    assert refused.value.status == 403
    admin.request("PUT", path, {"block": False})
    bob.join(room_id)
    since = before["next_batch"]
    wait_until(
        lambda: {*sticky_events(bob.sync(since, filter_=WITHOUT_TIMELINE), room_id)} == {*sent},
        "all in /sync",
    )
    assert {*sliding_sticky_events(bob.sliding_sync(sliding), room_id)} == {*sent}


WITH_ALL_STATE: Any = {
    "lists": {
        "all": {
            "ranges": [[0, 0]],
            "timeline_limit": 0,
            "required_state": [["*", "*"]],
        }
    }
}
"""Synapse keeps a room from who asks for this until it has the room's whole state."""


@pytest.mark.slow
@pytest.mark.requirement("H7", "D5", "D4")
def test_a_room_whose_state_is_whole_at_last(servers: Servers) -> None:
    """Until then clients that want all of it do not see the room. Then they see what is sticky."""
    holder = {"modules": [{"module": PARTIAL_STATE_HOLDER}]}
    resident, server = servers({"module": False}, {"extra": holder})
    alice, bob = resident.user(), server.user()
    room_id = alice.create_room()
    bob.send_sticky(bob.create_room())
    before = bob.sync(filter_=WITHOUT_TIMELINE)
    sliding = bob.sliding_sync(**WITH_ALL_STATE)
    hold_state(server.folder)
    bob.join(room_id, resident.name)
    sent = [alice.send_sticky(room_id) for _ in range(3)]
    wait_until(lambda: {*sent} <= {*entered(server, room_id)}, "them to be there")
    before = bob.sync(before["next_batch"], filter_=WITHOUT_TIMELINE)
    assert sticky_events(before, room_id) == []
    sliding = bob.sliding_sync(sliding, **WITH_ALL_STATE)
    assert sliding_sticky_events(sliding, room_id) == []
    partial = "SELECT 1 FROM partial_state_rooms WHERE room_id = ?"
    assert server.query(partial, room_id)
    release_state(server.folder)
    wait_until(lambda: not server.query(partial, room_id), "the state to be whole")
    since = before["next_batch"]

    def shown(since: str) -> list[str]:
        return sticky_events(bob.sync(since, filter_=WITHOUT_TIMELINE), room_id)

    wait_until(lambda: shown(since) == sent, "them in /sync")
    after = bob.sync(since, filter_=WITHOUT_TIMELINE)
    assert sticky_events(after, room_id) == sent
    assert shown(after["next_batch"]) == []
    sliding = bob.sliding_sync(sliding, **WITH_ALL_STATE)
    assert sliding_sticky_events(sliding, room_id) == sent
    sliding = bob.sliding_sync(sliding, **WITH_ALL_STATE)
    assert sliding_sticky_events(sliding, room_id) == []
