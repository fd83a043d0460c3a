"""What is sticky, and for how long (S1 to S7)."""

import json
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest

from tests.conformance.conftest import TargetWith
from tests.conformance.target import EXTENDED, Options, Target
from tests.lab import Client, Peer, wait_until
from tests.lab.client import (
    HOUR_MS,
    STICKY_FIELD,
    STICKY_PARAMETER,
    TTL,
    WITHOUT_TIMELINE,
    ApiError,
    sticky_events,
)
from tests.lab.peer import Answer, now_ms
from tests.lab.scene import Scene, enter
from tests.lab.spam import SPAM_CHECKER

_MINUTE_MS = 60_000
_WRONG: list[Any] = [
    _MINUTE_MS,
    "sticky",
    True,
    [],
    [{"duration_ms": _MINUTE_MS}],
    {},
    {"duration": _MINUTE_MS},
    {"duration_ms": "60000"},
    {"duration_ms": True},
    {"duration_ms": None},
    {"duration_ms": -1},
    {"duration_ms": [_MINUTE_MS]},
    {"duration_ms": {"duration_ms": _MINUTE_MS}},
]


def ttls(client: Client, room_id: str) -> dict[str, int]:
    """The events of the section of /sync, and how long each still is sticky, in ms."""
    room = client.sync(filter_=WITHOUT_TIMELINE)["rooms"]["join"].get(room_id, {})
    events = room.get(STICKY_FIELD, {}).get("events", [])
    return {event["event_id"]: event["unsigned"][TTL] for event in events}


def put(user: Client, room_id: str, kind: str, value: object, **query: Any) -> str:
    """An event or state event with this value for the parameter."""
    end = f"{kind}-{value}" if kind == "send" else ""
    path = f"rooms/{quote(room_id)}/{kind}/org.example.call/{end}"
    query[STICKY_PARAMETER] = value
    event_id: str = user.request("PUT", path, {"value": str(value)}, **query)["event_id"]
    return event_id


@pytest.mark.requirement("S1")
def test_wrong_fields_are_not_sticky(scene: Scene[Target]) -> None:
    wrong = [scene.peer.make(scene.room, scene.eve, **{STICKY_FIELD: field})[1] for field in _WRONG]
    answer = scene.send(*wrong)
    assert [said for said in answer.values() if said] == []
    scene.wait_for_sections(scene.sticky())


@pytest.mark.requirement("S1", "S4")
@pytest.mark.parametrize("duration_ms", [2 * HOUR_MS, 2**53 - 1])
def test_more_than_an_hour_counts_as_an_hour(scene: Scene[Target], duration_ms: int) -> None:
    event_id = scene.sticky(duration_ms=duration_ms)
    scene.wait_for_sections(event_id)
    assert 0 < ttls(scene.alice, scene.room_id)[event_id] <= HOUR_MS


@pytest.mark.requirement("S2")
def test_start_is_the_earlier_of_sent_and_received(scene: Scene[Target]) -> None:
    sent_at = {"future": 2 * HOUR_MS, "earlier": -20 * _MINUTE_MS, "over": -2 * HOUR_MS}
    events = {
        name: scene.peer.sticky(
            scene.room, scene.eve, 30 * _MINUTE_MS, origin_server_ts=now_ms() + offset_ms
        )
        for name, offset_ms in sent_at.items()
    }
    scene.send(*(pdu for _, pdu in events.values()))
    future, earlier = events["future"][0], events["earlier"][0]
    scene.wait_for_sections(future, earlier)
    left_ms = ttls(scene.alice, scene.room_id)
    assert 0 < left_ms[earlier] <= 10 * _MINUTE_MS
    assert 10 * _MINUTE_MS < left_ms[future] <= 30 * _MINUTE_MS


