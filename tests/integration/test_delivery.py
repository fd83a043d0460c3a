"""Sticky events reach those who are joined, whole and once, and nobody else."""

import json
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest

from tests.conftest import Servers
from tests.integration.rooms import (
    NO_LIMITS,
    pdus_of,
    room_of,
    wait_until_expired,
    wait_until_joined,
    wait_until_persisted,
    wait_until_sticky,
)
from tests.lab import Client, Homeserver, wait_until
from tests.lab.client import (
    HOUR_MS,
    SLIDING_EXTENSION,
    STICKY_FIELD,
    STICKY_PARAMETER,
    TTL,
    WITHOUT_TIMELINE,
    ApiError,
    sliding_sticky_events,
    sticky_events,
)
from tests.lab.membership import NOT_JOINED, allowed_to_fail, asked_one_by_one, let_in
from tests.lab.views import is_hidden, send_thread, view


@pytest.fixture(scope="module")
def server(three: list[Homeserver]) -> Homeserver:
    return three[0]


@pytest.fixture(scope="module")
def stateful(lab: Any) -> Any:
    """A server that takes sticky state events."""
    (started,) = lab.servers({"config": {"state_events": True}})
    yield started
    lab.close_servers([started])


# Who gets what (D8)


@pytest.mark.requirement("D8", "D5")
@pytest.mark.parametrize("become", NOT_JOINED)
@pytest.mark.parametrize("history_visibility", ["world_readable", "shared", "joined"])
def test_sections_are_for_joined_users(
    server: Homeserver, become: Callable[[Client, Client, str], None], history_visibility: str
) -> None:
    alice, bob = server.user(), server.user()
    room_id = alice.create_room(history_visibility)
    subscription = {"timeline_limit": 10, "required_state": []}
    subscribed: dict[str, Any] = {
        "room_subscriptions": {room_id: subscription},
        "conn_id": "subscribed",
    }
    since = bob.sync()["next_batch"]
    sliding, subscribing = bob.sliding_sync(), bob.sliding_sync(**subscribed)
    become(alice, bob, room_id)
    between = bob.sync()["next_batch"]
    event_id, plain = alice.send_sticky(room_id), alice.send(room_id)

    with_left = {"room": {"include_leave": True}}
    syncs = [bob.sync(position, filter_=with_left) for position in (None, since, between)]
    for sync in syncs:
        for room in sync.get("rooms", {}).get("join", {}).values():
            assert STICKY_FIELD not in room
    sliding_syncs = [
        bob.sliding_sync(sliding),
        bob.sliding_sync(subscribing, **subscribed),
        bob.sliding_sync(conn_id="new"),
        bob.sliding_sync(**{**subscribed, "conn_id": "newly subscribed"}),
    ]
    for answer in sliding_syncs:
        assert sliding_sticky_events(answer, room_id) == []
    # Everywhere else it is as if it were not sticky.
    for answer in [*syncs, *sliding_syncs]:
        assert (event_id in json.dumps(answer)) == (plain in json.dumps(answer))
    assert view(bob, room_id, (event_id, event_id)) == view(bob, room_id, (plain, plain))

    # And once joined, by every one of these ways.
    let_in(alice, bob, room_id)
    for position in (None, since, between):
        assert event_id in sticky_events(bob.sync(position, filter_=WITHOUT_TIMELINE), room_id)
    assert sliding_sticky_events(bob.sliding_sync(sliding), room_id) == [event_id]
    section = sliding_sticky_events(bob.sliding_sync(conn_id="newest"), room_id)
    assert section == [event_id]
    assert bob.event(room_id, event_id)["event_id"] == event_id


@pytest.mark.requirement("D6")
def test_events_of_ignored_users_are_left_out_and_hold_nobody_up(servers: Servers) -> None:
    (server,) = servers({"config": NO_LIMITS})
    alice, mallory, bob = server.user(), server.user(), server.user()
    room_id = room_of(alice, mallory, via=server)
    ignored: dict[str, Any] = {"ignored_users": {mallory.user_id: {}}}
    bob.request("PUT", f"user/{bob.user_id}/account_data/m.ignored_user_list", ignored)
    for _ in range(120):
        mallory.send_sticky(room_id)
    of_alice = alice.send_sticky(room_id)
    bob.join(room_id)
    answer, seen = None, list[str]()
    for _ in range(3):
        answer = bob.sliding_sync(answer)
        seen += sliding_sticky_events(answer, room_id)
    assert seen == [of_alice]


