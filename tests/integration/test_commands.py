"""The commands that ask the API for administrators, on a real server (E3)."""

import json
from typing import Any

import pytest
import requests

from synapse_sticky.cli import main
from tests.conftest import Servers
from tests.integration.rooms import deferred, limits
from tests.integration.test_deferral import HOURLY, limit
from tests.lab import Client, Homeserver, Peer, wait_until
from tests.lab.admin_api import PATH
from tests.lab.scene import enter

pytestmark = pytest.mark.requirement("E3")


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """``asked(server, admin, "why", ...)``: what the command says, in JSON and for people."""

    def ask(server: Homeserver, admin: Client, *arguments: str) -> tuple[Any, str]:
        monkeypatch.setenv("SYNAPSE_STICKY_TOKEN", admin.access_token)
        capsys.readouterr()
        assert main([*arguments, "--url", server.base_url, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert main([*arguments, "--url", server.base_url]) == 0
        return answer, capsys.readouterr().out

    return ask


def test_it_is_deferred_by_per_sender(servers: Servers, peer: Peer, asked: Any) -> None:
    (server,) = servers({"config": limits(per_sender=limit(HOURLY, 2))})
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    *_, held_up = [scene.sticky() for _ in range(3)]
    wait_until(lambda: deferred(server) == {held_up}, "the last one to be deferred")
    answer, said = asked(server, admin, "why", held_up)
    assert answer["verdict"]["code"] == "deferred"
    assert said.splitlines()[1].startswith("deferred: ")
    assert "federation.per_sender" in said
    overview, said = asked(server, admin, "status")
    assert overview["deferred"]["events"] == 1
    for expected in (server.name, "2 in 1 rooms", "per_sender"):
        assert expected in said


def test_what_waits_is_found_and_released(servers: Servers, peer: Peer, asked: Any) -> None:
    (server,) = servers({"config": limits(per_sender=limit(HOURLY, 2))})
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    *_, held_up = [scene.sticky() for _ in range(3)]
    wait_until(lambda: deferred(server) == {held_up}, "the last one to be deferred")
    answer, said = asked(server, admin, "rooms", "--order-by", "deferred")
    assert [(room["room_id"], room["deferred"]) for room in answer["rooms"]] == [(scene.room_id, 1)]
    answer, said = asked(server, admin, "rooms", scene.room_id)
    assert [e["state"] for e in answer["events"]] == ["active", "active", "deferred"]
    answer, said = asked(server, admin, "servers", "--order-by", "name")
    assert [one["deferred"] for one in answer["servers"] if one["server"] == peer.name] == [1]
    _, said = asked(server, admin, "release", "--server", peer.name, "--reason", "a test")
    assert f"release of {peer.name}" in said
    wait_until(lambda: not deferred(server), "it to be released")
    answer, _ = asked(server, admin, "why", held_up)
    assert answer["verdict"]["code"] == "delivered"


def test_what_waits_is_discarded(servers: Servers, peer: Peer, asked: Any) -> None:
    (server,) = servers({"config": limits(per_sender=limit(HOURLY, 1))})
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    *_, held_up = [scene.sticky() for _ in range(2)]
    wait_until(lambda: deferred(server) == {held_up}, "the last one to be deferred")
    answer, said = asked(server, admin, "servers")
    if server.receivers == 1:
        (found,) = [one for one in answer["servers"] if one["server"] == peer.name]
        assert (found["refused_lately"], found["deferred_lately"]) == ({}, {"per_sender": 1})
        assert f"{peer.name}: deferred 1 (per_sender)\n" in said
    _, said = asked(server, admin, "discard", "--server", peer.name, "--yes")
    assert f"discard of {peer.name}" in said
    wait_until(lambda: not deferred(server), "it to be discarded")
    answer, _ = asked(server, admin, "why", held_up)
    assert answer["verdict"]["code"] == "discarded"


def test_what_nobody_sees_in_a_name_is_shown(
    servers: Servers, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (server,) = servers({})
    alice, admin = server.user(), server.user("admin", admin=True)
    room_id, name = alice.create_room(), "a\u200bb\u202ec\u3164"
    alice.send_state(room_id, "m.room.name", {"name": name})
    alice.send_sticky(room_id)
    named = "SELECT 1 FROM room_stats_state WHERE room_id = ? AND name IS NOT NULL"
    wait_until(lambda: server.query(named, room_id), "Synapse to have noted the name")
    answer, said = asked(server, admin, "rooms")
    assert [room["name"] for room in answer["rooms"]] == [name]
    assert r"a\u200bb\u202ec\u3164" in said
    headers = {"Authorization": f"Bearer {admin.access_token}"}
    body = requests.get(f"{server.base_url}{PATH}/rooms", headers=headers, timeout=60).content
    assert body.isascii()
    assert rb"a\u200bb\u202ec\u3164" in body


def test_a_server_is_held_and_exempt(servers: Servers, peer: Peer, asked: Any) -> None:
    (server,) = servers({"config": limits(per_sender=limit(HOURLY, 2))})
    admin = server.user("admin", admin=True)
    for kind in ("hold", "exempt"):
        action, _ = asked(server, admin, kind, "--server", peer.name, "--for", "10m")
        assert (action["kind"], action["server"], action["in_force"]) == (kind, peer.name, True)
        assert action["until_ms"] - action["made_ms"] == 600_000
        ended, said = asked(server, admin, "end", action["action_id"])
        assert (ended["ended_by"], ended["in_force"]) == (admin.user_id, False)
        assert f"{kind} of {peer.name} is over" in said
    answer, said = asked(server, admin, "actions")
    assert {action["kind"] for action in answer["actions"]} == {"hold", "exempt"}


def test_whoever_is_no_admin_is_told_so(
    servers: Servers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (server,) = servers({})
    for token, said in (
        (server.user("alice").access_token, "is no server admin"),
        ("nonsense", "no good any more"),
    ):
        monkeypatch.setenv("SYNAPSE_STICKY_TOKEN", token)
        assert main(["status", "--url", server.base_url]) == 2
        assert said in capsys.readouterr().err


def test_without_the_api_it_says_so(
    servers: Servers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (server,) = servers({"module": False})
    monkeypatch.setenv("SYNAPSE_STICKY_TOKEN", server.user("admin", admin=True).access_token)
    assert main(["status", "--url", server.base_url]) == 2
    assert "the option `admin`" in capsys.readouterr().err