@pytest.mark.requirement("S2")
@pytest.mark.parametrize("is_killed", [False, True])
def test_what_waits_is_sticky_from_its_receipt_on(scene: Scene[Target], is_killed: bool) -> None:
    """It is dated ahead, and the event before it is not to be had for a while."""
    peer = scene.peer
    is_over = threading.Event()

    def answer(method: str, path: str) -> Answer | None:
        if "/get_missing_events/" not in path or is_over.is_set():
            return None
        if is_killed:
            return 404, {"errcode": "M_NOT_FOUND"}
        is_over.wait(50)
        return None

    peer.override = answer
    withheld_id, _ = peer.sticky(scene.room, scene.eve)
    peer.advance(scene.room, withheld_id)
    event_id, pdu = peer.sticky(
        scene.room, scene.eve, 10 * _MINUTE_MS, origin_server_ts=now_ms() + 3 * HOUR_MS
    )
    scene.send(pdu)
    received_ms = now_ms()
    brief = scene.alice.send_sticky(scene.room_id, 4_000)
    wait_until(lambda: TTL not in scene.alice.event(scene.room_id, brief)["unsigned"], "a while")
    if is_killed:
        scene.server.kill_and_restart()
    is_over.set()
    wait_until(lambda: event_id in ttls(scene.alice, scene.room_id), "it to be sticky")
    asked_ms = now_ms()
    left_ms = ttls(scene.alice, scene.room_id)[event_id]
    assert asked_ms + left_ms <= received_ms + 10 * _MINUTE_MS


@pytest.mark.requirement("S2")
def test_retention_ends_it(target_with: TargetWith, peer: Peer) -> None:
    lifetime_ms = 10_000
    scene = enter(target_with(EXTENDED), peer)
    policy = {"max_lifetime": lifetime_ms}
    scene.alice.send_state(scene.room_id, "m.room.retention", policy)
    for event_id in (scene.alice.send_sticky(scene.room_id), scene.sticky()):
        wait_until(
            lambda: ttls(scene.alice, scene.room_id).get(event_id, HOUR_MS) <= lifetime_ms,  # noqa: B023
            "its end to be the policy's",
        )
    scene.wait_for_sections()


@pytest.mark.requirement("S3")
def test_parameter_of_send(target: Target) -> None:
    alice = target.user()
    room_id = alice.create_room()
    event_id = put(alice, room_id, "send", _MINUTE_MS)
    assert alice.event(room_id, event_id)[STICKY_FIELD] == {"duration_ms": _MINUTE_MS}
    for wrong in (-1, "1.5", "true", "an hour"):
        with pytest.raises(ApiError) as refused:
            put(alice, room_id, "send", wrong)
        assert (refused.value.status, refused.value.errcode) == (400, "M_INVALID_PARAM")


@pytest.mark.requirement("S3")
def test_parameter_of_delayed_events(target: Target) -> None:
    alice = target.user()
    room_id = alice.create_room()
    path = f"rooms/{quote(room_id)}/send/org.example.call/delayed"
    query: dict[str, Any] = {STICKY_PARAMETER: _MINUTE_MS, "org.matrix.msc4140.delay": 300}
    try:
        alice.request("PUT", path, {}, **query)
    except ApiError as e:
        if e.errcode == "M_MAX_DELAY_UNSUPPORTED":
            pytest.skip("the homeserver does not allow delayed events")
        raise
    wait_until(lambda: ttls(alice, room_id), "the delayed event to be sticky")


@pytest.mark.requirement("S3")
def test_parameter_of_state(target_with: TargetWith) -> None:
    alice = target_with(Options(module={"state_events": True})).user()
    room_id = alice.create_room()
    event_id = put(alice, room_id, "state", _MINUTE_MS)
    assert event_id in ttls(alice, room_id)
    with pytest.raises(ApiError) as refused:
        put(alice, room_id, "state", -1)
    assert (refused.value.status, refused.value.errcode) == (400, "M_INVALID_PARAM")


@pytest.mark.requirement("S4")
def test_time_to_live(target: Target) -> None:
    alice = target.user()
    room_id = alice.create_room()
    event_id = alice.send_sticky(room_id, 3_000)
    first = alice.event(room_id, event_id)["unsigned"].get(TTL, 0)
    assert first <= 3_000
    wait_until(lambda: alice.event(room_id, event_id)["unsigned"].get(TTL, 0) < first, "less")
    wait_until(lambda: TTL not in alice.event(room_id, event_id)["unsigned"], "the end")
    assert not ttls(alice, room_id)


@pytest.mark.requirement("S4", "S5")
def test_the_same_sync_again_has_what_is_sticky_still(target: Target) -> None:
    """A homeserver may answer a request that is repeated as it did before."""
    alice, bob = target.user(), target.user()
    room_id = alice.create_room()
    bob.join(room_id)
    since = bob.sync()["next_batch"]
    expiring, redacted = alice.send_sticky(room_id, 8_000), alice.send_sticky(room_id)
    kept = alice.send_sticky(room_id)

    def sections() -> list[list[str]]:
        return [
            sticky_events(bob.sync(after, filter_=WITHOUT_TIMELINE, may_be_repeated=True), room_id)
            for after in (None, since)
        ]

    assert sections() == [[expiring, redacted, kept]] * 2
    alice.redact(room_id, redacted)
    wait_until(lambda: TTL not in alice.event(room_id, expiring)["unsigned"], "the end")
    wait_until(lambda: sections() == [[kept]] * 2, "both to be gone", look=sections)


