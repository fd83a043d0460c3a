"""A room is pushed to a server once more, as an administrator has ordered (E3, P3)."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests

from synapse_sticky.cli import main
from tests.conftest import Servers
from tests.integration.rooms import has_event, room_of, wait_until_sticky
from tests.integration.test_actions import order
from tests.lab import Client, Homeserver, Lab, Peer, wait_until
from tests.lab.admin_api import PATH, ask
from tests.lab.client import ApiError
from tests.lab.scene import enter
from tests.lab.workers import SENDERS, owner

pytestmark = pytest.mark.requirement("E3", "P3")


def state(admin: Client, event_id: str, server: str) -> str:
    """How far the server is with the event."""
    receivers = ask(admin, f"events/{quote(event_id, safe='')}")["receivers"]
    (found,) = [one["state"] for one in receivers if one["server"] == server]
    return str(found)


def times_sent(peer: Peer, event_id: str) -> int:
    """How often the peer was sent the event."""
    times = Counter(pdu["hashes"]["sha256"] for pdu in peer.received)
    return times[peer.events[event_id]["hashes"]["sha256"]]


def is_begun(admin: Client, action_id: str) -> bool:
    (action,) = [a for a in ask(admin, "actions")["actions"] if a["action_id"] == action_id]
    if action["in_force"]:
        return False
    assert (action["ended_by"], action["ended_ms"] is None) == (None, False)
    return True


class Backup:
    """The database of a server, as it is while the server does not run."""

    def __init__(self, server: Homeserver, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._copy(server.database_path.parent, folder)

    def restore(self) -> None:
        for file in self._files(self._server.database_path.parent):
            file.unlink()
        self._copy(self._folder, self._server.database_path.parent)

    def _files(self, folder: Path) -> list[Path]:
        return [*folder.glob(f"{self._server.database_path.name}*")]

    def _copy(self, source: Path, target: Path) -> None:
        for file in self._files(source):
            shutil.copy(file, target)


@pytest.mark.one_process
def test_a_server_that_was_restored_gets_it_again(servers: Servers, tmp_path: Path) -> None:
    """It had confirmed all of it."""
    a, c = servers({}, {})
    alice, carol, admin = a.user(), c.user(), a.user("admin", admin=True)
    room_id = room_of(alice, via=a)
    early = alice.send_sticky(room_id)
    carol.join(room_id, a.name)
    wait_until_sticky(c, early)
    wait_until(lambda: state(admin, early, c.name) == "confirmed", "the push to be settled")
    c.stop()
    backup = Backup(c, tmp_path)
    c.start()
    c.wait_until_ready()
    events = [alice.send_sticky(room_id) for _ in range(3)]
    for event_id in events:
        wait_until_sticky(c, event_id)
    c.stop()
    backup.restore()
    c.start()
    c.wait_until_ready()
    assert not any(has_event(c, event_id) for event_id in events)
    action = order(admin, "push", server=c.name, room_id=room_id, reason="it was restored")
    assert action["in_force"]
    for event_id in events:
        wait_until_sticky(c, event_id)
    assert {*events} <= {*carol.collect_sticky(room_id, {*events})}
    assert is_begun(admin, action["action_id"])
    wait_until(
        lambda: all(state(admin, event_id, c.name) == "confirmed" for event_id in events),
        "it to be confirmed",
    )
    assert a.log_has(f"{admin.user_id} has ordered push of {c.name}, {room_id} until")
    assert a.log_has(f"{c.name} is pushed {room_id} again, as was ordered ({action['action_id']})")


def test_by_command_and_no_more_than_once_a_minute(
    servers: Servers,
    peer: Peer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (server,) = servers({})
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    monkeypatch.setenv("SYNAPSE_STICKY_TOKEN", admin.access_token)
    monkeypatch.setenv("SYNAPSE_STICKY_URL", server.base_url)
    event_id = scene.alice.send_sticky(scene.room_id)
    wait_until(lambda: event_id in peer.events, "the peer to have it")

    before = times_sent(peer, event_id)
    capsys.readouterr()
    assert main(["push", scene.room_id, peer.name, "--reason", "a test", "--json"]) == 0
    action = json.loads(capsys.readouterr().out)
    assert (action["kind"], action["reason"]) == ("push", "a test")
    wait_until(lambda: times_sent(peer, event_id) > before, "the peer to get it again")
    wait_until(lambda: is_begun(admin, action["action_id"]), "the order to be over")
    assert main(["push", scene.room_id, peer.name]) == 2
    assert "answered 429" in capsys.readouterr().err
    answer = requests.post(
        f"{admin.base_url}{PATH}/actions",
        json=_body(scene.room_id, peer.name),
        headers={"Authorization": f"Bearer {admin.access_token}"},
        timeout=60,
    )
    assert answer.status_code == 429
    assert 0 < int(answer.headers["Retry-After"]) <= 60
    for room_id, name, said in (
        (scene.room_id, "elsewhere.example", "'elsewhere.example' is not in the room"),
        (scene.room_id, server.name, "to itself"),
        ("!nowhere:example.org", peer.name, "This server is not in the room"),
    ):
        assert main(["push", room_id, name]) == 2
        assert said in capsys.readouterr().err
    # It denies the peer by its ACL.
    acl = {"allow": ["*"], "deny": [peer.name.partition(":")[0]], "allow_ip_literals": True}
    scene.alice.send_state(scene.room_id, "m.room.server_acl", acl)

    def denied() -> bool:
        with pytest.raises(ApiError) as raised:
            admin.request("POST", f"{PATH}/actions", _body(scene.room_id, peer.name))
        return raised.value.status == 400

    wait_until(denied, "the ACL to be in force")
    assert main(["actions"]) == 0
    assert len(ask(admin, "actions")["actions"]) == 1


@pytest.mark.workers
@pytest.mark.requirement("E2", "H1")
def test_the_process_that_sends_to_a_server_pushes_again(lab: Lab, peer: Peer) -> None:
    """Also if it is down as that is ordered. Nobody else is pushed anything."""
    server, other = lab.make_workers(), lab.peer()
    server.first_start()
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    other.join(server, scene.room_id, other.user("mallory"))
    event_id = scene.alice.send_sticky(scene.room_id)
    wait_until(lambda: event_id in peer.events and event_id in other.events, "both to have it")
    before = times_sent(peer, event_id), times_sent(other, event_id)
    sender = owner(SENDERS, peer.name)
    server.stop_process(sender)
    action = order(admin, "push", server=peer.name, room_id=scene.room_id)
    # The others have read it by then.
    later = order(admin, "push", server=other.name, room_id=scene.room_id)
    if owner(SENDERS, other.name) != sender:
        wait_until(lambda: is_begun(admin, later["action_id"]), "the other one to be begun")
        assert not is_begun(admin, action["action_id"])
    server.start_process(sender)
    server.wait_until_process_is_ready(sender)
    wait_until(lambda: times_sent(peer, event_id) > before[0], "the peer to get it again")
    wait_until(lambda: is_begun(admin, action["action_id"]), "the order to be over")
    other.close()


def _body(room_id: str, server: str) -> dict[str, Any]:
    return {"kind": "push", "room_id": room_id, "server": server}
