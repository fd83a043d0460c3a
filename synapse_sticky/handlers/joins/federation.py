"""What pushing needs of sending to other servers."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import attr

from synapse_sticky.handlers.joins.detection.reader import HandledDestinations
from synapse_sticky.homeserver import Cursor

LONGEST_BACKOFF_MS = 600_000
"""A destination's back-off is read again after this time at the latest. The clock may have been
behind when it was read first."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Batch:
    """Own sticky events of one room that go to a destination in one transaction.

    position: a position of the sticky events stream; the destination is done with everything at or
        below it in this room.
    event_ids: in stream order.
    """

    room_id: str
    position: int
    event_ids: list[str]


BacklogSource = Callable[[str, int], Awaitable[Batch | None]]
"""``(destination, limit)`` to the next batch for it, or None if there is none for now."""


class LeftToSynapseError(Exception):
    """The module cannot say what to send: Synapse's own selection serves."""


class Federation(HandledDestinations, Protocol):
    """Sending to other servers, in a process that does so."""

    def wake(self, destination: str) -> None:
        """Looks for something to send to the destination, unless it is backed off."""

    async def may_receive(self, room_id: str, destination: str) -> bool:
        """May the destination get own events of this room now: are both servers in the room and
        allowed by its ACL, and is the federation whitelist in favour?"""

    async def retry_at_ms(self, destination: str) -> int:
        """When the destination's back-off ends (ms since the epoch; 0 if there is none)."""

    async def backlog(self, destination: str) -> list[tuple[str, int]]:
        """Synapse's own backlog of the destination: ``(room_id, position)``, inclusive."""

    def clear_backlog_txn(self, txn: Cursor, destination: str, room_id: str) -> None:
        """Removes the room from Synapse's own backlog of the destination."""

    def on_acknowledged(
        self, callback: Callable[[str, Sequence[tuple[str, str]]], Awaitable[None]]
    ) -> None:
        """Calls back with a destination and the ``(room_id, event_id)`` that it acknowledged by
        event ID and without error in its answer to ``/send`` (P7)."""

    def on_refused(self, callback: Callable[[str, set[str], list[str]], None]) -> None:
        """Calls back with a destination, the rooms of a transaction, and the IDs of the events that
        the destination named with an error in its answer to it. Does not call back about events
        that the answer leaves out."""

    def on_skipped(self, callback: Callable[[str], None]) -> None:
        """Calls back with a destination once Synapse, in catch-up, has skipped events to it. The
        sticky ones among them are in its backlog by then."""

    def on_catch_up_recorded(self, callback: Callable[[str], None]) -> None:
        """Calls back with a destination each time that Synapse has recorded how far its ordinary
        queue got with it. After a restart Synapse goes on from there."""

    def serve_backlog_from(self, source: BacklogSource) -> None:
        """From now on the backlog of sticky events of every destination comes from ``source``.

        If the source fails, Synapse's own selection serves (fail open).
        """
