"""Clients that people use show the right members of a call: matrix-js-sdk, by /sync and by sliding
sync, and a client that goes on from sliding sync's ``since``."""

from pathlib import Path
from urllib.parse import quote

import pytest

from tests.conftest import Servers
from tests.integration.apps import Opened, apps_of, wait_until_they_have, wait_until_they_show
from tests.integration.rooms import backlogged_rooms, room_of
from tests.lab import Client, wait_until
from tests.lab.js_sdk import JsSdk
from tests.lab.membership import allowed_to_fail
from tests.lab.rtc import send_leave, send_member

_SHORT_MS = 20_000  # long enough to be seen before its end, also on a busy machine
ACL = "m.room.server_acl"
DENIES_IP_LITERALS = {"allow": ["*"], "allow_ip_literals": False}
ALLOWS_ALL = {"allow": ["*"], "allow_ip_literals": True}
WITH_MSC4293 = {"extra": {"experimental_features": {"msc4293_enabled": True}}}


@pytest.mark.slow
@pytest.mark.requirement("D1", "D5")
@pytest.mark.parametrize("sync", ["/sync", "sliding"])
def test_who_joins_sees_the_members_of_the_call(
    servers: Servers, opened: Opened, sync: str
) -> None:
    a, b = servers(2)
    alice, carol, bob = a.user("alice"), a.user("carol"), b.user("bob")
    # The timeline shows nobody what was before they joined.
    room_id = room_of(alice, carol, via=a, history_visibility="joined")
    alices, carols = send_member(alice, room_id), send_member(carol, room_id)

    app = JsSdk(bob, room_id, sync=sync, via=a.name)
    opened(app)
    wait_until_they_have([app], alices, carols)
    wait_until_they_show([app], alice, carol)
    assert app.lines[-1]["in_timeline"] == []

    newer = send_member(alice, room_id)
    wait_until_they_have([app], newer, carols)
    carol.redact(room_id, carols)
    wait_until_they_have([app], newer)
    wait_until_they_show([app], alice)
    short = send_member(carol, room_id, _SHORT_MS)
    wait_until_they_have([app], newer, short)
    wait_until_they_show([app], alice, carol)
    wait_until_they_have([app], newer)  # the other has expired
    wait_until_they_show([app], alice)


@pytest.mark.slow
@pytest.mark.requirement("S5", "P3")
def test_a_ban_with_redactions(servers: Servers, opened: Opened, tmp_path: Path) -> None:
    a, b, c = servers(WITH_MSC4293, WITH_MSC4293, WITH_MSC4293)
    alice, carol, bob, dave = a.user("alice"), a.user("carol"), b.user("bob"), c.user("dave")
    room_id = room_of(alice, carol, bob, via=a)
    alices, carols = send_member(alice, room_id), send_member(carol, room_id)
    running = opened(*apps_of(bob, room_id, tmp_path))
    wait_until_they_have(running, alices, carols)
    wait_until_they_show(running, alice, carol)

    ban = {"user_id": carol.user_id, "org.matrix.msc4293.redact_events": True}
    alice.request("POST", f"rooms/{quote(room_id)}/ban", ban)
    wait_until_they_show(running, alice)
    # Those that are opened now, also on a server that joins now.
    dave.join(room_id, a.name)
    for user in (bob, dave):
        (folder := tmp_path / user.user_id).mkdir()
        apps = opened(*apps_of(user, room_id, folder))
        wait_until_they_have(apps, alices)
        wait_until_they_show(apps, alice)


@pytest.mark.slow
@pytest.mark.requirement("H7", "P1")
def test_an_acl_put_right(servers: Servers, opened: Opened, tmp_path: Path) -> None:
    a, b = servers({}, {"host": "127.0.0.1"})
    alice, carol = a.user("alice"), a.user("carol")
    bob, eve, dan = b.user("bob"), b.user("eve"), b.user("dan")
    room_id = room_of(alice, carol, bob, eve, dan, via=a)
    alices, bobs = send_member(alice, room_id), send_member(bob, room_id)
    at_a = opened(*apps_of(carol, room_id, tmp_path))
    at_b = opened(*apps_of(dan, room_id, tmp_path))
    wait_until_they_have(at_a + at_b, alices, bobs)
    wait_until_they_show(at_a + at_b, alice, bob)

    alice.send_state(room_id, ACL, DENIES_IP_LITERALS)
    wait_until(lambda: acl_at(dan, room_id) == DENIES_IP_LITERALS, "the ACL to arrive")
    bobs_leave, eves = send_leave(bob, room_id), send_member(eve, room_id)
    wait_until(lambda: room_id in backlogged_rooms(b), "the refusals")
    newer = send_member(alice, room_id)
    wait_until_they_have(at_b, newer, bobs_leave, eves)
    wait_until_they_show(at_b, alice, eve)
    # Nothing of what the ACL denies has reached the other server.
    wait_until_they_have(at_a, newer, bobs)
    wait_until_they_show(at_a, alice, bob)

    alice.send_state(room_id, ACL, ALLOWS_ALL)
    wait_until_they_have(at_a, newer, bobs_leave, eves)
    wait_until_they_show(at_a, alice, eve)


def acl_at(user: Client, room_id: str) -> object:
    with allowed_to_fail(404):
        return user.request("GET", f"rooms/{quote(room_id)}/state/{ACL}/")
    return None


@pytest.mark.slow
@pytest.mark.requirement("D1", "D4", "D5", "S5")
def test_a_restart_of_the_app(servers: Servers, opened: Opened, tmp_path: Path) -> None:
    a, b = servers(2)
    alice, carol, dave = a.user("alice"), a.user("carol"), a.user("dave")
    bob = b.user("bob")
    room_id = room_of(alice, carol, dave, bob, via=a)
    alices, carols = send_member(alice, room_id), send_member(carol, room_id)
    apps = apps_of(bob, room_id, tmp_path)
    opened(*apps)
    wait_until_they_have(apps, alices, carols)
    wait_until_they_show(apps, alice, carol)
    for app in apps:
        app.close()

    alices_leave, daves = send_leave(alice, room_id), send_member(dave, room_id)
    for _ in range(20):
        alice.send(room_id)  # past these the timeline does not go
    carol.redact(room_id, carols)
    wait_until(lambda: is_redacted(bob, room_id, carols), "the redaction to arrive")
    for app in apps:
        app.open()
    wait_until_they_have(apps, alices_leave, daves)
    wait_until_they_show(apps, dave)
    # They went on from what they had saved: one began with it, the other was given only the rest.
    with_saved, _, with_since = apps
    assert {*with_saved.lines[0]["sticky"]} == {alices, carols}
    assert with_since.given == [alices_leave, daves]


def is_redacted(user: Client, room_id: str, event_id: str) -> bool:
    return "redacted_because" in user.event(room_id, event_id)["unsigned"]
