"""All of a user's sticky events are redacted at once: they are gone from everywhere, in every
process, and no server that joins later is pushed any of them (S5, P6).

tests/workers has the same tests for ten processes.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import pytest
import requests

from tests.integration.rooms import deferred, limits, wait_until_all_pushed
from tests.integration.story import revived
from tests.integration.test_staging import parked, withhold
from tests.lab import Client, Homeserver, Lab, Peer, wait_until
from tests.lab.client import STICKY_FIELD, ApiError, sliding_sticky_events, sticky_events
from tests.lab.faults import FAULTY_MODULE, Fault, has_struck
from tests.lab.scene import Scene, enter
from tests.lab.views import send_message

pytestmark = [pytest.mark.slow, pytest.mark.requirement("S5")]

COUNT = 20
WITHIN_S = 8
"""Two seconds are the goal."""

REDACTING: dict[str, Any] = {"experimental_features": {"msc4293_enabled": True}}
FLAG = "org.matrix.msc4293.redact_events"
NONE = limits(per_server={"per_second": 0.001, "burst_count": 3}) | {"local": {"per_user": None}}
"""But for the first three, no event of another server is released within a test."""

WITHOUT_TIMELINE = {"room": {"timeline": {"not_types": ["org.example.call", "m.room.message"]}}}


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[Homeserver]:
    started = lab.servers({"config": NONE, "extra": REDACTING, "module_name": FAULTY_MODULE})
    yield started[0]
    lab.close_servers(started)


@pytest.fixture
def scene(server: Homeserver, peer: Peer) -> Scene[Homeserver]:
    return enter(server, peer)


@pytest.fixture
def newcomer(lab: Lab) -> Iterator[Peer]:
    started = lab.peer()
    yield started
    started.close()


@pytest.fixture
def bob(server: Homeserver, scene: Scene[Homeserver]) -> Client:
    bob = server.user("bob")
    bob.join(scene.room_id)
    return bob


def of(scene: Scene[Homeserver], action: str, user_id: str, **more: Any) -> None:
    """Alice does something with another member."""
    path = f"rooms/{quote(scene.room_id)}/{action}"
    scene.alice.request("POST", path, {"user_id": user_id, **more})


def sections(scene: Scene[Homeserver]) -> list[set[str]]:
    """What a new client is given, in /sync and in sliding sync."""
    sync, sliding = scene.alice.sync(filter_=WITHOUT_TIMELINE), scene.alice.sliding_sync()
    room_id = scene.room_id
    return [{*sticky_events(sync, room_id)}, {*sliding_sticky_events(sliding, room_id)}]


def sent_by(scene: Scene[Homeserver], user: Client) -> list[str]:
    """Messages, as what an administrator redacts. Each process has them, index and cache."""
    sent = [send_message(user, scene.room_id, 3_600_000) for _ in range(COUNT)]
    assert all(scene.server.index_knows(event_id) for event_id in sent)
    assert all(section >= {*sent} for section in sections(scene))
    return sent


def wait_until_left(scene: Scene[Homeserver], gone: list[str], *left: str) -> None:
    """Waits until all are gone, and these alone are left."""

    wait_until(
        lambda: sections(scene) == [{*left}] * 2,
        "the sections to be as they should",
        WITHIN_S,
        look=lambda: sections(scene),
    )
    wait_until(
        lambda: not any(scene.server.index_knows(event_id) for event_id in gone),
        "them to be gone from each index",
        WITHIN_S,
    )


def check_newcomer(
    scene: Scene[Homeserver], newcomer: Peer, gone: list[str], *expected: str
) -> None:
    """It is pushed what is expected of this server's events, and nothing that is gone."""
    newcomer.join(scene.server, scene.room_id, newcomer.user("carol"))
    wait_until(lambda: newcomer.events.keys() >= {*expected}, "the newcomer to have them")
    wait_until_all_pushed(scene.server, scene.room_id)
    assert not newcomer.events.keys() & {*gone}


@pytest.mark.requirement("P3")
@pytest.mark.parametrize("action", ["ban", "kick"])
def test_a_local_user(scene: Scene[Homeserver], bob: Client, newcomer: Peer, action: str) -> None:
    gone, kept = sent_by(scene, bob), scene.alice.send_sticky(scene.room_id)
    of(scene, action, bob.user_id, **{FLAG: True})
    wait_until_left(scene, gone, kept)
    assert STICKY_FIELD not in scene.alice.event(scene.room_id, gone[0])
    check_newcomer(scene, newcomer, gone, kept)