# Redactions (S5)


def redact_afterwards(a: Homeserver, b: Homeserver, alice: Client, bob: Client, room: str) -> str:
    event_id = bob.send_sticky(room)
    wait_until_sticky(a, event_id)
    bob.redact(room, event_id)
    return event_id


def redaction_comes_first(
    a: Homeserver, b: Homeserver, alice: Client, bob: Client, room: str
) -> str:
    """Of a remote event, delivered by hand."""
    assert a.forwarder is not None
    a.forwarder.offline()
    event_id = bob.send_sticky(room)
    redaction_id: str = bob.request(
        "PUT", f"rooms/{quote(room)}/redact/{quote(event_id)}/first", {}
    )["event_id"]
    to_a = a.as_seen_by(b)
    # Without the event before it, which would have to be fetched first.
    for number, late in enumerate([redaction_id, event_id]):
        answer = to_a.send(f"by-hand-{number}", pdus_of(b, [late]))
        assert answer.status_code == 200, answer.text
    a.forwarder.online()
    wait_until_persisted(a, redaction_id)
    wait_until_persisted(a, event_id)
    return event_id


def local_redaction(a: Homeserver, b: Homeserver, alice: Client, bob: Client, room: str) -> str:
    event_id = alice.send_sticky(room)
    alice.redact(room, event_id)
    return event_id


@pytest.mark.requirement("S5")
@pytest.mark.parametrize(
    "redact",
    [
        pytest.param(redact_afterwards, marks=pytest.mark.slow),
        redaction_comes_first,
        local_redaction,
    ],
)
def test_redacted_events_leave_both_sections(
    servers: Servers, redact: Callable[[Homeserver, Homeserver, Client, Client, str], str]
) -> None:
    a, b = servers({"forwarded": True, "probed": True}, {})
    alice, carol, bob = a.user(), a.user(), b.user()
    room_id = room_of(alice, carol, bob, via=a)
    redacted = redact(a, b, alice, bob, room_id)
    kept = alice.send_sticky(room_id)

    def sections() -> list[list[str]]:
        sync = carol.sync(filter_=WITHOUT_TIMELINE)
        room = sync["rooms"]["join"].get(room_id, {})
        events = room.get(STICKY_FIELD, {}).get("events", [])
        assert all(STICKY_FIELD in event for event in events)
        sliding = carol.sliding_sync()
        return [[e["event_id"] for e in events], sliding_sticky_events(sliding, room_id)]

    wait_until(lambda: not a.index_knows(redacted), "the redaction")
    wait_until(lambda: sections() == [[kept]] * 2, "both sections to be without it")
    # Nor does the database bring it back.
    a.restart()
    assert sections() == [[kept]] * 2
    shown = alice.event(room_id, redacted)
    assert STICKY_FIELD not in shown
    assert TTL not in shown.get("unsigned", {})


# History visibility (C1)


@pytest.mark.requirement("C1", "D5")
@pytest.mark.parametrize("history_visibility", ["invited", "joined"])
def test_joined_users_see_sticky_events_from_before(
    three: list[Homeserver], history_visibility: str
) -> None:
    a, b, _ = three
    alice, bob, carol, eve = a.user(), a.user(), b.user(), a.user()
    room_id = room_of(alice, via=a, history_visibility=history_visibility)
    plain = alice.send(room_id)
    expiring = alice.send_sticky(room_id, 3_000)
    sticky = alice.send_sticky(room_id)
    for user in (bob, carol):
        user.join(room_id, a.name)
    wait_until_joined(carol, room_id, {alice.user_id, carol.user_id})
    wait_until_sticky(b, sticky)
    for user in (bob, carol):
        event, context, messages, _ = asked_one_by_one(user, room_id, sticky)
        assert sticky in event
        assert json.loads(context)["event"]["event_id"] == sticky
        assert sticky in messages
        assert not any(plain in answer for answer in (event, context, messages))
        assert user.event(room_id, sticky)["unsigned"][TTL] <= HOUR_MS
    assert not any(plain in answer for answer in asked_one_by_one(bob, room_id, plain))
    assert not any(sticky in answer for answer in asked_one_by_one(eve, room_id, sticky))

    wait_until_expired(a, expiring)
    assert not any(expiring in answer for answer in asked_one_by_one(bob, room_id, expiring))
    bob.leave(room_id)
    assert not any(sticky in answer for answer in asked_one_by_one(bob, room_id, sticky))