def redacted_here(scene: Scene[Target]) -> str:
    event_id = scene.alice.send_sticky(scene.room_id)
    scene.alice.redact(scene.room_id, event_id)
    return event_id


def redacted_by_peer(scene: Scene[Target]) -> str:
    event_id, pdu = scene.peer.sticky(scene.room, scene.eve)
    _, redaction = redaction_of(scene, event_id)
    scene.send(pdu)
    scene.wait_for_sections(event_id)
    scene.send(redaction)
    return event_id


def redaction_comes_first(scene: Scene[Target]) -> str:
    event_id, pdu = scene.peer.sticky(scene.room, scene.eve)
    _, redaction = redaction_of(scene, event_id)
    scene.send(redaction)
    # Nobody is shown a redaction of what is not there; but a room's events are taken in in order.
    behind_id, behind = scene.peer.make(scene.room, scene.eve)
    scene.send(behind)
    scene.wait_until_there(behind_id)
    scene.send(pdu)
    return event_id


def redaction_of(scene: Scene[Target], event_id: str) -> tuple[str, Any]:
    if scene.room.version.updated_redaction_rules:
        content = {"redacts": event_id}
        return scene.peer.make(scene.room, scene.eve, content, kind="m.room.redaction")
    return scene.peer.make(scene.room, scene.eve, {}, kind="m.room.redaction", redacts=event_id)


@pytest.mark.requirement("S5")
@pytest.mark.parametrize("redact", [redacted_here, redacted_by_peer, redaction_comes_first])
def test_redacted_events_are_not_sticky(
    scene: Scene[Target], redact: Callable[[Scene[Target]], str]
) -> None:
    event_id = redact(scene)
    kept = scene.sticky()
    scene.wait_for_sections(kept)
    scene.wait_until_there(event_id)
    event = scene.alice.event(scene.room_id, event_id)
    assert STICKY_FIELD not in event
    assert TTL not in event["unsigned"]


_REDACT = "org.matrix.msc4293.redact_events"


@pytest.mark.requirement("S5")
@pytest.mark.parametrize("action", ["ban", "kick"])
def test_a_ban_or_kick_with_redactions(
    target_with: TargetWith, peer: Peer, other_peer: Peer, action: str
) -> None:
    """All of the user's events are redacted by it, and those that they send later are not."""
    scene = enter(target_with(EXTENDED), peer)
    alice, bob, room_id = scene.alice, scene.server.user("bob"), scene.room_id
    bob.join(room_id)
    gone = [bob.send_sticky(room_id) for _ in range(20)]
    # Whoever has asked may have something in memory.
    scene.wait_for_sections(*gone)
    kept = alice.send_sticky(room_id)
    path = f"rooms/{quote(room_id)}"
    alice.request("POST", f"{path}/{action}", {"user_id": bob.user_id, _REDACT: True})
    scene.wait_for_sections(kept)
    if action == "ban":
        alice.request("POST", f"{path}/unban", {"user_id": bob.user_id})
    bob.join(room_id)
    again = bob.send_sticky(room_id)
    scene.wait_for_sections(kept, again)
    # What a server that joins now is sent, if anything of them, is without what was in it.
    other_peer.join(scene.server, room_id, other_peer.user("carol"))
    wait_until(lambda: other_peer.events.keys() >= {kept, again}, "the newcomer to have these")
    assert not any(STICKY_FIELD in other_peer.events.get(event_id, {}) for event_id in gone)


@pytest.mark.requirement("S6")
def test_spam_is_not_sticky(target_with: TargetWith, peer: Peer) -> None:
    checked = target_with(Options(synapse={"modules": [{"module": SPAM_CHECKER}]}))
    scene = enter(checked, peer)
    spam_id, spam = peer.sticky(scene.room, scene.eve, content={"body": "spam"})
    scene.send(spam)
    ham = scene.sticky()
    scene.wait_for_sections(ham)
    assert spam_id not in json.dumps(scene.alice.sync(filter_=WITHOUT_TIMELINE))


@pytest.mark.requirement("S7")
def test_versions(target: Target) -> None:
    versions = target.user().request("GET", "/_matrix/client/versions")
    assert versions["unstable_features"]["org.matrix.msc4354"] is True
