"""Servers of strangers in the soak: they flood, are never there, and refuse what they are asked."""

import random
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Collection
from typing import Protocol, TypeVar

import attr
import requests

from tests.lab import Homeserver, Lab, Peer
from tests.lab.peer import Answer, Pdu, PeerRoom

_UNRECOGNIZED: Answer = (404, {"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"})
_KEPT_NEWCOMERS = 4
"""As many newcomers as this are there at a time; the eldest is gone for good when another comes."""
_PDUS_A_TRANSACTION = 50
UNSTORABLE = "cannot-be-stored"
"""In the content of a PDU that the database refuses."""

T = TypeVar("T")


class Patiently(Protocol):
    """Makes a request to the server of this number, again while that server is down."""

    def __call__(self, number: int, do: Callable[[], T]) -> T: ...


@attr.s(auto_attribs=True, frozen=True)
class Newcomer:
    """A server that joined the room of this number, and hears what is sent to it."""

    peer: Peer
    room: int

    def bodies(self) -> set[str]:
        """The bodies of the PDUs that it has received."""
        return {str(pdu["content"].get("body")) for pdu in self.peer.received}


class Strangers:
    """The lab's peers in the soak, and everything that they do.

    Args:
        rooms: their room IDs.
        residents: which servers stay in the room of this number.
    """

    def __init__(
        self,
        lab: Lab,
        servers: list[Homeserver],
        rooms: list[str],
        residents: Callable[[int], Collection[int]],
        patiently: Patiently,
        chance: random.Random,
    ) -> None:
        self._lab = lab
        self._servers = servers
        self._rooms = rooms
        self._residents = residents
        self._patiently = patiently
        self._random = chance
        self._ended = threading.Event()
        self.newcomers: list[Newcomer] = []
        self._others: list[Peer] = []
        self._sender = lab.peer()
        self._outbox: dict[int, list[tuple[str, Pdu]]] = {n: [] for n in range(len(servers))}
        self._unstorable: set[str] = set()
        self.accepted: dict[str, tuple[int, set[int]]] = {}
        """What the sending peer was told was taken: the room's number and the servers, by ID."""
        self._in_rooms = [self._joins(self._sender, n, "sender") for n in range(len(rooms))]
        for server in servers:
            server.change(
                "CREATE TRIGGER cannot_be_stored BEFORE INSERT ON event_json"
                f" WHEN NEW.json LIKE '%{UNSTORABLE}%'"
                " BEGIN SELECT RAISE(ABORT, 'cannot be stored'); END"
            )

    def close(self) -> None:
        self._ended.set()
        for peer in [self._sender, *self._others, *(n.peer for n in self.newcomers)]:
            peer.close()

    def _joins(self, peer: Peer, room: int, name: str) -> PeerRoom:
        number = self._random.choice(sorted(self._residents(room)))
        server = self._servers[number]
        return self._patiently(
            number, lambda: peer.join(server, self._rooms[room], peer.user(name))
        )

    # Actions

    def send_unstorable(self) -> None:
        """A PDU that the database refuses, with an honest one beside it."""
        room = self._random.randrange(len(self._rooms))
        peer_room = self._in_rooms[room]
        user = self._sender.user("sender")
        bad, bad_pdu = self._sender.sticky(peer_room, user, content={"body": UNSTORABLE})
        good, good_pdu = self._sender.sticky(peer_room, user)
        self._sender.advance(peer_room, good)
        self._unstorable.add(bad)
        self.accepted[good] = (room, set())
        for number in self._residents(room):
            self._outbox[number] += [(bad, bad_pdu), (good, good_pdu)]
        self.flush()

    def flush(self) -> bool:
        """Sends what the sending peer has for the servers. Is all of it through?"""
        for number, waiting in self._outbox.items():
            while waiting:
                now = waiting[:_PDUS_A_TRANSACTION]
                if not self._send(number, now):
                    break
                del waiting[: len(now)]
        return not any(self._outbox.values())

    def _send(self, number: int, pdus: list[tuple[str, Pdu]]) -> bool:
        server = self._servers[number]
        transaction = secrets.token_hex(8)
        answer = self._patiently(
            number,
            lambda: self._sender.to(server).send(transaction, [pdu for _, pdu in pdus]),
        )
        if answer.status_code == requests.codes.too_many:
            return False
        answer.raise_for_status()
        for event_id, result in answer.json()["pdus"].items():
            if event_id in self.accepted and "error" not in result:
                self.accepted[event_id][1].add(number)
        return True

    def come_unrouted(self) -> None:
        """A newcomer whose proxy does not know the endpoint for one event."""
        self.newcomers.append(self._come(_unrouted))
        if len(self.newcomers) > _KEPT_NEWCOMERS:
            self.newcomers.pop(0).peer.close()

    def come_and_say_nothing(self) -> None:
        """A newcomer that never answers a transaction: the sender waits until its time is up."""
        self._others.append(self._come(self._silent).peer)

    def _come(self, override: Callable[[str, str], Answer | None]) -> Newcomer:
        peer = self._lab.peer()
        room = self._random.randrange(len(self._rooms))
        self._joins(peer, room, "newcomer")
        peer.override = override
        return Newcomer(peer, room)

    def _silent(self, method: str, path: str) -> Answer | None:
        if method != "PUT" or "/send/" not in path:
            return None
        self._ended.wait(60)
        return 500, {}

    def mass_join(self) -> None:
        """Many users of one server join at once."""
        peer = self._lab.peer()
        room = self._random.randrange(len(self._rooms))
        for number in range(20):
            self._joins(peer, room, f"user{number}")
        self._others.append(peer)

    # What was promised

    def sent_too_often(self, at_most: int) -> Counter[str]:
        """The events that a newcomer was sent more often than that by all servers together."""
        too_often: Counter[str] = Counter()
        for newcomer in self.newcomers:
            counts = Counter(pdu["hashes"]["sha256"] for pdu in newcomer.peer.received)
            too_often.update({key: n for key, n in counts.items() if n > at_most})
        return too_often

    def stored(self, server: Homeserver) -> set[str]:
        """Of the PDUs that cannot be stored, those that the server has all the same."""
        rows = server.query("SELECT event_id FROM sticky_events")
        return self._unstorable & {event_id for (event_id,) in rows}


def _unrouted(method: str, path: str) -> Answer | None:
    is_asked = method == "GET" and "/federation/v1/event/" in path
    return _UNRECOGNIZED if is_asked else None
