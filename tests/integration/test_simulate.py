"""``synapse-sticky simulate`` beside a real flood: the same order, and the same times (E3)."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from synapse_sticky.cli import main
from tests.conftest import Servers
from tests.integration.rooms import deferred, entered, wait_until_taken_in
from tests.lab import Client, Homeserver, Peer
from tests.lab.client import WITHOUT_TIMELINE, sticky_events
from tests.lab.peer import now_ms
from tests.lab.scene import Scene, enter

FLOOD = 600
GOAL_MS, GOAL_SHARE = 1_000, 0.1
"""How far from the truth the time of an event may be."""
PATIENCE = 4
"""How much further it may be, as other programs may have the machine's cores."""


def durations_and_keys() -> list[tuple[int, str | None]]:
    """What each event of the flood has, in the order of arrival.

    While the flood arrives, some of it is released, and what is newest then depends on
    milliseconds. So those that are released meanwhile arrive newest first. All others are older,
    and arrive oldest first, as usual; half of them are of one key.
    """
    hour_s = 3_600
    first = [(hour_s - number, None) for number in range(220)]
    rest = [(hour_s - 600, "key" if number % 2 else None) for number in range(FLOOD - len(first))]
    return [(seconds * 1_000, key) for seconds, key in [*first, *rest]]


def send(scene: Scene[Homeserver]) -> list[str]:
    """The flood of one user, as fast as the server takes it. Gives the IDs."""
    sent = []
    events = durations_and_keys()
    for first in range(0, FLOOD, 50):
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


@pytest.mark.slow
@pytest.mark.one_process  # its own clock says when each event came, and its stream in which order
@pytest.mark.requirement("E3", "L4", "D7")
@pytest.mark.timeout(1_200)
def test_simulation_of_a_real_flood(
    servers: Servers, peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the default limits."""
    (server,) = servers({"config": {}})
    scene = enter(server, peer)
    begin_ms = now_ms()
    seen_by_client = watching(scene.alice, scene.room_id, FLOOD)
    sent = send(scene)
    wait_until_taken_in(server, scene.room_id, set(sent))
    seen = seen_by_client()
    order = entered(server, scene.room_id)
    assert sorted(order) == sorted(sent)
    assert not deferred(server)

    path = str(server.folder / "homeserver.yaml")
    capsys.readouterr()
    span = ("--since", str(begin_ms), "--until", str(now_ms()))
    assert main(["simulate", "-c", path, "--database", path, *span, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    simulated = found["configurations"]["homeserver.yaml"]
    assert simulated["by_fate"]["later"] > FLOOD / 2
    assert simulated["order"] == order
    off_ms = [off_by_ms(one, seen[one["event_id"]]) for one in simulated["each"]]
    print(f"Off by at most {max(off for off, _ in off_ms)} ms")  # noqa: T201
    assert all(off <= PATIENCE * goal_ms for off, goal_ms in off_ms), max(off_ms)


def off_by_ms(one: dict[str, Any], seen_ms: int) -> tuple[int, float]:
    """How far an event's time is from when the client saw it, and how far it may be."""
    goal_ms = max(GOAL_MS, GOAL_SHARE * (seen_ms - one["arrived_ms"]))
    return abs(seen_ms - one["delivered_ms"]), goal_ms
