"""``synapse-sticky simulate`` beside a real flood: the same order, and the same times (E3)."""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attr
import pytest

from synapse_sticky.cli import main
from tests.conftest import Servers
from tests.integration.rooms import deferred, entered, wait_until_taken_in
from tests.lab import Client, Homeserver, Peer
from tests.lab.client import WITHOUT_TIMELINE, sticky_events
from tests.lab.peer import now_ms
from tests.lab.scene import Scene, enter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.one_process,  # its stream says in which order, and the database is SQLite
    pytest.mark.requirement("E3", "L4", "D7"),
    pytest.mark.timeout(1_200),
]

GOAL_MS, GOAL_SHARE = 1_000, 0.1
"""How far from the truth a time may be, in ms, or as a share of the delay."""
PATIENCE = 4
"""How much further it may be here, where other programs may have the machine's cores."""

Events = Sequence[tuple[int, str | None]]
"""Durations in ms and sticky keys."""


@attr.s(auto_attribs=True, frozen=True)
class Beside:
    """What was real and what was simulated.

    order: the IDs in the order in which they entered the stream.
    seen: when a client that syncs saw each, in ms since the epoch.
    simulated: what the command prints.
    """

    order: list[str]
    seen: dict[str, int]
    simulated: dict[str, Any]


def send(scene: Scene[Homeserver], events: Events) -> list[str]:
    """One user floods, as fast as the server takes it. Gives the IDs."""
    sent: list[str] = []
    for first in range(0, len(events), 50):
        pdus = []
        for duration_ms, key in events[first : first + 50]:
            content = {"number": len(sent), "msc4354_sticky_key": key}
            event_id, pdu = scene.peer.sticky(scene.room, scene.eve, duration_ms, content=content)
            scene.peer.advance(scene.room, event_id)
            pdus.append(pdu)
            sent.append(event_id)
        scene.send(*pdus)
    return sent


def watching(client: Client, room_id: str, count: int) -> Callable[[], dict[str, int]]:
    """Syncs until the client has so many events. The result gives when each came, in ms."""
    since = client.sync(filter_=WITHOUT_TIMELINE)["next_batch"]

    def watch() -> dict[str, int]:
        seen: dict[str, int] = {}
        position, until_s = since, time.monotonic() + 800
        while len(seen) < count and time.monotonic() < until_s:
            answer = client.sync(position, 10_000, WITHOUT_TIMELINE)
            position = answer["next_batch"]
            for event_id in sticky_events(answer, room_id):
                seen.setdefault(event_id, now_ms())
        return seen

    executor = ThreadPoolExecutor(1)
    future = executor.submit(watch)
    executor.shutdown(wait=False)
    return future.result


def play_and_simulate(
    server: Homeserver, peer: Peer, capsys: pytest.CaptureFixture[str], events: Events
) -> Beside:
    """A real flood. Then the simulation of what the server's database has of it, with the server's
    own configuration."""
    scene = enter(server, peer)
    begin_ms = now_ms()
    seen_by_client = watching(scene.alice, scene.room_id, len(events))
    sent = send(scene, events)
    wait_until_taken_in(server, scene.room_id, set(sent))
    seen = seen_by_client()
    order = entered(server, scene.room_id)
    assert sorted(order) == sorted(sent)
    assert not deferred(server)
    path = str(server.folder / "homeserver.yaml")
    span = ("--since", str(begin_ms), "--until", str(now_ms()))
    capsys.readouterr()
    assert main(["simulate", "-c", path, "--database", path, *span, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return Beside(order, seen, found["configurations"]["homeserver.yaml"])


def assert_near(times_ms: Sequence[tuple[int, int, int]]) -> None:
    """Of each event: when it arrived, when it was seen, and when it should be by the simulation."""
    off = [
        (abs(seen_ms - simulated_ms), max(GOAL_MS, GOAL_SHARE * (seen_ms - arrived_ms)))
        for arrived_ms, seen_ms, simulated_ms in times_ms
    ]
    within = sum(off_ms <= goal_ms for off_ms, goal_ms in off)
    said = f"{within} of {len(off)} as near as they should; the farthest by {max(off)[0]} ms"
    print(said)  # noqa: T201  for whoever runs it with -s
    assert all(off_ms <= PATIENCE * goal_ms for off_ms, goal_ms in off), said


def test_order_and_times_of_a_flood(
    servers: Servers, peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    """600 events, with the default limits.

    While a flood arrives, some of it is released, and what is newest then depends on milliseconds.
    So the events that are released meanwhile arrive newest first here. All others are older, and
    arrive oldest first, as usual. Half of them are of one key.
    """
    (server,) = servers({"config": {}})
    events: list[tuple[int, str | None]] = [((3_600 - n) * 1_000, None) for n in range(220)]
    events += [(3_000_000, "key" if n % 2 else None) for n in range(600 - len(events))]
    found = play_and_simulate(server, peer, capsys, events)
    assert found.simulated["by_fate"]["later"] > 300
    assert found.simulated["order"] == found.order
    assert_near(
        [
            (one["arrived_ms"], found.seen[one["event_id"]], one["delivered_ms"])
            for one in found.simulated["each"]
        ]
    )


def test_how_many_of_an_ordinary_flood_clients_have_by_when(
    servers: Servers, peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which event is released while the flood arrives depends on milliseconds. How many does not.

    So the times of the first, the second, ... release are compared.
    """
    (server,) = servers({"config": {}})
    found = play_and_simulate(server, peer, capsys, [(3_600_000, None)] * 200)
    assert found.simulated["by_fate"]["later"] > 80
    each = found.simulated["each"]
    arrived = sorted(one["arrived_ms"] for one in each)
    simulated = sorted(one["delivered_ms"] for one in each)
    assert_near(list(zip(arrived, sorted(found.seen.values()), simulated, strict=True)))