@pytest.mark.requirement("C1", "D6", "P6")
def test_neither_erased_nor_ignored_users_are_shown(server: Homeserver) -> None:
    alice, eve, mallory, bob = (server.user() for _ in range(4))
    admin = server.user(admin=True)
    room_id = room_of(alice, eve, mallory, via=server, history_visibility="joined")
    of_eve = send_thread(eve, room_id, HOUR_MS)
    of_mallory = send_thread(mallory, room_id, HOUR_MS)
    bob.join(room_id)
    assert view(bob, room_id, of_eve) == view(alice, room_id, of_eve)
    content = bob.event(room_id, of_eve[0])["content"]
    assert content == alice.event(room_id, of_eve[0])["content"] != {}
    admin.request("POST", f"/_synapse/admin/v1/deactivate/{eve.user_id}", {"erase": True})
    ignored: dict[str, Any] = {"ignored_users": {mallory.user_id: {}}}
    bob.request("PUT", f"user/{bob.user_id}/account_data/m.ignored_user_list", ignored)
    wait_until(lambda: is_hidden(view(bob, room_id, of_eve)), "the erasure")
    assert is_hidden(view(bob, room_id, of_mallory))


# The parameter (S3)


def put(user: Client, room_id: str, kind: str, value: object, **query: Any) -> Any:
    """An event or a state event with this value for the parameter."""
    end = "abc" if kind == "send" else ""
    path = f"rooms/{quote(room_id)}/{kind}/org.example.call/{end}"
    return user.request("PUT", path, {"n": str(value)}, **{STICKY_PARAMETER: value}, **query)


@pytest.mark.requirement("S3")
@pytest.mark.parametrize("kind", ["send", "state"])
@pytest.mark.parametrize(
    "value",
    [-1, "1.5", "true", "", "an hour", "1e3", "0x10", "1_000", " 5", "\u0663", 2**53, 10**400],
)
def test_values_that_are_none(stateful: Homeserver, kind: str, value: object) -> None:
    alice = stateful.user()
    room_id = alice.create_room()
    with pytest.raises(ApiError) as refused:
        put(alice, room_id, kind, value)
    assert (refused.value.status, refused.value.errcode) == (400, "M_INVALID_PARAM")
    assert STICKY_PARAMETER in refused.value.body["error"]
    sent = alice.request("GET", f"rooms/{quote(room_id)}/messages", dir="b", limit=1)["chunk"]
    assert sent[0]["type"] != "org.example.call", "it was not sent"


@pytest.mark.requirement("S1", "S3", "S4")
@pytest.mark.parametrize("kind", ["send", "state"])
@pytest.mark.parametrize(
    ("value", "sticky_ms"), [(60_000, 60_000), (HOUR_MS, HOUR_MS), (2 * HOUR_MS, HOUR_MS)]
)
def test_values_that_are_good(stateful: Homeserver, kind: str, value: int, sticky_ms: int) -> None:
    alice = stateful.user()
    room_id = alice.create_room()
    event_id = put(alice, room_id, kind, value)["event_id"]
    assert sticky_events(alice.sync(), room_id) == [event_id]
    assert sliding_sticky_events(alice.sliding_sync(), room_id) == [event_id]
    event = alice.event(room_id, event_id)
    assert event[STICKY_FIELD] == {"duration_ms": value}
    assert sticky_ms - 60_000 < event["unsigned"][TTL] <= sticky_ms
    # The same state again is sticky anew, and the same request again is not sent again.
    again = put(alice, room_id, kind, value)["event_id"]
    assert (again == event_id) == (kind == "send")


@pytest.mark.requirement("S3")
def test_state_events_by_default(server: Homeserver) -> None:
    alice = server.user()
    room_id = alice.create_room()
    event_id = put(alice, room_id, "state", HOUR_MS)["event_id"]
    assert STICKY_FIELD not in alice.event(room_id, event_id)
    assert sticky_events(alice.sync(), room_id) == []


