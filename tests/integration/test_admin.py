"""The API for administrators on real servers: who may ask, and why an event is not here (E3)."""

import json
from collections import Counter
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import pytest
import requests

from tests.conftest import Servers
from tests.integration.rooms import (
    deferred,
    has_event,
    limits,
    wait_until_expired,
    wait_until_seen,
    wait_until_sticky,
)
from tests.integration.test_deferral import HOURLY, limit
from tests.integration.test_events import TRANSACTIONS
from tests.integration.test_staging import parked, withhold
from tests.lab import Client, Homeserver, Lab, Peer, wait_until
from tests.lab.admin_api import PATH, ask, description
from tests.lab.postgres import Postgres
from tests.lab.scene import enter
from tests.lab.workers import MAIN, SLIDING_SYNC, SYNC, UnixConnection, WorkerHomeserver


def why(admin: Client, event_id: str, **query: Any) -> Any:
    """What the API says of the event."""
    return ask(admin, f"events/{quote(event_id, safe='')}", **query)


def verdict(admin: Client, event_id: str, **query: Any) -> str:
    code: str = why(admin, event_id, **query)["verdict"]["code"]
    return code


def step(answer: Any, name: str) -> Any:
    (found,) = [step for step in answer["steps"] if step["name"] == name]
    return found


# The seven


@pytest.mark.requirement("E3")
def test_it_is_deferred_by_per_sender(servers: Servers, peer: Peer) -> None:
    (server,) = servers({"config": limits(per_sender=limit(HOURLY, 2))})
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    *delivered, held_up = [scene.sticky() for _ in range(3)]
    wait_until(lambda: deferred(server) == {held_up}, "the last one to be deferred")
    answer = why(admin, held_up)
    assert answer["verdict"]["code"] == "deferred"
    assert "federation.per_sender" in answer["verdict"]["text"]
    limited = step(answer, "limited")
    assert (limited["state"], limited["details"]["limit"]) == ("waiting", "per_sender")
    assert limited["at_ms"] <= answer["now_ms"]
    # One in a thousand seconds, and it is the first.
    assert abs(limited["details"]["about_ms"] - answer["now_ms"] - 1_000_000) < 1_000
    assert answer["room_id"] == scene.room_id
    assert answer["sender"] == scene.eve
    assert {verdict(admin, event_id) for event_id in delivered} == {"delivered"}
    counts = ask(admin, "overview")["deferred"]
    assert counts == {"events": 1, "by_limit": {"per_sender": 1}, "servers": 1}


@pytest.mark.requirement("E3")
def test_it_is_parked_for_missing_prev_events(servers: Servers, peer: Peer) -> None:
    (server,) = servers({})
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    peer.override = lambda method, path: (502, {}) if "/get_missing_events/" in path else None
    withheld = withhold(scene)
    event_id = scene.sticky()
    wait_until(lambda: parked(server) == {event_id}, "it to be parked")
    answer = why(admin, event_id)
    assert answer["verdict"]["code"] == "parked"
    assert "prev_events cannot be fetched" in answer["verdict"]["text"]
    waiting = step(answer, "parked")
    assert waiting["state"] == "waiting"
    assert waiting["details"]["until_ms"] > answer["now_ms"]
    assert step(answer, "received")["details"] == {"from": peer.name}
    assert verdict(admin, withheld) == "not_here"
    by_reason = ask(admin, "overview")["parked"]["by_reason"]
    assert by_reason == {"its prev_events cannot be fetched": 1}
    peer.override = lambda method, path: None
    wait_until(lambda: verdict(admin, event_id) == "delivered", "it to be delivered")


@pytest.mark.requirement("E3")
def test_it_is_soft_failed(servers: Servers, peer: Peer) -> None:
    (server,) = servers({})
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    # By what the peer says it comes before the ban.
    before, depth = scene.room.extremities, scene.room.depth
    scene.alice.ban(scene.room_id, scene.eve)
    scene.room.extremities, scene.room.depth = before, depth
    event_id = scene.sticky()
    wait_until(lambda: has_event(server, event_id), "it to be persisted")
    answer = why(admin, event_id)
    assert answer["verdict"]["code"] == "soft_failed"
    assert step(answer, "checked")["details"] == {"soft_failed": True}
    assert step(answer, "delivered")["state"] == "failed"


