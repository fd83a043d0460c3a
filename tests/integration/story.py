"""One story, told while something breaks: a flood, a newcomer, a user who joins and pages through
what is sticky; and what must be true in the end, whatever broke."""

import queue
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, TypeVar

import requests

from tests.integration.rooms import deferred, entered, in_thread
from tests.lab import Client, Homeserver, Peer, wait_until
from tests.lab.client import WITHOUT_TIMELINE, sliding_sticky_events, sticky_events
from tests.lab.scene import Scene, enter
from tests.lab.watch import Watcher

T = TypeVar("T")
Do = Callable[[Callable[[], Any]], Any]
"""Does something, again if the server failed."""

TRANSACTION = 12
"""How many PDUs the peer sends at once."""
_SHORT_MS = 20_000
_LONGEST_S = 240.0


def patiently(server: Homeserver, do: Callable[[], T]) -> T:
    """As a client does: tries again if the server failed, once it is up again."""
    failures: list[Exception] = []
    done: list[T] = []

    def is_done() -> bool:
        try:
            done.append(do())
        except (requests.RequestException, AssertionError) as e:
            failures.append(e)
            server.revive()
        return bool(done)

    wait_until(is_done, "the server to do it", 120, lambda: failures[-1:])
    return done[0]


def tell(
    server: Homeserver,
    peer: Peer,
    newcomer: Peer,
    *,
    first: Callable[[], object] = lambda: None,
    meanwhile: Callable[[Scene[Homeserver]], object] = lambda scene: None,
    pace: Iterable[object] = range(1),
    of_one_user: int = 0,
    scene: Scene[Homeserver] | None = None,
) -> None:
    """The story, and what must be true in the end.

    Args:
        peer: floods the server.
        newcomer: joins the room during the flood.
        first: called before the flood.
        meanwhile: called beside the flood, the newcomer's join and the user's.
        pace: for each the peer sends a transaction, of ``TRANSACTION`` sticky PDUs.
        of_one_user: how many short-lived sticky PDUs one more user sends, which may expire
            before a limit lets them through.
        scene: the room, if it is made already.
    """
    do = partial(patiently, server)
    scene = scene or do(lambda: enter(server, peer))
    room_id = scene.room_id
    bob, dora, frank = (do(server.user) for _ in range(3))
    mallory = do(lambda: scene.bring("mallory"))
    do(lambda: dora.join(room_id))
    do(lambda: frank.join(room_id))
    do(lambda: frank.leave(room_id))
    of_alice = [do(partial(send, scene.alice, room_id, number)) for number in range(3)]
    # So that bob's position is beyond them.
    do(lambda: bob.send_sticky(bob.create_room()))
    before = do(bob.sliding_sync)
    first()
    due = queue.Queue[int | None]()

    def go_on() -> None:
        user = scene.alice.again()
        for number in iter(due.get, None):
            of_alice.append(do(partial(send, user, room_id, number)))

    with ExitStack() as stack:
        sync, sliding, *outside = (
            stack.enter_context(closing(Watcher(user, sliding=s)))
            for user in (dora, frank)
            for s in (False, True)
        )
        finish = [in_thread(lambda: meanwhile(scene), _LONGEST_S), in_thread(go_on, _LONGEST_S)]
        for end in finish:
            stack.callback(end)
        stack.callback(due.put, None)
        flood = []
        for number, _ in enumerate(pace, start=len(of_alice)):
            due.put(number)
            flood += send_as_a_server_does(scene, do, [scene.eve] * TRANSACTION)
        short = []
        if of_one_user:
            short = send_as_a_server_does(scene, do, [mallory] * of_one_user, _SHORT_MS)
        do(lambda: newcomer.join(server, room_id, newcomer.user("carol")))
        do(lambda: bob.join(room_id))
        due.put(None)
        for end in finish:
            end()
        own = set(of_alice)
        expected = own | set(flood)

        def missing() -> dict[str, set[str]]:
            server.revive()
            left = {
                "the stream": expected - set(entered(server, room_id)),
                "the newcomer": own - newcomer.events.keys(),
                "the peer": own - peer.events.keys(),
                "/sync": expected - set(sync.seen(room_id)),
                "sliding sync": expected - set(sliding.seen(room_id)),
            }
            return {where: event_ids for where, event_ids in left.items() if event_ids}

        answered = [len(watcher.answers) for watcher in outside]
        wait_until(lambda: not missing(), "everything to be delivered", _LONGEST_S, missing)
        wait_until(
            lambda: all(len(w.answers) > n for w, n in zip(outside, answered, strict=True)),
            "who left to be answered",
        )
        if short:
            wait_until(lambda: revived(server) and not deferred(server), "what waits to expire")
        seen_by = {
            "the stream": entered(server, room_id),
            "who joined": pages_of(bob, room_id, before, do, expected),
            "a new client": sections_of(scene.alice, room_id, do),
        }
    seen_by |= {"who synced": sync.seen(room_id), "sliding sync": sliding.seen(room_id)}
    for who, seen in seen_by.items():
        assert len(seen) == len(set(seen)), f"each is there once for {who}"
        assert expected <= set(seen) <= expected | set(short), who
    assert not set(seen_by["the stream"]) & deferred(server), "what is released does not wait"
    told = "".join(watcher.text() for watcher in outside)
    assert not [event_id for event_id in seen_by["the stream"] if event_id in told], "who left"


def revived(server: Homeserver) -> bool:
    """True; for conditions to wait for. It is running then."""
    server.revive()
    return True


def send(user: Client, room_id: str, number: int) -> str:
    """The same request each time, so that it is carried out once."""
    query = {"org.matrix.msc4354.sticky_duration_ms": 3_600_000}
    path = f"rooms/{room_id}/send/org.example.call/fault-{number}"
    event_id: str = user.request("PUT", path, {"body": "here"}, **query)["event_id"]
    return event_id


def send_as_a_server_does(
    scene: Scene[Homeserver],
    do: Do,
    senders: list[str],
    duration_ms: int = 3_600_000,
) -> list[str]:
    """In one transaction, which is repeated until it is answered. Gives the events' IDs.

    Nothing comes on top of some of them: if one of those is lost, nobody misses it.
    """
    events = []
    for number, sender in enumerate(senders):
        events.append(scene.peer.sticky(scene.room, sender, duration_ms))
        if number % 3 != 1:
            scene.peer.advance(scene.room, events[-1][0])
    pdus = [pdu for _, pdu in events]
    name = f"faults-{events[0][0][1:]}"
    said = do(lambda: scene.send(*pdus, transaction_id=name))
    assert said == {event_id: {} for event_id, _ in events}
    return [event_id for event_id, _ in events]


def sections_of(user: Client, room_id: str, do: Do) -> list[str]:
    """All that /sync gives of the room to a new client."""
    since, seen = None, list[str]()
    while True:
        answer = do(partial(user.sync, since, filter_=WITHOUT_TIMELINE))
        since, page = answer["next_batch"], sticky_events(answer, room_id)
        if not page:
            return seen
        seen += page


def pages_of(
    user: Client, room_id: str, answer: Any, do: Do, expected: Collection[str]
) -> list[str]:
    """All that sliding sync gives of the room, a few at a time, until nothing comes after what is
    expected."""
    seen: list[str] = []

    def all_pages() -> bool:
        nonlocal answer
        page = None
        while page != []:
            answer = do(partial(user.sliding_sync, answer, limit=2))
            page = sliding_sticky_events(answer, room_id)
            seen.extend(page)
        return set(seen).issuperset(expected)

    wait_until(all_pages, "sliding sync to give everything")
    return seen
