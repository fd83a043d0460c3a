"""How fast local users may send sticky events, over HTTP (E1)."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Servers
from tests.lab import Client, Homeserver, wait_until
from tests.lab.client import HOUR_MS, STICKY_PARAMETER, ApiError, sticky_events

SLOW = {"local": {"per_user": {"per_second": 0.001, "burst_count": 3}}}


def is_refused(client: Client, room_id: str, **query: Any) -> bool:
    """Tries to send a sticky event."""
    error = None
    try:
        client.send(room_id, **{STICKY_PARAMETER: HOUR_MS}, **query)
    except ApiError as e:
        error = e
    if error is None:
        return False
    assert (error.status, error.errcode) == (429, "M_LIMIT_EXCEEDED")
    assert error.body["retry_after_ms"] > 0
    return True


@pytest.mark.requirement("E1")
def test_past_the_limit_a_user_is_refused(servers: Servers) -> None:
    (server,) = servers({"config": SLOW})
    alice, bob = server.user(), server.user()
    room_id = alice.create_room()
    bob.join(room_id)
    assert [is_refused(alice, room_id) for _ in range(5)] == [False] * 3 + [True] * 2
    # In no other room either; but what is not sticky is sent, and so is another user's.
    assert is_refused(alice, alice.create_room())
    for _ in range(5):
        alice.send(room_id)
    assert not is_refused(bob, room_id)
    assert server.log_has(f"per_user: refused 1 sticky events of {alice.user_id}; asked to retry")


@pytest.mark.requirement("E1")
def test_refused_for_a_time_only(servers: Servers) -> None:
    (server,) = servers({"config": {"local": {"per_user": {"per_second": 2, "burst_count": 1}}}})
    alice = server.user()
    room_id = alice.create_room()
    wait_until(lambda: is_refused(alice, room_id), "a refusal")
    wait_until(lambda: not is_refused(alice, room_id), "the bucket to fill again")


@pytest.mark.requirement("E1")
def test_repeated_request_gets_its_answer(servers: Servers) -> None:
    (server,) = servers({"config": SLOW})
    alice = server.user()
    room_id = alice.create_room()
    path = f"rooms/{room_id}/send/org.example.call/once"
    sent = alice.request("PUT", path, **{STICKY_PARAMETER: HOUR_MS})
    for _ in range(2):
        assert not is_refused(alice, room_id)
    assert is_refused(alice, room_id)
    assert alice.request("PUT", path, **{STICKY_PARAMETER: HOUR_MS}) == sent
    # Nor does it hang on what is remembered in memory.
    server.restart()
    for _ in range(3):
        assert not is_refused(alice, room_id)
    assert is_refused(alice, room_id)
    assert alice.request("PUT", path, **{STICKY_PARAMETER: HOUR_MS}) == sent


@pytest.mark.requirement("E1")
def test_delayed_events_are_charged_when_they_are_scheduled(servers: Servers) -> None:
    (server,) = servers({"config": SLOW})
    alice = server.user()
    room_id = alice.create_room()
    delay = {STICKY_PARAMETER: HOUR_MS, "org.matrix.msc4140.delay": 3_000}
    path = f"rooms/{room_id}/send/org.example.call/"
    for number in range(2):
        alice.request("PUT", f"{path}delayed-{number}", {"number": number}, **delay)
    assert not is_refused(alice, room_id)
    assert is_refused(alice, room_id)
    with pytest.raises(ApiError) as error:
        alice.request("PUT", f"{path}delayed-2", **delay)
    assert (error.value.status, error.value.errcode) == (429, "M_LIMIT_EXCEEDED")

    # What was accepted comes, although the allowance is used up.
    def numbers() -> set[int]:
        answer = alice.sync()
        ids = sticky_events(answer, room_id)
        contents = [alice.event(room_id, event_id)["content"] for event_id in ids]
        return {content["number"] for content in contents if "number" in content}

    wait_until(lambda: numbers() == {0, 1}, "the delayed events")


@pytest.mark.requirement("E1")
def test_those_whom_synapse_does_not_limit(servers: Servers, tmp_path: Path) -> None:
    exempt = app_service(tmp_path, "exempt", rate_limited=False)
    limited = app_service(tmp_path, "limited", rate_limited=True)
    files = {"app_service_config_files": [str(exempt), str(limited)]}
    (server,) = servers({"config": SLOW, "extra": files})
    admin, alice = server.user(admin=True), server.user()
    room_id = alice.create_room()
    free = [admin, app_service_user(server, "exempt"), app_service_user(server, "limited")]
    admin.request(
        "POST",
        f"/_synapse/admin/v1/users/{alice.user_id}/override_ratelimit",
        {"messages_per_second": 0, "burst_count": 0},
    )
    bridged = Client(server.base_url, f"@limited_user:{server.name}", "token-limited")
    bridged.request(
        "POST",
        "register",
        {"type": "m.login.application_service", "username": "limited_user"},
    )
    for client in free[1:]:
        client.join(room_id)
    admin.join(room_id)
    bridged.request("POST", f"join/{room_id}", user_id=bridged.user_id)
    for client in [alice, *free]:
        assert not any(is_refused(client, room_id) for _ in range(5))
    refusals = [is_refused(bridged, room_id, user_id=bridged.user_id) for _ in range(4)]
    assert refusals == [False] * 3 + [True]


def app_service(folder: Path, name: str, *, rate_limited: bool) -> Path:
    """The registration of an application service."""
    path = folder / f"{name}.yaml"
    registration = {
        "id": name,
        "as_token": f"token-{name}",
        "hs_token": f"to-{name}",
        "sender_localpart": f"{name}_bot",
        "url": None,
        "rate_limited": rate_limited,
        "namespaces": {"users": [{"regex": f"@{name}_.*", "exclusive": True}]},
    }
    path.write_text(json.dumps(registration))
    return path


def app_service_user(server: Homeserver, name: str) -> Client:
    """The application service's own user."""
    return Client(server.base_url, f"@{name}_bot:{server.name}", f"token-{name}")


def test_without_a_limit(servers: Servers) -> None:
    (server,) = servers({"config": {"local": {"per_user": None}}})
    alice = server.user()
    room_id = alice.create_room()
    for _ in range(70):
        alice.send_sticky(room_id)
