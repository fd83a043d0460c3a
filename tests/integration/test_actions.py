"""What administrators order: to hold or exempt a server, to release or discard what waits (E3)."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import pytest

from tests.conftest import Servers
from tests.integration.rooms import (
    deferred,
    entered,
    is_sticky_at,
    limits,
    wait_until_sticky,
)
from tests.integration.test_deferral import HOURLY, limit
from tests.lab import Client, Lab, Peer, wait_until
from tests.lab.admin_api import PATH, ask, check
from tests.lab.client import ApiError
from tests.lab.scene import Scene, enter

GOAL_S = 10
"""Within this time all processes know of an order."""


def order(admin: Client, kind: str, **fields: Any) -> Any:
    body = admin.request("POST", f"{PATH}/actions", {"kind": kind, **fields})
    check("actions", body, method="post")
    return body


def end(admin: Client, action_id: str) -> Any:
    body = admin.request("DELETE", f"{PATH}/actions/{quote(action_id)}")
    check(f"actions/{action_id}", body, method="delete")
    return body


def verdict(admin: Client, event_id: str) -> str:
    code: str = ask(admin, f"events/{quote(event_id, safe='')}")["verdict"]["code"]
    return code


def send_until_held(scene: Scene[Any]) -> str:
    """Sends until an event waits. Gives its ID."""

    def held() -> str | None:
        event_id = scene.sticky()
        scene.wait_until_there(event_id)
        return event_id if event_id in deferred(scene.server) else None

    return str(wait_until(held, "the server to be held", 4 * GOAL_S))


def send_until_delivered(scene: Scene[Any], sender: str | None = None) -> str:
    """Sends until an event does not wait. Gives its ID."""

    def delivered() -> str | None:
        event_id = scene.sticky(sender)
        scene.wait_until_there(event_id)
        return event_id if is_sticky_at(scene.server, event_id) else None

    return str(wait_until(delivered, "an event to be delivered at once", 4 * GOAL_S))


@pytest.mark.requirement("E3")
def test_a_server_is_held(servers: Servers, peer: Peer) -> None:
    """Its events wait, whatever the limits, also after a restart; and no transaction of it is
    refused."""
    (server,) = servers({"config": limits(max_deferred_per_server=2)})
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    before = scene.sticky()
    wait_until_sticky(server, before)
    action = order(admin, "hold", server=peer.name, reason="a flood")
    assert (action["made_by"], action["in_force"]) == (admin.user_id, True)
    assert action["until_ms"] - action["made_ms"] == 3_600_000
    held = send_until_held(scene)
    assert verdict(admin, held) == "held"
    (shown,) = [
        event
        for event in ask(admin, f"rooms/{quote(scene.room_id)}/events")["events"]
        if event["event_id"] == held
    ]
    assert (shown["state"], shown["why"]) == ("deferred", "the order to hold its server")
    # Each is acknowledged, although more of them wait than may.
    more = [scene.sticky() for _ in range(5)]
    wait_until(lambda: {held, *more} <= deferred(server), "all to wait")
    # Those of others do not.
    wait_until_sticky(server, scene.alice.send_sticky(scene.room_id))
    server.restart()
    again = send_until_held(scene)
    assert {held, *more, again} <= deferred(server)
    assert end(admin, action["action_id"])["ended_by"] == admin.user_id
    wait_until(lambda: not deferred(server), "all to be released", 4 * GOAL_S)
    assert {held, *more, again} <= {*entered(server, scene.room_id)}
    assert server.log_has(f"{admin.user_id} has ordered hold of {peer.name} until")
    assert server.log_has(f"{admin.user_id} has ended hold of {peer.name} until")


@pytest.mark.requirement("E3")
def test_a_hold_is_over_by_itself(servers: Servers, peer: Peer) -> None:
    (server,) = servers({"config": limits()})
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    order(admin, "hold", server=peer.name, for_ms=60_000)
    held = send_until_held(scene)
    expiring = scene.sticky(duration_ms=1_000)
    wait_until(lambda: expiring not in deferred(server), "the row of one that expires to be gone")
    assert held in deferred(server)
    # A minute later.
    server.change("UPDATE synapse_sticky_actions SET until_ms = made_ms")
    wait_until_sticky(server, held)
    (action,) = ask(admin, "actions")["actions"]
    assert (action["in_force"], action["ended_by"]) == (False, None)
    wait_until_sticky(server, send_until_delivered(scene))


@pytest.mark.requirement("E3", "L7")
def test_a_server_or_a_user_is_exempt(servers: Servers, peer: Peer) -> None:
    (server,) = servers({"config": limits(per_sender=limit(HOURLY, 1))})
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    other = scene.bring("other")
    for sender in (scene.eve, other):
        wait_until_sticky(server, scene.sticky(sender))
    held_up = scene.sticky()
    wait_until(lambda: held_up in deferred(server), "one more to wait")
    of_user = order(admin, "exempt", sender=scene.eve)
    send_until_delivered(scene)
    of_other = scene.sticky(other)
    wait_until(lambda: of_other in deferred(server), "that of another user to wait")
    order(admin, "exempt", server=peer.name)
    send_until_delivered(scene, other)
    for action in ask(admin, "actions")["actions"]:
        end(admin, action["action_id"])
    send_until_held(scene)
    # What waited before waits on. Whoever ends an order twice is told of the first time.
    assert {held_up, of_other} <= deferred(server)
    first = end(admin, of_user["action_id"])
    assert first == end(admin, of_user["action_id"])


@pytest.mark.requirement("E3")
def test_what_waits_is_released(servers: Servers, peer: Peer) -> None:
    """Of a sender, in a room, of a server; each time no others."""
    (server,) = servers({"config": limits(per_sender=limit(HOURLY, 1))})
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    elsewhere = enter(server, peer)
    other = scene.bring("other")
    waiting: dict[str, set[str]] = {}
    for name, (where, sender) in {
        "eve": (scene, scene.eve),
        "other": (scene, other),
        "elsewhere": (elsewhere, elsewhere.eve),
    }.items():
        _, *rest = [where.sticky(sender) for _ in range(3)]
        waiting[name] = {*rest}
    all_of_them = set.union(*waiting.values())
    wait_until(lambda: deferred(server) == all_of_them, "all to wait")
    order(admin, "release", sender=other)
    left = waiting["eve"] | waiting["elsewhere"]
    wait_until(lambda: deferred(server) == left, "those of the sender to be released")
    order(admin, "release", room_id=elsewhere.room_id)
    wait_until(lambda: deferred(server) == waiting["eve"], "those of the room to be released")
    order(admin, "release", server="nowhere.example", room_id=scene.room_id)
    order(admin, "release", server=peer.name)
    wait_until(lambda: not deferred(server), "the others to be released")
    sticky = {*entered(server, scene.room_id), *entered(server, elsewhere.room_id)}
    assert all_of_them <= sticky
    # The limit is in force as before, for what comes then.
    send_until_held(scene)
    found = ask(admin, "actions", limit=1)
    assert found["actions"][0]["kind"] == "release"
    assert len(ask(admin, "actions", **{"from": found["next"]})["actions"]) == 3


@pytest.mark.requirement("E3")
def test_what_waits_is_discarded(servers: Servers, peer: Peer) -> None:
    """It stays in the timeline, and is not sticky after a restart, either. It is shown by whom."""
    (server,) = servers({"config": limits(per_sender=limit(HOURLY, 1))})
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    delivered, held_up = scene.sticky(), scene.sticky()
    wait_until(lambda: held_up in deferred(server), "one to wait")
    order(admin, "discard", sender=scene.eve, reason="spam")
    wait_until(lambda: not deferred(server), "it to be discarded")
    answer = ask(admin, f"events/{quote(held_up, safe='')}")
    assert answer["verdict"]["code"] == "discarded"
    (limited,) = [step for step in answer["steps"] if step["name"] == "limited"]
    assert (limited["state"], limited["details"]["discarded_by"]) == ("failed", admin.user_id)
    assert verdict(admin, delivered) == "delivered"
    # What comes later waits as ever.
    send_until_held(scene)
    server.restart()
    assert not is_sticky_at(server, held_up)
    assert scene.is_there(held_up)


@pytest.mark.requirement("E3")
def test_orders_that_make_no_sense_are_refused(servers: Servers) -> None:
    server, off = servers({}, {"config": {"federation": {"mode": "off"}}})
    admin = server.user("admin", admin=True)

    def refused(admin: Client, **body: Any) -> tuple[int, str]:
        with pytest.raises(ApiError) as raised:
            admin.request("POST", f"{PATH}/actions", body)
        return raised.value.status, raised.value.errcode

    wrong = (400, "M_INVALID_PARAM")
    user = server.user("user")
    for body in (
        {},
        {"kind": "stop"},
        {"kind": "hold"},
        {"kind": "hold", "server": server.name},
        {"kind": "hold", "server": "a", "room_id": "!a"},
        {"kind": "hold", "server": 5},
        {"kind": "hold", "server": "a\0b"},
        {"kind": "hold", "server": "a", "for_ms": 59_999},
        {"kind": "hold", "server": "a", "for_ms": True},
        {"kind": "hold", "server": "a", "for_ms": 1e9},
        {"kind": "hold", "server": "a", "reason": "a\nb"},
        {"kind": "hold", "server": "a", "reason": "a" * 501},
        {"kind": "hold", "server": "a", "until": 5},
        {"kind": "exempt"},
        {"kind": "exempt", "server": "a", "sender": "@a:b"},
        {"kind": "exempt", "room_id": "!a"},
        {"kind": "exempt", "server": server.name},
        {"kind": "exempt", "sender": user.user_id},
        {"kind": "release"},
        {"kind": "release", "server": "a", "for_ms": 60_000},
        {"kind": "push", "server": "a", "room_id": "!a"},
        {"kind": ["release"], "server": "a"},
    ):
        assert refused(admin, **body) == wrong, body
    for kind in ("hold", "exempt"):
        assert refused(off.user("admin", admin=True), kind=kind, server="a") == wrong
    with pytest.raises(ApiError) as raised:
        end(admin, "none")
    assert (raised.value.status, raised.value.errcode) == (404, "M_NOT_FOUND")
    assert refused(user, kind="hold", server="a") == (403, "M_FORBIDDEN")
    assert ask(admin, "actions")["actions"] == []


@pytest.mark.requirement("E3")
def test_many_orders_at_once(servers: Servers, peer: Peer) -> None:
    """The same one twenty times, and the end of all of them."""
    (server,) = servers({"config": limits()})
    scene, admin = enter(server, peer), server.user("admin", admin=True)
    with ThreadPoolExecutor(8) as executor:
        made = [*executor.map(lambda _: order(admin.again(), "hold", server=peer.name), range(20))]
    assert len({action["action_id"] for action in made}) == 20
    held = send_until_held(scene)
    for action in made[1:]:
        end(admin, action["action_id"])
    assert send_until_held(scene) in deferred(server), "one is in force still"
    with ThreadPoolExecutor(8) as executor:
        ended = executor.map(lambda _: end(admin.again(), made[0]["action_id"]), range(8))
        assert len({action["ended_ms"] for action in ended}) == 1
    wait_until_sticky(server, held)


@pytest.mark.workers
@pytest.mark.requirement("E3", "E2")
def test_all_processes_know_of_an_order(lab: Lab, peer: Peer) -> None:
    """Within ten seconds, also if the one that took it is down since."""
    # A receiver that does not know of the order yet must refuse nothing for what waits by it.
    server = lab.make_workers(config=limits(max_deferred_per_server=8))
    server.first_start()
    scenes = [enter(server, peer) for _ in range(4)]
    admin = server.user("admin", admin=True)
    for scene in scenes:
        wait_until_sticky(server, scene.sticky())
    action = order(admin, "hold", server=peer.name)
    start_s = time.monotonic()
    # Rooms of both event persisters, by both receivers.
    held = {send_until_held(scene) for scene in scenes}
    assert time.monotonic() - start_s < 4 * GOAL_S
    held |= {scene.sticky() for scene in scenes for _ in range(2)}
    wait_until(lambda: held <= deferred(server), "all to wait")
    for name in server.persisters:
        server.restart_process(name)
    held |= {send_until_held(scene) for scene in scenes}
    assert held <= deferred(server)
    end(admin, action["action_id"])
    wait_until(lambda: not deferred(server), "all to be released", 8 * GOAL_S)
    assert all(is_sticky_at(server, event_id) for event_id in held)