@pytest.mark.requirement("E3")
def test_it_is_redacted(servers: Servers) -> None:
    (server,) = servers({})
    alice, admin = server.user("alice"), server.user("admin", admin=True)
    room_id = alice.create_room()
    event_id = alice.send_sticky(room_id)
    assert verdict(admin, event_id) == "delivered"
    alice.redact(room_id, event_id)
    wait_until(lambda: verdict(admin, event_id) == "redacted", "the redaction to be seen")
    answer = why(admin, event_id)
    (redaction,) = server.query("SELECT event_id FROM redactions WHERE redacts = ?", event_id)
    assert step(answer, "checked")["details"] == {"redacted_by": [*redaction]}


@pytest.mark.slow
@pytest.mark.requirement("E3", "P3")
def test_the_newcomer_is_unreachable(servers: Servers, peer: Peer) -> None:
    (server,) = servers({})
    alice, admin = server.user("alice"), server.user("admin", admin=True)
    room_id = alice.create_room()
    event_id = alice.send_sticky(room_id)
    # It joins, and takes nothing from then on.
    peer.override = lambda method, path: (502, {}) if "/send/" in path else None
    peer.join(server, room_id, peer.user("eve"))
    wait_until_seen(server, peer, room_id)

    def is_unreachable() -> bool:
        return verdict(admin, event_id) == "unreachable"

    wait_until(is_unreachable, "it to be found out")
    answer = why(admin, event_id)
    (receiver,) = answer["receivers"]
    assert (receiver["server"], receiver["state"]) == (peer.name, "unreachable")
    assert receiver["newcomer_since_ms"] <= receiver["failing_since_ms"] <= answer["now_ms"]
    assert receiver["next_try_ms"] > receiver["failing_since_ms"]
    assert peer.name in answer["verdict"]["text"]
    assert ask(admin, "overview")["newcomers"]["open"] == 1


@pytest.mark.requirement("E3")
def test_its_server_is_denied_by_an_acl(servers: Servers, peer: Peer) -> None:
    (server,) = servers({"host": "127.0.0.1"})
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    own = scene.alice.send_sticky(scene.room_id)
    acl = {"allow": ["*"], "deny": ["localhost"], "allow_ip_literals": True}
    scene.alice.send_state(scene.room_id, "m.room.server_acl", acl)
    event_id, pdu = peer.sticky(scene.room, scene.eve)
    assert "error" in scene.send(pdu)[event_id]
    answer = why(admin, event_id, room_id=scene.room_id, sender=scene.eve)
    assert answer["verdict"]["code"] == "not_here"
    assert answer["reasons"][0]["code"] == "denied_by_acl"
    assert peer.name in answer["reasons"][0]["text"]
    # An event ID alone says nothing of its server.
    assert why(admin, event_id)["reasons"][0]["code"] == "say_more"
    # Nor does the peer get what is sent here.
    after = why(admin, scene.alice.send_sticky(scene.room_id))
    assert after["verdict"]["code"] == "denied_by_acl"
    assert [r["state"] for r in after["receivers"]] == ["denied by ACL"]
    assert verdict(admin, own) == "denied_by_acl"


@pytest.mark.requirement("E3")
def test_it_has_expired(servers: Servers, peer: Peer) -> None:
    (server,) = servers({"config": limits(per_sender=limit(HOURLY, 1))})
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    delivered = scene.sticky(duration_ms=1_000)
    wait_until_sticky(server, delivered)
    wait_until_expired(server, delivered)
    answer = why(admin, delivered)
    assert answer["verdict"]["code"] == "expired"
    assert "It was delivered before" in answer["verdict"]["text"]
    expired = step(answer, "expired")
    assert expired["state"] == "done"
    assert expired["at_ms"] <= answer["now_ms"]
    held_up = scene.sticky(duration_ms=1_000)
    wait_until(lambda: verdict(admin, held_up) == "expired", "the other one to expire")
    wait_until(lambda: not deferred(server), "its row to be gone")
    assert "not recorded" in why(admin, held_up)["verdict"]["text"]


# Who may ask


@pytest.fixture
def server(servers: Servers) -> Homeserver:
    (server,) = servers(
        {
            "extra": {
                "allow_guest_access": True,
                "enable_registration": True,
                "enable_registration_without_verification": True,
            }
        }
    )
    return server


def get(server: Homeserver, path: str = "overview", **options: Any) -> requests.Response:
    return requests.get(f"{server.base_url}{PATH}/{path}", timeout=60, **options)