@pytest.mark.requirement("S3")
@pytest.mark.parametrize("kind", ["send", "state"])
def test_delayed_events_are_sticky_when_they_are_due(stateful: Homeserver, kind: str) -> None:
    alice, bob = stateful.user(), stateful.user()
    room_id = room_of(alice, bob, via=stateful)
    since = bob.sync()["next_batch"]
    put(alice, room_id, kind, HOUR_MS, **{"org.matrix.msc4140.delay": 500})
    answer = bob.sync(since, timeout_ms=30_000, filter_=WITHOUT_TIMELINE)
    assert len(sticky_events(answer, room_id)) == 1


@pytest.mark.requirement("S3")
def test_memberships_are_not_sticky(stateful: Homeserver) -> None:
    alice = stateful.user()
    room_id = alice.create_room()
    path = f"rooms/{quote(room_id)}/state/m.room.member/{quote(alice.user_id)}"
    with pytest.raises(ApiError) as refused:
        alice.request("PUT", path, {"membership": "join"}, **{STICKY_PARAMETER: 1000})
    assert (refused.value.status, refused.value.errcode) == (400, "M_INVALID_PARAM")
    assert STICKY_PARAMETER in refused.value.body["error"]


# The sections (D1 to D4, D7, D9)


@pytest.mark.requirement("D1", "D3", "D9", "S4")
def test_old_events_after_a_gap_and_none_twice(server: Homeserver) -> None:
    alice, bob = server.user(), server.user()
    room_id = room_of(alice, bob, via=server)
    since = bob.sync()["next_batch"]
    old = alice.send_sticky(room_id)
    for _ in range(5):
        alice.send(room_id)
    new = alice.send_sticky(room_id)
    answer = bob.sync(since, filter_={"room": {"timeline": {"limit": 2}}})
    room = answer["rooms"]["join"][room_id]
    assert room["timeline"]["limited"]
    in_timeline = {e["event_id"]: e for e in room["timeline"]["events"]}
    assert [e["event_id"] for e in room[STICKY_FIELD]["events"]] == [old]
    assert new in in_timeline
    for event in (in_timeline[new], room[STICKY_FIELD]["events"][0]):
        assert 0 < event["unsigned"][TTL] <= HOUR_MS
    assert sticky_events(bob.sync(answer["next_batch"]), room_id) == []


@pytest.mark.slow
@pytest.mark.requirement("D1", "D4")
def test_250_events_in_three_syncs(servers: Servers) -> None:
    (server,) = servers({"config": NO_LIMITS})
    alice, bob = server.user(), server.user()
    room_id = room_of(alice, bob, via=server)
    since = bob.sync()["next_batch"]
    sent = [alice.send_sticky(room_id) for _ in range(250)]
    seen = []
    for _ in range(3):
        answer = bob.sync(since, filter_=WITHOUT_TIMELINE)
        since = answer["next_batch"]
        seen += sticky_events(answer, room_id)
    assert seen == sent
    # A joiner gets all of it.
    carol = server.user()
    since = carol.sync()["next_batch"]
    carol.join(room_id)
    assert sticky_events(carol.sync(since, filter_=WITHOUT_TIMELINE), room_id) == sent


@pytest.mark.requirement("D1", "D2")
def test_waiting_syncs_are_answered(server: Homeserver) -> None:
    alice, bob = server.user(), server.user()
    room_id = room_of(alice, bob, via=server)
    since, sliding = bob.sync()["next_batch"], bob.sliding_sync()
    answers: dict[str, list[str]] = {}

    def wait_v3() -> None:
        answer = bob.sync(since, timeout_ms=60_000, filter_=WITHOUT_TIMELINE)
        answers["v3"] = sticky_events(answer, room_id)

    def wait_sliding() -> None:
        answer = bob.sliding_sync(sliding, timeout_ms=60_000)
        answers["sliding"] = sliding_sticky_events(answer, room_id)

    threads = [threading.Thread(target=target) for target in (wait_v3, wait_sliding)]
    for thread in threads:
        thread.start()
    event_id = alice.send_sticky(room_id)
    for thread in threads:
        thread.join(60)
    assert answers == {"v3": [event_id], "sliding": [event_id]}


