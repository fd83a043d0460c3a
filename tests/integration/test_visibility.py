"""Who is joined sees unexpired sticky events whole, and nothing else changes (C1, D8)."""

from typing import Any

import pytest
import requests

from tests.conftest import Servers
from tests.integration.rooms import (
    deferred,
    limits,
    room_of,
    wait_until_expired,
    wait_until_gone,
    wait_until_sticky,
)
from tests.lab import Homeserver, Lab, Peer, wait_until
from tests.lab.client import HOUR_MS, STICKY_FIELD, WITHOUT_TIMELINE, sticky_events
from tests.lab.scene import enter
from tests.lab.views import is_hidden, send_thread, view


def body_of(response: requests.Response) -> str | None:
    """The body of the one PDU of the answer; None if it is redacted."""
    assert response.status_code == 200, response.text
    (pdu,) = response.json()["pdus"]
    return body_in(pdu)


def body_in(pdu: dict[str, Any]) -> str | None:
    assert (STICKY_FIELD in pdu) <= ("body" in pdu["content"]), "half redacted"
    body: str | None = pdu["content"].get("body")
    return body


@pytest.mark.requirement("C1")
@pytest.mark.parametrize("history_visibility", ["invited", "joined"])
def test_sticky_events_are_whole_for_joined_servers(
    three: list[Homeserver], history_visibility: str
) -> None:
    a, b, c = three
    alice, carol = a.user(), c.user()
    room_id = room_of(alice, via=a, history_visibility=history_visibility)
    plain = alice.send(room_id, {"body": "plain"})
    expiring = alice.send_sticky(room_id, 500, {"body": "expiring"})
    sticky = alice.send_sticky(room_id, content={"body": "sticky"})
    between = alice.send(room_id, {"body": "between"})
    carol.join(room_id, a.name)
    wait_until_expired(a, expiring)
    after = alice.send(room_id, {"body": "after"})

    asked_by_c = a.as_seen_by(c)
    assert body_of(asked_by_c.event(sticky)) == "sticky"
    assert body_of(asked_by_c.event(after)) == "after"
    for hidden in (plain, expiring, between):
        assert body_of(asked_by_c.event(hidden)) is None

    backfilled = {body_in(pdu) for pdu in asked_by_c.backfill(room_id, after, 100)}
    assert backfilled == {"sticky", "after", None}
    missing = asked_by_c.missing_events(room_id, [plain], [between])
    assert [body_in(pdu) for pdu in missing] == [None, "sticky"]

    # Nobody outside the room gets anything, before joining or after leaving.
    assert a.as_seen_by(b).event(sticky).status_code == 403
    carol.leave(room_id)
    wait_until_gone(alice, room_id, carol)
    assert asked_by_c.event(sticky).status_code == 403


@pytest.mark.requirement("C1", "P6")
def test_events_of_erased_users_stay_hidden(three: list[Homeserver]) -> None:
    a, _, c = three
    alice, eve, carol, admin = a.user(), a.user(), c.user(), a.user(admin=True)
    room_id = room_of(alice, eve, via=a, history_visibility="joined")
    sticky = eve.send_sticky(room_id)
    carol.join(room_id, a.name)
    asked_by_c = a.as_seen_by(c)
    assert body_of(asked_by_c.event(sticky)) == "here"
    admin.request("POST", f"/_synapse/admin/v1/deactivate/{eve.user_id}", {"erase": True})
    wait_until(lambda: body_of(asked_by_c.event(sticky)) is None, "the event to be hidden")


@pytest.mark.requirement("C1", "S5")
def test_redacted_events_stay_redacted(three: list[Homeserver]) -> None:
    a, _, c = three
    alice, carol = a.user(), c.user()
    room_id = room_of(alice, via=a, history_visibility="joined")
    sticky = alice.send_sticky(room_id)
    carol.join(room_id, a.name)
    assert body_of(a.as_seen_by(c).event(sticky)) == "here"
    alice.redact(room_id, sticky)
    wait_until(lambda: body_of(a.as_seen_by(c).event(sticky)) is None, "the redaction")


