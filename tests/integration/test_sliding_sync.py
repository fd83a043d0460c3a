"""Sliding sync gives whoever is joined each sticky event once, old ones after a join as well."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Servers
from tests.integration.rooms import NO_LIMITS
from tests.lab import Client, Homeserver, wait_until
from tests.lab.client import ApiError, assert_nothing_new, sliding_sticky_events, token_of

LIMIT = 100


@pytest.fixture(scope="module")
def server(three: list[Homeserver]) -> Homeserver:
    return three[0]


def sync_until_empty(user: Client, answer: Any, room_ids: list[str]) -> list[dict[str, list[str]]]:
    """What each following answer has of the rooms, up to the first that has nothing."""
    pages: list[dict[str, list[str]]] = []
    while True:
        answer = user.sliding_sync(answer, limit=LIMIT)
        page = {room_id: sliding_sticky_events(answer, room_id) for room_id in room_ids}
        if not any(page.values()):
            return pages
        pages.append(page)


@pytest.mark.requirement("D5")
@pytest.mark.parametrize("history_visibility", ["shared", "joined"])
def test_who_joins_gets_what_was_there(server: Homeserver, history_visibility: str) -> None:
    alice, bob = server.user(), server.user()
    room_id = alice.create_room(history_visibility)
    elsewhere = bob.create_room()
    old = [alice.send_sticky(room_id) for _ in range(3)]
    # A position that is past them.
    later = bob.send_sticky(elsewhere)
    first = bob.sliding_sync()
    assert sliding_sticky_events(first, elsewhere) == [later]
    assert not sliding_sticky_events(first, room_id)
    assert not sync_until_empty(bob, first, [elsewhere, room_id])

    bob.join(room_id)
    joined = bob.sliding_sync(first)
    assert sliding_sticky_events(joined, room_id) == old
    assert not sliding_sticky_events(joined, elsewhere)
    new = alice.send_sticky(room_id)
    assert sync_until_empty(bob, joined, [elsewhere, room_id]) == [{elsewhere: [], room_id: [new]}]


@pytest.mark.requirement("D5")
def test_answers_that_are_lost_are_repeated(server: Homeserver) -> None:
    alice, bob = server.user(), server.user()
    room_id, elsewhere = alice.create_room(), bob.create_room()
    old = [alice.send_sticky(room_id) for _ in range(5)]
    bob.send_sticky(elsewhere)
    answer = bob.sliding_sync(limit=2)
    bob.join(room_id)
    seen: list[str] = []
    while (page := sliding_sticky_events(bob.sliding_sync(answer, limit=2), room_id)) != []:
        assert len(page) <= 2
        lost = bob.sliding_sync(answer, limit=2)
        assert sliding_sticky_events(lost, room_id) == page
        answer = bob.sliding_sync(answer, limit=2)
        assert sliding_sticky_events(answer, room_id) == page
        seen += page
    assert seen == old


@pytest.mark.slow
@pytest.mark.requirement("D2", "D4", "D5", "D7")
def test_250_events_at_once_or_in_pages_with_new_ones_beside_them(servers: Servers) -> None:
    (server,) = servers({"config": NO_LIMITS})
    alice, bob = server.user(), server.user()
    room_id, elsewhere = alice.create_room(), alice.create_room()
    bob.join(elsewhere)
    old = [alice.send_sticky(room_id) for _ in range(250)]
    alice.send_sticky(elsewhere)
    answer = bob.sliding_sync()
    assert len(sliding_sticky_events(answer, elsewhere)) == 1
    bob.join(room_id)

    # Nothing on the server changes meanwhile: the tokens alone say what is left.
    pages = sync_until_empty(bob, answer, [room_id])
    assert [page[room_id] for page in pages] == [old]

    # Once more, as somebody whose client takes fewer, with an event in another room that is not to
    # wait for all that.
    carol = server.user()
    carol.join(elsewhere)
    answer = carol.sliding_sync()
    carol.join(room_id)
    answer = carol.sliding_sync(answer, limit=LIMIT - 1)
    seen = sliding_sticky_events(answer, room_id)
    assert len(seen) == LIMIT - 1
    new = alice.send_sticky(elsewhere)
    pages = sync_until_empty(carol, answer, [room_id, elsewhere])
    assert pages[0][elsewhere] == [new]
    assert seen + [event_id for page in pages for event_id in page[room_id]] == old
    assert len(pages) == 2


@pytest.mark.requirement("D5")
def test_two_joins_while_pages_are_read(server: Homeserver) -> None:
    alice, bob = server.user(), server.user()
    rooms = [alice.create_room() for _ in range(2)]
    old = {room_id: [alice.send_sticky(room_id) for _ in range(6)] for room_id in rooms}
    bob.send_sticky(bob.create_room())
    answer = bob.sliding_sync()
    seen: dict[str, list[str]] = {room_id: [] for room_id in rooms}
    for joined in [*rooms, None, None, None, None, None]:
        if joined:
            bob.join(joined)
        answer = bob.sliding_sync(answer, limit=3)
        for room_id in rooms:
            seen[room_id] += sliding_sticky_events(answer, room_id)
    assert seen == old
    assert not bob.sliding_sync(since=token_of(answer))["has_section"], "nothing is left"


@pytest.mark.requirement("D4", "D5")
def test_a_new_connection_in_the_middle_of_what_is_older(server: Homeserver) -> None:
    alice, bob = server.user(), server.user()
    room_id, elsewhere = alice.create_room(), bob.create_room()
    old = [alice.send_sticky(room_id) for _ in range(5)]
    bob.send_sticky(elsewhere)
    answer = bob.sliding_sync()
    bob.join(room_id)
    seen: list[str] = []
    for number in range(5):
        answer = bob.sliding_sync(since=token_of(answer), limit=1, conn_id=str(number))
        seen += sliding_sticky_events(answer, room_id)
    assert seen == old
    assert_nothing_new(bob, token_of(answer))


def begins_anew(server: Homeserver, user: Client) -> None:
    """Synapse has one connection of a name: another app of the device has begun one."""
    user.sliding_sync(limit=0)


def is_cleaned_up(server: Homeserver, user: Client) -> None:
    """As Synapse does with a connection that was not used for a week."""
    connections = f"sliding_sync_connections WHERE user_id = '{user.user_id}'"
    server.change(
        "DELETE FROM sliding_sync_connection_positions WHERE connection_key IN"
        f" (SELECT connection_key FROM {connections})",
        f"DELETE FROM {connections}",
    )


@pytest.mark.requirement("D4", "D5")
@pytest.mark.parametrize("forget", [begins_anew, is_cleaned_up])
def test_an_unknown_pos(server: Homeserver, forget: Callable[[Homeserver, Client], None]) -> None:
    """Synapse answers it with an error. The client goes on from the extension's ``since``."""
    alice, bob = server.user(), server.user()
    room_id, later = alice.create_room(), alice.create_room()
    bob.join(room_id)
    old = [alice.send_sticky(room_id) for _ in range(3)]
    older = [alice.send_sticky(later) for _ in range(2)]
    first = bob.sliding_sync(limit=2)
    assert sliding_sticky_events(first, room_id) == old[:2]
    bob.join(later)
    forget(server, bob)
    with pytest.raises(ApiError) as refused:
        bob.sliding_sync(first)
    assert refused.value.errcode == "M_UNKNOWN_POS"
    answer = bob.sliding_sync(since=token_of(first))
    assert sliding_sticky_events(answer, room_id) == old[2:]
    assert sliding_sticky_events(answer, later) == older
    assert not bob.sliding_sync(answer)["has_section"]
    assert_nothing_new(bob, token_of(answer))
    new = alice.send_sticky(later)
    answer = bob.sliding_sync(since=token_of(answer))
    assert sliding_sticky_events(answer, later) == [new]
    assert not sliding_sticky_events(answer, room_id)