@pytest.mark.requirement("P3")
def test_what_is_sent_later_counts_again(
    scene: Scene[Homeserver], bob: Client, newcomer: Peer
) -> None:
    gone = sent_by(scene, bob)
    of(scene, "ban", bob.user_id, **{FLAG: True})
    wait_until_left(scene, gone)
    of(scene, "unban", bob.user_id)
    bob.join(scene.room_id)
    again = bob.send_sticky(scene.room_id)
    member = f"rooms/{quote(scene.room_id)}/state/m.room.member/{quote(bob.user_id)}"
    bob.request("PUT", member, {"membership": "join", "displayname": "Another"})
    wait_until_left(scene, gone, again)
    check_newcomer(scene, newcomer, gone, again)


@pytest.mark.requirement("L4", "L3")
def test_a_user_of_another_server(scene: Scene[Homeserver]) -> None:
    """What is delivered, what is deferred, and what is parked."""
    flood = scene.flood(COUNT)
    wait_until(lambda: len(deferred(scene.server) & {*flood}) == COUNT - 3, "some to wait")
    scene.peer.override = lambda method, path: (502, {}) if "/get_missing_" in path else None
    withhold(scene)
    late = scene.flood(3)
    wait_until(lambda: parked(scene.server) >= {*late}, "others to be parked")
    of(scene, "ban", scene.eve, **{FLAG: True})
    wait_until_left(scene, flood)
    wait_until(lambda: not deferred(scene.server) & {*flood}, "none to wait", WITHIN_S)
    wait_until(lambda: not parked(scene.server) & {*late}, "none to be parked", WITHIN_S)


@pytest.mark.requirement("D5")
def test_the_last_user_of_a_server(lab: Lab) -> None:
    """The server leaves the room with the ban. Nobody of it who joins later is given the events."""
    servers = lab.servers({"extra": REDACTING}, {"extra": REDACTING})
    (alice, mallory), carol = [s.user() for s in servers], servers[1].user()
    room_id = alice.create_room(invite=[mallory.user_id])
    mallory.join(room_id, servers[0].name)
    gone = [mallory.send_sticky(room_id) for _ in range(3)]
    there = "SELECT 1 FROM sticky_events WHERE event_id = ?"
    wait_until(lambda: servers[0].query(there, gone[-1]), "the other server to have them")
    path = f"rooms/{quote(room_id)}"
    alice.request("POST", f"{path}/ban", {"user_id": mallory.user_id, FLAG: True})
    ban = "SELECT 1 FROM room_ban_redactions WHERE user_id = ?"
    wait_until(lambda: servers[1].query(ban, mallory.user_id), "the ban to redact")
    alice.request("POST", f"{path}/invite", {"user_id": carol.user_id})
    carol.join(room_id, servers[0].name)
    kept = carol.send_sticky(room_id)

    def given() -> list[set[str]]:
        sync, sliding = carol.sync(filter_=WITHOUT_TIMELINE), carol.sliding_sync()
        return [{*sticky_events(sync, room_id)}, {*sliding_sticky_events(sliding, room_id)}]

    wait_until(lambda: any(given()), "the room to be shown", look=given)
    assert given() == [{kept}] * 2
    lab.close_servers(servers)


@pytest.mark.requirement("E4")
def test_a_crash_before_the_row_is_written(
    scene: Scene[Homeserver], bob: Client, newcomer: Peer
) -> None:
    gone, kept = sent_by(scene, bob), scene.alice.send_sticky(scene.room_id)
    Fault("persist", "after", "kill").arm(scene.server.folder)
    with suppress(ApiError, requests.RequestException):
        of(scene, "ban", bob.user_id, **{FLAG: True})
    assert has_struck(scene.server.folder)
    revived(scene.server)
    assert bob.user_id not in scene.alice.members(scene.room_id)
    wait_until_left(scene, gone, kept)
    check_newcomer(scene, newcomer, gone, kept)


def redacted_by_an_administrator(server: Homeserver, room_id: str, user_id: str) -> None:
    admin, path = server.user("admin", admin=True), "/_synapse/admin/v1/user"
    begun = admin.request("POST", f"{path}/{quote(user_id)}/redact", {"rooms": [room_id]})
    status = f"{path}/redact_status/{begun['redact_id']}"
    wait_until(lambda: admin.request("GET", status)["status"] == "complete", "the redactions", 90)


def erased(server: Homeserver, room_id: str, user_id: str) -> None:
    path = f"/_synapse/admin/v1/deactivate/{quote(user_id)}"
    server.user("admin", admin=True).request("POST", path, {"erase": True})


@pytest.mark.requirement("P6")
@pytest.mark.parametrize("do", [redacted_by_an_administrator, erased])
def test_an_administrator(
    scene: Scene[Homeserver],
    bob: Client,
    newcomer: Peer,
    do: Callable[[Homeserver, str, str], None],
) -> None:
    gone, kept = sent_by(scene, bob), scene.alice.send_sticky(scene.room_id)
    do(scene.server, scene.room_id, bob.user_id)
    wait_until_left(scene, gone, kept)
    check_newcomer(scene, newcomer, gone, kept)
