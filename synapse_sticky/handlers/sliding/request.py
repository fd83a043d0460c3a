"""A request of sliding sync, as ``handler`` asks it."""

import hashlib
from collections.abc import Collection
from collections.abc import Set as AbstractSet
from typing import Protocol

from synapse_sticky.handlers.sliding.pages import Shown
from synapse_sticky.handlers.sliding.tables import Connection
from synapse_sticky.index import Position

MOST_IN_SECTION = 100
"""So many events at most a client asks for, as Synapse reads it."""

_LONGEST_NAME = 64


class SlidingRequest(Protocol):
    """A request of sliding sync that asks for sticky events."""

    connection: Connection
    """Names that are short, and that any database takes."""
    room_ids: AbstractSet[str]
    """The rooms that the user is joined to and that the client's lists could match (D2, D8)."""
    limit: int
    """The most events that the client takes."""
    since: Position | None
    """Up to where the client has been told of; None for nothing."""
    up_to: Position
    """Up to where this response may go."""
    shown: Shown
    """Up to where this response takes rooms into account."""
    shown_before: Shown | None
    """The same of the connection's response before; None if this is its first."""

    async def newly_joined_rooms(self, after: Shown | None) -> AbstractSet[str]:
        """Rooms that the user was not in by then, or that were kept from the client until their
        state was whole; None for an hour ago."""

    async def unignored_users(self, after: Shown | None) -> AbstractSet[str]:
        """Users whom the user ignored by then, and does not ignore now; None for an hour ago."""

    async def read_of(
        self, senders: Collection[str], room_ids: Collection[str], after: Position, up_to: Position
    ) -> int:
        """Puts these senders' events into the response, beside its page. Gives how many."""

    async def read(
        self, room_ids: Collection[str], after: Position, up_to: Position, limit: int | None
    ) -> tuple[int, Position]:
        """Puts these rooms' events into the response, the earliest first, at most ``limit``.

        From the start of the stream, with a limit of ``MOST_IN_SECTION``, it puts all there if that
        is not too much, else the newest of each key as well.

        Gives how many, and up to where it came (at least ``up_to`` if there were not more).
        """


class Unignored(Protocol):
    """Whom local users have stopped ignoring. What fails there fails no request."""

    async def events_of(
        self, senders: Collection[str], room_ids: Collection[str], after: Position, up_to: Position
    ) -> dict[str, list[str]]:
        """By room, the senders' events with ``after`` exclusive and ``up_to`` inclusive."""

    async def senders(self, user_id: str, after: int | None, up_to: int) -> set[str]:
        """Whom the user has stopped ignoring between these positions of the account data, the
        second one included; None for an hour ago."""


def storable(name: str) -> str:
    """The client's name for a connection. Of one that no index or database might take, its hash."""
    if len(name) <= _LONGEST_NAME and name.isascii() and name.isprintable():
        return name
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
