"""The lab itself, on plain Synapse."""

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from synapse.config.homeserver import HomeServerConfig

from tests.conftest import Servers
from tests.integration.rooms import in_thread, room_of
from tests.lab import Homeserver, Lab, wait_until
from tests.lab.client import sticky_events
from tests.lab.homeserver import StartError
from tests.lab.overrides import OVERRIDES

pytestmark = pytest.mark.one_process

PLAIN = {"module": False}


@pytest.fixture(scope="module")
def two(lab: Lab) -> Iterator[list[Homeserver]]:
    """Two servers, for tests that do not disturb them."""
    started = lab.servers(PLAIN, PLAIN)
    yield started
    lab.close_servers(started)


def test_two_servers_federate(two: list[Homeserver]) -> None:
    a, b = two
    alice, bob = a.user(), b.user()
    room_id = room_of(alice, bob, via=a)
    since = bob.sync()["next_batch"]
    event_id = alice.send(room_id, {"body": "hello"})

    def timeline() -> list[str]:
        return event_ids_of_timeline(bob.sync(since), room_id)

    wait_until(lambda: event_id in timeline(), "the message")
    assert bob.event(room_id, event_id)["content"] == {"body": "hello"}


def test_sticky_event_is_seen_in_the_sticky_section(two: list[Homeserver]) -> None:
    a, b = two
    alice, bob = a.user(), b.user()
    room_id = room_of(alice, bob, via=a)
    event_id = alice.send_sticky(room_id)
    assert set(bob.collect_sticky(room_id, {event_id})) == {event_id}
    # Too many for a first sync's timeline.
    last = [alice.send(room_id) for _ in range(20)][-1]
    wait_until(lambda: b.query("SELECT 1 FROM events WHERE event_id = ?", last), "the last event")
    answer = bob.sync()
    assert event_id not in event_ids_of_timeline(answer, room_id)
    assert sticky_events(answer, room_id) == [event_id]


def test_federation_is_asked_in_another_servers_name(two: list[Homeserver]) -> None:
    a, b = two
    alice, bob = a.user(), b.user()
    room_id = room_of(alice, bob, via=a)
    first, second, third = (alice.send(room_id) for _ in range(3))
    asked = a.as_seen_by(b)
    (pdu,) = asked.event(third).json()["pdus"]
    assert pdu["prev_events"] == [second]
    assert asked.backfill(room_id, third, 1)[0]["hashes"] == pdu["hashes"]
    (between,) = asked.missing_events(room_id, [first], [third])
    assert between["prev_events"] == [first]
    ids = asked.state_ids(room_id, third)
    assert ids["pdu_ids"]
    assert ids["auth_chain_ids"]
    joining = asked.make_join(room_id, bob.user_id).json()["event"]
    assert joining["content"]["membership"] == "join"
    answer = asked.send("once", [asked.event(first).json()["pdus"][0]])
    assert answer.json() == {"pdus": {first: {}}}


def test_paused_server_goes_on_where_it_was(servers: Servers) -> None:
    a, b = servers(PLAIN, PLAIN)
    alice, bob = a.user(), b.user()
    room_id = room_of(alice, bob, via=a)
    b.pause()
    with pytest.raises(requests.Timeout):
        requests.get(f"{b.base_url}/health", timeout=0.5)
    event_id = alice.send_sticky(room_id)
    b.resume()
    assert set(bob.collect_sticky(room_id, {event_id})) == {event_id}


@pytest.mark.parametrize("end", [Homeserver.stop, Homeserver.kill])
def test_ended_server_keeps_its_data(servers: Servers, end: Callable[[Homeserver], None]) -> None:
    (server,) = servers(PLAIN)
    user = server.user()
    room_id = user.create_room()
    event_id = user.send_sticky(room_id)
    end(server)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.base_url}/health", timeout=10)
    server.restart()
    assert set(user.collect_sticky(room_id, {event_id})) == {event_id}


