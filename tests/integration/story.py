"""One story, told while something breaks: a flood, a newcomer, a user who joins and pages through
what is sticky; and what must be true in the end, whatever broke."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import requests

from tests.integration.rooms import deferred, entered, in_thread
from tests.lab import Client, Homeserver, Peer, wait_until
from tests.lab.client import WITHOUT_TIMELINE, sliding_sticky_events, sticky_events
from tests.lab.scene import Scene, enter

T = TypeVar("T")
Do = Callable[[Callable[[], Any]], Any]
"""Does something, again if the server failed."""

TRANSACTION = 12
"""How many PDUs the peer sends at once."""
_SHORT_MS = 20_000


def patiently(server: Homeserver, do: Callable[[], T]) -> T:
    """As a client does: tries again if the server failed, once it is up again."""
    failures: list[Exception] = []
    for _ in range(5):
        try:
            return do()
        except (requests.RequestException, AssertionError) as e:
            failures.append(e)
        server.revive()
    raise failures[0]


def tell(
    server: Homeserver,
    peer: Peer,
    newcomer: Peer,
    *,
    first: Callable[[], object] = lambda: None,
    meanwhile: Callable[[Scene[Homeserver]], object] = lambda scene: None,
    transactions: int = 1,
    of_one_user: int = 0,
) -> None:
    """The story, and what must be true in the end.

    Args:
        peer: floods the server.
        newcomer: joins the room during the flood.
        first: called before the flood.
        meanwhile: called beside the flood, the newcomer's join and the user's.
        transactions: how many the peer sends; each has ``TRANSACTION`` sticky PDUs.
        of_one_user: how many short-lived sticky PDUs one more user sends, which may expire
            before a limit lets them through.
    """
    do = partial(patiently, server)
    scene = do(lambda: enter(server, peer))
    bob = do(server.user)
    mallory = do(lambda: scene.bring("mallory"))
    of_alice = [do(partial(send, scene.alice, scene.room_id, number)) for number in range(3)]
    # So that bob's position is beyond them.
    do(lambda: bob.send_sticky(bob.create_room()))
    before = do(bob.sliding_sync)
    first()
    finish = in_thread(lambda: meanwhile(scene))
    flood = [
        event_id
        for _ in range(transactions)
        for event_id in send_as_a_server_does(scene, do, [scene.eve] * TRANSACTION)
    ]
    short = []
    if of_one_user:
        short = send_as_a_server_does(scene, do, [mallory] * of_one_user, _SHORT_MS)
    user = newcomer.user("carol")
    do(lambda: newcomer.join(server, scene.room_id, user))
    do(lambda: bob.join(scene.room_id))
    finish()

    def all_is_there() -> bool:
        server.revive()
        return set(flood) <= set(entered(server, scene.room_id)) and set(of_alice) <= set(
            newcomer.events
        )

    wait_until(all_is_there, "everything to be delivered", 120)
    if short:
        wait_until(lambda: revived(server) and not deferred(server), "what waits to expire")

    # Each is there once, for who was there before and for who joined.
    seen = pages_of(bob, scene.room_id, before, do)
    expected = set(of_alice) | set(flood)
    assert len(seen) == len(set(seen))
    assert expected <= set(seen) <= expected | set(short)
    since, found = None, list[str]()
    while True:
        answer = do(partial(scene.alice.sync, since, filter_=WITHOUT_TIMELINE))
        since, page = answer["next_batch"], sticky_events(answer, scene.room_id)
        if not page:
            break
        found += page
    assert len(found) == len(set(found))
    assert expected <= set(found) <= expected | set(short)
    rows = entered(server, scene.room_id)
    assert len(rows) == len(set(rows)), "none twice in the stream"
    assert not set(rows) & deferred(server), "what is released does not wait"


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
    """In one transaction, which is repeated until it is answered. Gives the events' IDs."""
    events = []
    for sender in senders:
        events.append(scene.peer.sticky(scene.room, sender, duration_ms))
        scene.peer.advance(scene.room, events[-1][0])
    pdus = [pdu for _, pdu in events]
    name = f"faults-{events[0][0][1:]}"
    said = do(lambda: scene.send(*pdus, transaction_id=name))
    assert said == {event_id: {} for event_id, _ in events}
    return [event_id for event_id, _ in events]


def pages_of(user: Client, room_id: str, answer: Any, do: Do) -> list[str]:
    """All that sliding sync gives of the room, a few at a time."""
    seen: list[str] = []
    while True:
        answer = do(partial(user.sliding_sync, answer, limit=2))
        page = sliding_sticky_events(answer, room_id)
        if not page:
            return seen
        seen += page