@pytest.mark.one_process
@pytest.mark.requirement("D4", "E4")
def test_a_new_connection_after_a_restart(servers: Servers) -> None:
    (server,) = servers(1)
    alice, bob = server.user(), server.user()
    room_id = alice.create_room()
    bob.join(room_id)
    sent = [alice.send_sticky(room_id) for _ in range(3)]
    first = bob.sliding_sync(limit=2)
    assert sliding_sticky_events(first, room_id) == sent[:2]
    server.restart()
    wait_until(lambda: server.output().count("sliding is on\n") == 2, "the table of pages")
    answer = bob.sliding_sync(since=token_of(first), conn_id="new")
    assert sliding_sticky_events(answer, room_id) == sent[2:]
    assert_nothing_new(bob, token_of(answer))


@pytest.mark.requirement("D4", "D5")
def test_a_changed_profile_is_no_join_but_a_rejoin_is_one(server: Homeserver) -> None:
    alice, bob = server.user(), server.user()
    room_id = alice.create_room()
    old = [alice.send_sticky(room_id) for _ in range(3)]
    bob.join(room_id)
    answer = bob.sliding_sync()
    assert sliding_sticky_events(answer, room_id) == old
    bob.request("PUT", f"profile/{bob.user_id}/displayname", {"displayname": "Bob"})
    answer = bob.sliding_sync(answer)
    assert not sliding_sticky_events(answer, room_id)
    bob.leave(room_id)
    answer = bob.sliding_sync(answer)
    assert not sliding_sticky_events(answer, room_id)
    bob.join(room_id)
    answer = bob.sliding_sync(answer)
    assert sliding_sticky_events(answer, room_id) == old


@pytest.mark.requirement("D2")
def test_a_limit_of_nothing_loses_nothing(server: Homeserver) -> None:
    alice, bob = server.user(), server.user()
    room_id = alice.create_room()
    old = [alice.send_sticky(room_id) for _ in range(2)]
    bob.send_sticky(bob.create_room())
    answer = bob.sliding_sync()
    bob.join(room_id)
    for _ in range(2):
        answer = bob.sliding_sync(answer, limit=0)
        assert not sliding_sticky_events(answer, room_id)
    answer = bob.sliding_sync(answer, limit=1)
    assert sliding_sticky_events(answer, room_id) == old[:1]
    answer = bob.sliding_sync(answer)
    assert sliding_sticky_events(answer, room_id) == old[1:]
