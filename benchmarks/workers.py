"""A Synapse of many processes, with and without the module, with one and two event persisters.

``python -m benchmarks.workers``
"""

import argparse
import json
import selectors
import socket
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlencode

import attr

from tests.integration.rooms import NO_LIMITS, deferred, entered, limits
from tests.lab import Client, Lab, Peer, WorkerHomeserver, wait_until
from tests.lab.say import say
from tests.lab.scene import Scene, enter
from tests.lab.workers import PERSISTERS, SYNC, owner

_TRANSACTION = 50
_USERS = 50
_PATIENCE_S = 1_800
_ALL_WAIT = limits(per_server={"per_second": 0.001, "burst_count": 1})


@attr.s(auto_attribs=True, frozen=True)
class Figures:
    """What one deployment did.

    arrived: of the sticky events that other servers sent, the share that is in the stream, or
        waits, when nothing is left to do. All were acknowledged.
    persisted_per_s: these, from the first transaction on.
    unhurried_per_s: persisted a second if no server sends more before what it sent is persisted,
        so that plain Synapse drops none.
    released_per_s: all that had waited, from a start without limits on.
    told_s: how long after its being sent one event was on its way to the clients that waited:
        to the middle one, and to the last.
    pushed_per_s: own sticky events, from the join until the newcomer had all.
    """

    arrived: float
    persisted_per_s: float
    unhurried_per_s: float
    released_per_s: float | None
    told_s: tuple[float, float]
    pushed_per_s: float | None


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000, help="that other servers send")
    parser.add_argument("--clients", type=int, default=2_000, help="that wait for one event")
    parser.add_argument("--pushed", type=int, default=5_000, help="that a newcomer lacks")
    args = parser.parse_args()
    rows = []
    for persisters in (1, 2):
        for module in (False, True):
            kind = "with the module" if module else "plain Synapse"
            say(f"{kind}, event persisters: {persisters}")
            with Lab() as lab:
                lab.prepare()
                figures = _measure(lab, PERSISTERS[:persisters], module, args)
            rows.append((kind, persisters, figures))
    columns = ["", "persisters", "arrived", "persisted a second", "unhurried", "released a second"]
    columns += ["told: the middle one", "told: the last", "pushed a second"]
    say(f"| {' | '.join(columns)} |")
    say("|---" * len(columns) + "|")
    for kind, persisters, f in rows:
        cells = [
            f"{f.arrived:.0%}",
            f"{f.persisted_per_s:.0f}",
            f"{f.unhurried_per_s:.0f}",
            f"{f.released_per_s:.0f}" if f.released_per_s else "",
            *(f"{seconds:.2f} s" for seconds in f.told_s),
            f"{f.pushed_per_s:.0f}" if f.pushed_per_s else "none",
        ]
        say(f"| {kind} | {persisters} | {' | '.join(cells)} |")


def _measure(lab: Lab, persisters: tuple[str, ...], module: bool, args: Any) -> Figures:
    config = {**_ALL_WAIT, "local": {"per_user": None}}
    deployment = lab.make_workers(module=module, config=config, persisters=persisters, metrics=True)
    deployment.first_start()
    with ExitStack() as stack:
        peers = [lab.peer() for _ in range(2)]
        for peer in peers:
            stack.callback(peer.close)
        scenes = _scenes(deployment, peers)
        say(f"{args.events} sticky events of other servers, 50 of each at a time")
        unhurried_per_s = _persist_unhurried(scenes, args.events)
        say(f"{args.events} sticky events of other servers at once")
        arrived, persisted_per_s = _persist(deployment, scenes, args.events)
        released_per_s = None
        if module:
            deployment.configure_module(NO_LIMITS)
            released_per_s = _release(deployment)
        say(f"One event, {args.clients} clients that wait")
        told_s = _tell(deployment, args.clients)
        say(f"A newcomer, {args.pushed} events" if module else "No newcomer: it would get none")
        pushed_per_s = _push(deployment, lab, args.pushed) if module else None
    return Figures(arrived, persisted_per_s, unhurried_per_s, released_per_s, told_s, pushed_per_s)


def _scenes(deployment: WorkerHomeserver, peers: list[Peer]) -> list[Scene[WorkerHomeserver]]:
    """A room for each server; the rooms have persisters of their own if there are two."""
    scenes = []
    for number, peer in enumerate(peers):
        persister = deployment.persisters[number % len(deployment.persisters)]
        while owner(deployment.persisters, (scene := enter(deployment, peer)).room_id) != persister:
            pass
        scenes.append(scene)
    return scenes