def test_offline_server_is_cut_off_from_others_only(servers: Servers) -> None:
    a, b = servers(PLAIN, {**PLAIN, "forwarded": True})
    forwarder = b.forwarder
    assert forwarder is not None
    alice, bob = a.user(), b.user()
    room_id = room_of(alice, bob, via=a)
    forwarder.offline()
    event_id = alice.send_sticky(room_id)
    wait_until(lambda: forwarder.refusals, "a refused connection")
    own = bob.send_sticky(room_id)
    assert set(bob.collect_sticky(room_id, {own})) == {own}
    forwarder.online()
    assert event_id in bob.collect_sticky(room_id, {event_id})


def test_held_up_requests_arrive_when_released(servers: Servers) -> None:
    a, b = servers(PLAIN, {**PLAIN, "forwarded": True})
    forwarder = b.forwarder
    assert forwarder is not None
    alice, bob = a.user(), b.user()
    room_id = bob.create_room()
    forwarder.hold()
    finish = in_thread(lambda: alice.join(room_id, b.name))
    wait_until(lambda: forwarder.held, "a connection to be held up")
    assert bob.members(room_id) == {bob.user_id}
    forwarder.release()
    finish()
    assert bob.members(room_id) == {alice.user_id, bob.user_id}


def test_taken_port_is_replaced(lab: Lab, servers: Servers) -> None:
    (taken,) = servers(PLAIN)
    server = lab.make(**PLAIN)
    server.client_port = taken.client_port
    server.base_url = taken.base_url
    server.write_config()
    server.first_start()
    assert server.base_url != taken.base_url
    assert server.user().user_id.endswith(f":{server.name}")


def test_failed_start_says_why(servers: Servers) -> None:
    with pytest.raises(StartError, match="no_such_database"):
        servers({**PLAIN, "extra": {"database": {"name": "no_such_database"}}})


def test_end_of_the_lab_leaves_nothing() -> None:
    with Lab() as lab:
        server = lab.make(**PLAIN)
        server.start()
        process = server.process
        assert process is not None
        assert process.poll() is None
    assert process.poll() is not None
    assert not lab.folder.exists()


def test_a_process_says_how_it_ended(servers: Servers) -> None:
    (server,) = servers(PLAIN)
    process = server.process
    assert process is not None
    assert Path(f"/proc/{process.pid}/cwd").resolve() == server.folder.resolve()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    process.kill()  # there is nobody any more
    server.restart()
    (process,) = server.running()
    process.terminate()
    assert process.wait(60) == 0


def test_waiting_in_vain_says_for_what() -> None:
    with pytest.raises(AssertionError, match="waited 0 s for a sign; last seen: 0"):
        wait_until(lambda: 0, "a sign", 0)


def event_ids_of_timeline(sync: Any, room_id: str) -> list[str]:
    room = sync.get("rooms", {}).get("join", {}).get(room_id, {})
    return [event["event_id"] for event in room.get("timeline", {}).get("events", [])]


OPENED = {
    *("rc_message", "rc_delayed_event_mgmt", "rc_registration", "rc_room_creation"),
    *("rc_login_address", "rc_login_account", "rc_login_failed_attempts", "rc_admin_redaction"),
    *("rc_joins_local", "rc_joins_remote", "rc_joins_per_room"),
    *("rc_invites_per_room", "rc_invites_per_user", "rc_invites_per_issuer"),
}
"""Limits on what users do, those of other servers among them. None is on servers themselves."""


def limits_by(options: dict[str, Any]) -> dict[str, Any]:
    """All of Synapse's rate limits, by what it calls them, as such a homeserver.yaml has them."""
    config = HomeServerConfig()
    config.parse_config_dict(options, "", "")
    limits = vars(config.ratelimiting)
    return {name: limit for name, limit in limits.items() if name != "root"}


@pytest.mark.requirement("H4")
def test_the_lab_is_as_synapse_is_but_for_five_reasons(two: list[Homeserver]) -> None:
    """What other servers meet at a homeserver that nobody has tuned is what the tests meet."""
    assert len(OVERRIDES) <= 5
    options = json.loads((two[0].folder / "homeserver.yaml").read_text())
    assert "caches" not in options
    needed = {"server_name", "signing_key_path", "macaroon_secret_key", "report_stats"}
    plain = limits_by({name: options[name] for name in needed})
    opened = {name for name, limit in limits_by(options).items() if limit != plain[name]}
    assert opened == OPENED