def bearer(token: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {token}"}}


def refused(response: requests.Response) -> tuple[int, str]:
    assert response.headers["Content-Type"] == "application/json"
    body = response.json()
    assert body["error"]
    return response.status_code, body["errcode"]


@pytest.mark.requirement("E3")
def test_only_administrators_are_answered(server: Homeserver) -> None:
    admin, user = server.user("admin", admin=True), server.user("user")
    assert ask(admin, "overview")["server_name"] == server.name
    assert refused(get(server)) == (401, "M_MISSING_TOKEN")
    assert refused(get(server, **bearer("nonsense"))) == (401, "M_UNKNOWN_TOKEN")
    assert refused(get(server, **bearer("\u00e9".encode().decode("latin-1")))) == (
        401,
        "M_UNKNOWN_TOKEN",
    )
    assert refused(get(server, headers={"Authorization": "Basic YTpi"})) == (401, "M_MISSING_TOKEN")
    assert refused(get(server, **bearer(user.access_token))) == (403, "M_FORBIDDEN")
    # Proxies log the query, and a cookie is sent by whatever website asks.
    token = admin.access_token
    in_query: dict[str, Any] = {"params": {"access_token": token}}
    assert refused(get(server, **in_query)) == (401, "M_MISSING_TOKEN")
    assert refused(get(server, **in_query, **bearer(token))) == (401, "M_MISSING_TOKEN")
    assert refused(get(server, cookies={"access_token": token})) == (401, "M_MISSING_TOKEN")
    # One who is an administrator no more is asked for the next time.
    server.change(f"UPDATE users SET admin = 0 WHERE name = '{admin.user_id}'")
    server.restart()
    assert refused(get(server, **bearer(token))) == (403, "M_FORBIDDEN")


@pytest.mark.requirement("E3")
def test_guests_and_locked_and_logged_out_users_are_not(server: Homeserver) -> None:
    url = f"{server.base_url}/_matrix/client/v3/register"
    guest = requests.post(url, params={"kind": "guest"}, json={}, timeout=60).json()
    assert refused(get(server, **bearer(guest["access_token"]))) == (
        403,
        "M_GUEST_ACCESS_FORBIDDEN",
    )
    admin, other = server.user("admin", admin=True), server.user("other", admin=True)
    users = "/_synapse/admin/v2/users/"
    admin.request("PUT", users + quote(other.user_id), {"locked": True})
    answer = get(server, **bearer(other.access_token))
    assert refused(answer) == (401, "M_USER_LOCKED")
    assert answer.json()["soft_logout"] is True
    # A token that has run out.
    third = server.user("third", admin=True)
    server.change(f"UPDATE access_tokens SET valid_until_ms = 1 WHERE user_id = '{third.user_id}'")
    server.restart()
    answer = get(server, **bearer(third.access_token))
    assert refused(answer) == (401, "M_UNKNOWN_TOKEN")
    assert answer.json()["soft_logout"] is True
    admin.request("POST", "logout")
    assert refused(get(server, **bearer(admin.access_token))) == (401, "M_UNKNOWN_TOKEN")


@pytest.mark.requirement("E3")
@pytest.mark.one_process
def test_application_services_are_not(servers: Servers, lab: Lab) -> None:
    """Theirs may act for any of their users, an administrator too."""
    registration = {
        "id": "service",
        "url": None,
        "as_token": "as_token",
        "hs_token": "hs_token",
        "sender_localpart": "service",
        "rate_limited": False,
        "namespaces": {"users": [{"regex": "@admin.*", "exclusive": False}]},
    }
    path = lab.folder / "service.yaml"
    path.write_text(json.dumps(registration))
    (server,) = servers({"extra": {"app_service_config_files": [str(path)]}})
    admin = server.user("admin", admin=True)
    token = bearer("as_token")
    whoami = f"{server.base_url}/_matrix/client/v3/account/whoami"
    params = {"user_id": admin.user_id}
    said = requests.get(whoami, params=params, timeout=60, **token).json()
    assert said["user_id"] == admin.user_id, "it may act for the administrator elsewhere"
    assert refused(get(server, params=params, **token)) == (403, "M_FORBIDDEN")
    assert refused(get(server, **token)) == (403, "M_FORBIDDEN")
    # A user of its own is a parameter like any other.
    assert refused(get(server, params=params, **bearer(admin.access_token))) == (
        400,
        "M_INVALID_PARAM",
    )


@pytest.mark.requirement("E3")
def test_no_website_is_answered(server: Homeserver) -> None:
    """Whatever it asks for in a user's browser, it is not given the answer (CORS)."""
    admin = server.user("admin", admin=True)
    origin = {"Origin": "https://example.org"}
    for token, status in ((admin.access_token, 200), ("nonsense", 401)):
        headers = {**origin, "Authorization": f"Bearer {token}"}
        answer = get(server, headers=headers)
        assert answer.status_code == status
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
        assert "Set-Cookie" not in answer.headers
        assert "no-store" in answer.headers["Cache-Control"]
    url = f"{server.base_url}{PATH}/overview"
    answer = requests.post(url, json={}, timeout=60, **bearer(admin.access_token))
    assert refused(answer) == (405, "M_UNRECOGNIZED")
    answer = requests.put(url, json={}, timeout=60, **bearer(admin.access_token))
    assert refused(answer) == (405, "M_UNRECOGNIZED")


@pytest.mark.requirement("E3")
@pytest.mark.one_process
def test_other_servers_are_not_answered(server: Homeserver) -> None:
    admin = server.user("admin", admin=True)
    token, url = admin.access_token, f"https://127.0.0.1:{server.federation_port}{PATH}/overview"
    answer = requests.get(url, timeout=60, verify=False, **bearer(token))  # noqa: S501  # it is the lab's own
    assert refused(answer) == (404, "M_UNRECOGNIZED")


@pytest.mark.requirement("E3", "H6")
def test_it_can_be_elsewhere_and_off(servers: Servers) -> None:
    elsewhere, off = servers(
        {"config": {"admin": {"path": "/_synapse/elsewhere"}}},
        {"config": {"admin": {"enabled": False}}},
    )
    admin = elsewhere.user("admin", admin=True)
    assert admin.request("GET", "/_synapse/elsewhere/admin/v1/overview")["active"]["events"] == 0
    assert refused(get(elsewhere, **bearer(admin.access_token)))[0] == 404
    other = off.user("admin", admin=True)
    assert refused(get(off, **bearer(other.access_token)))[0] == 404


@pytest.mark.requirement("E3")
def test_what_is_asked_in_a_wrong_way_is_said(server: Homeserver) -> None:
    admin = server.user("admin", admin=True)
    token = bearer(admin.access_token)
    wrong = (400, "M_INVALID_PARAM")
    for path in (
        "events/no-event-id",
        "events/" + "%24" + "a" * 300,
        "events/%24a%00b",
        "events/%24%ff",
        "events/%24%ed%a0%80",
        "events/%24a?limit=0",
        "events/%24a?limit=501",
        "events/%24a?limit=1e2",
        "events/%24a?limit=%D9%A3",
        "events/%24a?limit=1&limit=2",
        "events/%24a?sender=alice",
        "events/%24a?sender=@a:b&server=c",
        "events/%24a?lmit=5",
        "events/%24a?room_id=%00",
    ):
        assert refused(get(server, path, **token)) == wrong, path
    for path in ("", "/", "nothing", "events", "events/", "events/%24a/b", "overview/"):
        assert refused(get(server, path, **token)) == (404, "M_UNRECOGNIZED"), path
    # Names that no server has, and rooms that nobody made.
    for server_name in ("a b", "[", "a:b:c", "' OR 1=1 --", "%", "_", "a" * 255):
        found = why(admin, "$a/b", server=server_name, room_id="<script>")
        assert found["verdict"]["code"] == "not_here"
        assert found["reasons"][0]["code"] == "not_in_room"
    room_id = admin.create_room()
    for server_name in ("a b", "[", "a:b:c", "%", "_"):
        assert why(admin, "$a", server=server_name, room_id=room_id)["reasons"]


# Many processes


def of_each(server: WorkerHomeserver, path: str, token: str) -> dict[str, tuple[int, Any]]:
    """What the sockets of all of its processes answer, by name."""
    answers = {}
    sockets = {name: server.socket_of(name) for name in server.processes}
    for name in (MAIN, *server.persisters):
        sockets[f"{name} (replication)"] = server.folder / f"{name}.replication.sock"
    for name, socket in sockets.items():
        connection = UnixConnection(socket)
        headers = {"Authorization": f"Bearer {token}", "X-Forwarded-For": "127.0.0.1"}
        connection.request("GET", f"{PATH}/{path}", headers=headers)
        answer = connection.getresponse()
        answers[name] = answer.status, json.loads(answer.read() or "null")
        connection.close()
    return answers


@pytest.mark.workers
@pytest.mark.requirement("E3", "E2")
def test_all_processes_for_clients_answer_the_same_and_no_others(lab: Lab, peer: Peer) -> None:
    server = lab.make_workers(config=limits(per_sender=limit(HOURLY, 1)))
    server.first_start()
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    first, held_up = scene.sticky(), scene.sticky()
    wait_until(lambda: deferred(server) == {held_up}, "the second one to be deferred")
    wait_until_sticky(server, first)
    own = scene.alice.send_sticky(scene.room_id)
    wait_until(lambda: verdict(admin, own) == "delivered", "the push to be acknowledged")
    codes = {held_up: "deferred", first: "delivered", own: "delivered"}
    for path in ("overview", *(f"events/{quote(event_id)}" for event_id in codes)):
        answers = of_each(server, path, admin.access_token)
        answered = {name: body for name, (status, body) in answers.items() if status == 200}
        assert answered.keys() == {MAIN, SYNC, SLIDING_SYNC}
        assert {status for status, _ in answers.values()} == {200, 404}
        for body in answered.values():
            # It goes on meanwhile.
            body.pop("now_ms")
            for about in [s["details"].pop("about_ms", 0) for s in body.get("steps", ())]:
                assert about is not None
        assert answered[SYNC] == answered[MAIN] == answered[SLIDING_SYNC]


# Lists


def pages(admin: Client, path: str, what: str, **query: Any) -> list[Any]:
    """All of the list, page by page."""
    found, after = list[Any](), dict[str, str]()
    while True:
        answer = ask(admin, path, **query, **after)
        found += answer[what]
        if "next" not in answer:
            return found
        after = {"from": answer["next"]}


@pytest.mark.requirement("E3", "E2")
@pytest.mark.parametrize("postgres", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rooms_and_servers_are_listed(lab: Lab, peer: Peer, postgres: bool) -> None:
    config = limits(per_sender=limit(HOURLY, 2))
    with ExitStack() as stack:
        extra = {}
        if postgres:
            extra = {"database": stack.enter_context(Postgres()).new_database()}
        (server,) = lab.servers({"config": config, "extra": extra})
        stack.callback(lab.close_servers, [server])
        look_at_lists(server, peer)


def look_at_lists(server: Homeserver, peer: Peer) -> None:
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    busy, room_ids = scene.room_id, [scene.alice.create_room() for _ in range(3)]
    scene.alice.send_state(busy, "m.room.name", {"name": "<b>busy</b>"})
    for number, room_id in enumerate(room_ids):
        for _ in range(number):
            scene.alice.send_sticky(room_id)
    sent = [scene.sticky() for _ in range(5)]
    wait_until(lambda: len(deferred(server)) == 3, "three events to be deferred")
    # One that is not delivered, and one that cannot be persisted.
    own = scene.alice.send_sticky(busy)
    scene.alice.redact(busy, own)
    peer.override = lambda method, path: (502, {}) if "/get_missing_events/" in path else None
    withhold(scene)
    stuck = scene.sticky()
    wait_until(lambda: parked(server) == {stuck}, "it to be parked")

    rooms = pages(admin, "rooms", "rooms", limit=1)
    assert [(r["room_id"], r["active"], r["deferred"], r["parked"]) for r in rooms] == [
        (busy, 3, 3, 1),
        (room_ids[2], 2, 0, 0),
        (room_ids[1], 1, 0, 0),
    ]
    assert rooms == pages(admin, "rooms", "rooms")
    backwards = pages(admin, "rooms", "rooms", order_by="active", dir="f", limit=1)
    assert backwards == rooms[::-1]
    by_name = pages(admin, "rooms", "rooms", order_by="name", limit=2)
    assert [r["room_id"] for r in by_name] == sorted({busy, *room_ids[1:]})
    assert by_name[::-1] == pages(admin, "rooms", "rooms", order_by="name", dir="b", limit=2)
    assert pages(admin, "rooms", "rooms", order_by="deferred", limit=1)[0]["room_id"] == busy

    def name_is_noted() -> bool:
        return bool(ask(admin, "rooms", limit=1)["rooms"][0]["name"] == "<b>busy</b>")

    wait_until(name_is_noted, "Synapse to note the name")

    for size in (1, 2, 100):
        events = pages(admin, f"rooms/{quote(busy)}/events", "events", limit=size)
        assert [event["state"] for event in events] == [
            *("active", "active", "not delivered", "deferred", "deferred", "deferred", "parked")
        ]
        assert {event["event_id"] for event in events} == {*sent, own, stuck}
    redacted, last = events[2], events[-1]
    assert (redacted["why"], redacted["sender"]) == ("redacted", scene.alice.user_id)
    assert {event["why"] for event in events[3:6]} == {"federation.per_sender"}
    assert {event["type"] for event in events} == {"org.example.call"}
    assert (last["sender"], last["why"]) == (scene.eve, "its prev_events cannot be fetched")
    assert refused(get(server, "rooms/!nowhere/events", **bearer(admin.access_token))) == (
        404,
        "M_NOT_FOUND",
    )

    servers = pages(admin, "servers", "servers", limit=1)
    assert [(s["server"], s["active"], s["deferred"], s["parked"]) for s in servers] == [
        (server.name, 4, 0, 0),
        (peer.name, 2, 3, 1),
    ]
    assert [s["server"] for s in pages(admin, "servers", "servers", order_by="deferred")] == [
        peer.name,
        server.name,
    ]
    assert {s["is_refused"] for s in servers} == {False}
    for query in ("from=5", "from=a~b", "from=-1~b", "dir=up", "order_by=size", "limit=0"):
        token = bearer(admin.access_token)
        for path in ("rooms", "servers"):
            assert refused(get(server, f"{path}?{query}", **token)) == (400, "M_INVALID_PARAM")
    for after in ("active~x", "active~9223372036854775808", "other~1", "deferred"):
        path = f"rooms/{quote(busy)}/events?from={after}"
        answer = get(server, path, **bearer(admin.access_token))
        assert refused(answer) == (400, "M_INVALID_PARAM")


@pytest.mark.slow
@pytest.mark.requirement("E3", "P3")
def test_a_server_that_cannot_be_reached_is_listed(servers: Servers, peer: Peer) -> None:
    (server,) = servers({})
    alice, admin = server.user("alice"), server.user("admin", admin=True)
    room_id = alice.create_room()
    alice.send_sticky(room_id)
    peer.override = lambda method, path: (502, {}) if "/send/" in path else None
    peer.join(server, room_id, peer.user("eve"))

    def listed() -> Any:
        found = ask(admin, "servers", order_by="newcomer", limit=1)["servers"]
        return found if found[0]["failing_since_ms"] else None

    (first,) = wait_until(listed, "it to be found out")
    assert (first["server"], first["newcomer"], first["lacking"]) == (peer.name, 1, 1)
    assert first["next_try_ms"] > first["failing_since_ms"]


# What it costs


@pytest.mark.requirement("E3", "H1")
@pytest.mark.one_process
def test_a_sync_costs_the_same_without_the_api(servers: Servers) -> None:
    """Counted: each transaction of Synapse's and of the module's, by name."""
    options = {"metrics": True}
    of_each = []
    for server in servers(options, {**options, "config": {"admin": {"enabled": False}}}):
        alice = server.user("alice")
        room_id = alice.create_room()
        alice.send_sticky(room_id)
        since = alice.sync()["next_batch"]

        def transactions(server: Homeserver = server) -> Counter[str]:
            (text,) = server.metrics()
            found = {name: int(float(n)) for name, n in TRANSACTIONS.findall(text)}
            return Counter({n: found[n] for n in found if "sync" in n or "sticky" in n})

        before = transactions()
        for _ in range(20):
            since = alice.sync(since)["next_batch"]
        of_each.append(transactions() - before)
    assert of_each[0] == of_each[1]


# Its description


@pytest.mark.requirement("E3")
def test_all_that_is_described_is_there(server: Homeserver) -> None:
    admin = server.user("admin", admin=True)
    for path, methods in description()["paths"].items():
        url = path[1:].replace("{event_id}", "%24a").replace("{room_id}", "!a")
        for method in ("get", "post", "delete", "put", "patch"):
            answer = requests.request(
                method, f"{server.base_url}{PATH}/{url}", timeout=60, **bearer(admin.access_token)
            )
            is_there = answer.status_code != 405
            assert is_there == (method in methods), (method, path)
            if method in methods:
                assert str(answer.status_code) in methods[method]["responses"], (method, path)
