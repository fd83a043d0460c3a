"""A room of a homeserver's user that a user of a peer has joined: where most stories begin."""

import itertools
from typing import Any, Generic, Protocol, TypeVar

import attr

from tests.lab import peer, wait
from tests.lab.client import WITHOUT_TIMELINE, Client, sliding_sticky_events, sticky_events
from tests.lab.membership import allowed_to_fail
from tests.lab.peer import Peer, PeerRoom
from tests.lab.wait import wait_until

_PDUS_IN_TRANSACTION = 50

_transactions = itertools.count()


class Server(peer.Server, Protocol):
    """What a scene needs of a homeserver."""

    def user(self, name: str = "user") -> Client: ...


ServerT = TypeVar("ServerT", bound=Server)


@attr.s(auto_attribs=True)
class Scene(Generic[ServerT]):
    """``alice`` of the server made the room, ``eve`` of the peer joined it."""

    server: ServerT
    peer: Peer
    alice: Client
    eve: str
    room: PeerRoom

    @property
    def room_id(self) -> str:
        return self.room.room_id

    def send(self, *pdus: Any, transaction_id: str | None = None) -> dict[str, Any]:
        """Sends a transaction, and gives what is said of each PDU."""
        name = transaction_id or f"transaction-{next(_transactions)}"
        answer = self.peer.to(self.server).send(name, list(pdus))
        assert answer.status_code == 200, answer.text
        said: dict[str, Any] = answer.json()["pdus"]
        return said

    def sticky(self, sender: str | None = None, duration_ms: Any = 3_600_000) -> str:
        """The peer sends a sticky event. Gives its ID."""
        event_id, pdu = self.peer.sticky(self.room, sender or self.eve, duration_ms)
        assert self.send(pdu) == {event_id: {}}
        return event_id

    def flood(self, count: int, *senders: str, chained: bool = True) -> list[str]:
        """The peer sends so many sticky events, the senders in turns. Each is on top of the last,
        or all are side by side.

        All are acknowledged. Gives their IDs.
        """
        sent = []
        for first in range(0, count, _PDUS_IN_TRANSACTION):
            events = []
            for number in range(first, min(count, first + _PDUS_IN_TRANSACTION)):
                sender = senders[number % len(senders)] if senders else self.eve
                events.append(self.peer.sticky(self.room, sender))
                if chained:
                    self.peer.advance(self.room, events[-1][0])
            said = self.send(*(pdu for _, pdu in events))
            assert said == {event_id: {} for event_id, _ in events}
            sent += [event_id for event_id, _ in events]
        return sent

    def bring(self, name: str) -> str:
        """Another user of the peer joins. Gives the user ID."""
        user_id = self.peer.user(name)
        joined = self.peer.join(self.server, self.room_id, user_id)
        self.room.state["m.room.member", user_id] = joined.state["m.room.member", user_id]
        self.room.extremities, self.room.depth = joined.extremities, joined.depth
        return user_id

    def sections(self) -> tuple[list[str], list[str]]:
        """What a new client is given, in /sync and in sliding sync."""
        sync = self.alice.sync(filter_=WITHOUT_TIMELINE)
        sliding = self.alice.sliding_sync()
        return sticky_events(sync, self.room_id), sliding_sticky_events(sliding, self.room_id)

    def is_there(self, event_id: str) -> bool:
        """Does alice's server have the event?"""
        with allowed_to_fail(404):
            self.alice.event(self.room_id, event_id)
            return True
        return False

    def wait_until_there(self, *event_ids: str) -> None:
        """Waits until alice's server has persisted the events."""
        left = set(event_ids)

        def all_are_there() -> bool:
            left.difference_update([event_id for event_id in left if self.is_there(event_id)])
            return not left

        wait_until(all_are_there, f"{len(event_ids)} events to be there", 4 * wait.patience_s)

    def wait_for_sections(self, *expected: str) -> None:
        """Waits until both sections have these events, in whatever order, once, and no others."""
        wait_until(
            lambda: all(
                len(section) == len(expected) and set(section) == set(expected)
                for section in self.sections()
            ),
            "the sections to be as they should",
        )


def enter(server: ServerT, peer: Peer, history_visibility: str = "shared") -> Scene[ServerT]:
    """Makes a room, and has the peer join it."""
    alice, eve = server.user("alice"), peer.user("eve")
    room_id = alice.create_room(history_visibility)
    room = peer.join(server, room_id, eve)
    wait_until(lambda: eve in alice.members(room_id), "the peer to be joined")
    return Scene(server, peer, alice, eve, room)