@pytest.mark.requirement("D4", "S2")
def test_expired_events_are_in_no_section(server: Homeserver) -> None:
    alice = server.user()
    room_id = alice.create_room()
    expiring, kept = alice.send_sticky(room_id, 1), alice.send_sticky(room_id)
    wait_until_expired(server, expiring)
    assert sticky_events(alice.sync(filter_=WITHOUT_TIMELINE), room_id) == [kept]
    assert sliding_sticky_events(alice.sliding_sync(), room_id) == [kept]
    assert TTL not in alice.event(room_id, expiring).get("unsigned", {})


@pytest.mark.requirement("S4", "S5", "D4")
def test_an_answer_that_is_repeated_has_nothing_that_is_not_sticky_any_more(
    server: Homeserver,
) -> None:
    """Synapse answers the same request, an initial one or not, from a cache within two minutes."""
    alice, bob = server.user(), server.user()
    room_id = room_of(alice, bob, via=server)
    since = bob.sync()["next_batch"]
    expiring, redacted = alice.send_sticky(room_id, 8_000), alice.send_sticky(room_id)
    kept = alice.send_sticky(room_id)

    def answers() -> Any:
        return [
            bob.sync(after, filter_=WITHOUT_TIMELINE, may_be_repeated=True)
            for after in (None, since)
        ]

    def sections() -> list[list[str]]:
        return [sticky_events(answer, room_id) for answer in answers()]

    first = answers()
    for answer in first:
        assert sticky_events(answer, room_id) == [expiring, redacted, kept]
    alice.redact(room_id, redacted)
    wait_until_expired(server, expiring)
    wait_until(lambda: sections() == [[kept]] * 2, "both to be gone", look=sections)
    for before, again in zip(first, answers(), strict=True):
        assert again["next_batch"] == before["next_batch"], "it is the same answer"
        (event,) = again["rooms"]["join"][room_id]["msc4354_sticky"]["events"]
        assert event["unsigned"][TTL] > 0


@pytest.mark.requirement("D7")
def test_syncs_until_a_victim_is_seen(servers: Servers) -> None:
    # What is in the stream already can only be read in its order; what is new in another room
    # than the one that is being caught up with does not wait for it in sliding sync.
    (server,) = servers({"config": {"local": {"per_user": {"per_second": 1, "burst_count": 90}}}})
    mallory, victim, bob = server.user(), server.user(), server.user()
    room_id = room_of(mallory, victim, bob, via=server)
    since, sliding = bob.sync()["next_batch"], bob.sliding_sync()
    accepted = 0
    for _ in range(300):
        with allowed_to_fail(429):
            mallory.send_sticky(room_id)
            accepted += 1
    of_victim = victim.send_sticky(room_id)
    syncs = 0
    while of_victim not in (seen := sticky_events(bob.sync(since), room_id)):
        since = bob.sync(since)["next_batch"]
        syncs += 1
        assert seen
    assert syncs + 1 <= 1 + accepted // 100
    assert accepted < 150
    assert sliding_sticky_events(bob.sliding_sync(sliding), room_id)


@pytest.mark.requirement("C2")
def test_soft_failed_and_delivered_after_a_rejoin(servers: Servers) -> None:
    a, b = servers({"forwarded": True}, {})
    assert a.forwarder is not None
    alice, bob = a.user(), b.user()
    room_id = room_of(alice, bob, via=a)
    a.forwarder.offline()
    of_bob = bob.send_sticky(room_id)
    alice.kick(room_id, bob.user_id)
    since, sliding = alice.sync()["next_batch"], alice.sliding_sync()
    a.forwarder.online()
    wait_until_persisted(a, of_bob)
    assert of_bob not in json.dumps([alice.sync(since), alice.sliding_sync(sliding)])
    wait_until(lambda: _joined_again(bob, room_id, a.name), "the kick to be known")
    wait_until(
        lambda: of_bob in sticky_events(alice.sync(since, filter_=WITHOUT_TIMELINE), room_id),
        "the event to be accepted after all",
    )
    assert of_bob in json.dumps(alice.sliding_sync(sliding)["extensions"][SLIDING_EXTENSION])


def _joined_again(user: Client, room_id: str, via: str) -> bool:
    try:
        user.join(room_id, via)
    except ApiError:
        return False
    return True


@pytest.mark.requirement("S7")
def test_versions(server: Homeserver) -> None:
    versions = server.user().request("GET", "/_matrix/client/versions")
    assert versions["unstable_features"]["org.matrix.msc4354"] is True