def _persist_unhurried(scenes: list[Scene[WorkerHomeserver]], count: int) -> float:
    def send(scene: Scene[WorkerHomeserver]) -> None:
        for _ in range(count // len(scenes) // _TRANSACTION):
            scene.wait_until_there(scene.flood(_TRANSACTION)[-1])

    start_s = time.monotonic()
    with ThreadPoolExecutor(len(scenes)) as executor:
        list(executor.map(send, scenes))
    return count / (time.monotonic() - start_s)


def _persist(
    deployment: WorkerHomeserver, scenes: list[Scene[WorkerHomeserver]], count: int
) -> tuple[float, float]:
    """Each server sends its share of them to its room. What part arrived, and how many a second."""
    there_already = _arrived(deployment, scenes)
    start_s = time.monotonic()
    with ThreadPoolExecutor(len(scenes)) as executor:
        list(executor.map(lambda scene: scene.flood(count // len(scenes)), scenes))

    # Plain Synapse drops some of what it has staged.
    staged = "SELECT 1 FROM federation_inbound_events_staging LIMIT 1"
    wait_until(lambda: not deployment.query(staged), "all to be taken in", _PATIENCE_S)
    elapsed_s = time.monotonic() - start_s
    arrived = _arrived(deployment, scenes) - there_already
    assert arrived == count or not deployment.module
    return arrived / count, arrived / elapsed_s


def _arrived(deployment: WorkerHomeserver, scenes: list[Scene[WorkerHomeserver]]) -> int:
    waiting = len(deferred(deployment)) if deployment.module else 0
    return waiting + sum(len(entered(deployment, scene.room_id)) for scene in scenes)


def _release(deployment: WorkerHomeserver) -> float:
    """All that wait, at once, as there is no limit any more."""
    count = len(deferred(deployment))
    for name in deployment.persisters:
        deployment.stop_process(name)
    for name in deployment.persisters:
        deployment.start_process(name)
    line = "of an earlier run are still deferred"
    wait_until(
        lambda: any(line in deployment.output_of(name) for name in deployment.persisters),
        "the release to begin",
        _PATIENCE_S,
    )
    start_s = time.monotonic()
    wait_until(lambda: not deferred(deployment), "all to be released", _PATIENCE_S)
    elapsed_s = time.monotonic() - start_s
    deployment.wait_until_ready()
    return count / elapsed_s


def _tell(deployment: WorkerHomeserver, count: int) -> tuple[float, float]:
    """One event, and so many clients whose /sync waits for it; the best of three times."""
    sender = deployment.user()
    room_id = sender.create_room()
    users = [deployment.user() for _ in range(_USERS)]
    for user in users:
        user.join(room_id)
    sender.send_sticky(room_id)
    found = []
    for _ in range(3):
        requests = [
            _request(user, since, number)
            for user, since in [(user, user.sync()["next_batch"]) for user in users]
            for number in range(count // _USERS)
        ]
        times_s = _until_answered(deployment, requests, lambda: sender.send_sticky(room_id))
        found.append((statistics.median(times_s), max(times_s)))
    return min(found)


def _request(user: Client, since: str, number: int) -> bytes:
    # Another filter for each, so that each is worked out for itself.
    filter_ = json.dumps({"room": {"timeline": {"limit": 10 + number}}})
    query = urlencode({"since": since, "timeout": 600_000, "filter": filter_})
    return (
        f"GET /_matrix/client/v3/sync?{query} HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {user.access_token}\r\nX-Forwarded-For: 127.0.0.1\r\n\r\n"
    ).encode()


def _until_answered(
    deployment: WorkerHomeserver, requests: list[bytes], send: Callable[[], object]
) -> list[float]:
    """How long after ``send`` each is answered, in s."""
    selector = selectors.DefaultSelector()
    connections = []
    try:
        for request in requests:
            connection = socket.socket(socket.AF_UNIX)
            connections.append(connection)
            connection.connect(str(deployment.socket_of(SYNC)))
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ)
        _wait_until_all_wait(deployment, len(requests))
        start_s = time.monotonic()
        send()
        times_s: list[float] = []
        while len(times_s) < len(requests):
            for key, _ in selector.select(_PATIENCE_S):
                times_s.append(time.monotonic() - start_s)
                selector.unregister(key.fileobj)
                assert key.fileobj.recv(12) == b"HTTP/1.1 200"  # type: ignore[union-attr]
        return times_s
    finally:
        selector.close()
        for connection in connections:
            connection.close()


def _wait_until_all_wait(deployment: WorkerHomeserver, count: int) -> None:
    def waiting() -> float:
        name = "synapse_notifier_listeners"
        try:
            lines = deployment.metrics_of(SYNC).splitlines()
        except BlockingIOError:
            return 0  # too many connections wait to be taken
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    wait_until(lambda: waiting() >= count, f"{count} syncs to wait", 600)


def _push(deployment: WorkerHomeserver, lab: Lab, count: int) -> float:
    alice = deployment.user()
    room_id = alice.create_room()
    with ThreadPoolExecutor(4) as executor:
        sent = set(executor.map(lambda _: alice.again().send_sticky(room_id), range(count)))
    newcomer = lab.peer()
    try:
        newcomer.join(deployment, room_id, newcomer.user("carol"))
        start_s = time.monotonic()
        wait_until(lambda: sent <= newcomer.events.keys(), "the newcomer to have all", _PATIENCE_S)
        return count / (time.monotonic() - start_s)
    finally:
        newcomer.close()


if __name__ == "__main__":
    main()