@pytest.mark.requirement("C1")
def test_remote_events_too(three: list[Homeserver]) -> None:
    """A server gives whole what it has from a third one."""
    a, b, c = three
    alice, bob, carol = a.user(), b.user(), c.user()
    room_id = room_of(alice, bob, via=a, history_visibility="joined")
    of_bob = bob.send_sticky(room_id)
    wait_until_sticky(a, of_bob)
    carol.join(room_id, a.name)
    assert body_of(a.as_seen_by(c).event(of_bob)) == "here"


@pytest.mark.requirement("C1", "P3", "L4")
def test_soft_failed_and_deferred_events_are_whole(lab: Lab, servers: Servers, peer: Peer) -> None:
    """A server keeps the first copy that it gets: a redacted one would never become sticky."""
    (server,) = servers({"config": limits(per_sender={"per_second": 0.001, "burst_count": 1})})
    scene = enter(server, peer, "joined")
    mallory = scene.bring("mallory")
    scene.alice.request("POST", f"rooms/{scene.room_id}/ban", {"user_id": mallory})
    soft_failed = scene.sticky(mallory)
    scene.sticky()
    waiting = scene.sticky()
    wait_until(lambda: deferred(server) == {waiting}, "it to be deferred")
    wait_until(lambda: server.log_has("Soft-failing"), "the other to be soft-failed")
    newcomer = lab.peer()
    try:
        asks = newcomer.to(server)
        assert asks.event(waiting).status_code == 403
        newcomer.join(server, scene.room_id, newcomer.user("carol"))
        for event_id in (waiting, soft_failed):
            (pdu,) = asks.event(event_id).json()["pdus"]
            assert STICKY_FIELD in pdu
    finally:
        newcomer.close()
    section, _ = scene.sections()
    assert not {waiting, soft_failed} & set(section)
    # Users who join later are shown neither.
    bob = server.user()
    bob.join(scene.room_id)
    assert is_hidden(view(bob, scene.room_id, (waiting, soft_failed)))


@pytest.mark.requirement("C1")
def test_switched_off(servers: Servers) -> None:
    a, c = servers({"config": {"visibility": {"servers": False}}}, {})
    alice, carol = a.user(), c.user()
    room_id = room_of(alice, via=a, history_visibility="joined")
    sticky = alice.send_sticky(room_id)
    carol.join(room_id, a.name)
    assert body_of(a.as_seen_by(c).event(sticky)) is None


@pytest.mark.requirement("C1")
def test_switched_off_for_users(servers: Servers) -> None:
    (server,) = servers({"config": {"visibility": {"users": False}}})
    alice, bob = server.user(), server.user()
    room_id = room_of(alice, via=server, history_visibility="joined")
    sticky = send_thread(alice, room_id, HOUR_MS)
    bob.join(room_id)
    assert is_hidden(view(bob, room_id, sticky))
    assert sticky_events(bob.sync(), room_id) == list(sticky)


@pytest.mark.requirement("D8")
def test_an_answer_that_is_repeated_has_no_section_of_a_room_that_was_left(
    servers: Servers,
) -> None:
    """Synapse answers the same request from a cache within two minutes, as it does by default."""
    (server,) = servers(1)
    alice, bob = server.user(), server.user()
    room_id = room_of(alice, bob, via=server)
    sticky, redacted = alice.send_sticky(room_id), alice.send_sticky(room_id)

    def section() -> list[str]:
        answer = bob.sync(filter_=WITHOUT_TIMELINE, may_be_repeated=True)
        return sticky_events(answer, room_id)

    assert section() == [sticky, redacted]
    alice.redact(room_id, redacted)
    wait_until(lambda: section() == [sticky], "the redaction")
    bob.leave(room_id)
    wait_until(lambda: section() == [], "the leave")
