"""Acknowledged sticky events stay in the inbound staging area until they are processed (L3).

Synapse prunes the area of a room once 100 PDUs are staged there: it deletes those that others
refer to. Unexpired sticky ones are exempt. Fails open: if the pruning cannot be decided, nothing is
pruned this time.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol

from synapse_sticky.handlers.staging.pdu import StagedPdu
from synapse_sticky.homeserver import Homeserver


class Pruned(Protocol):
    """The staging area that Synapse prunes."""

    async def prune(
        self, room_id: str, room_version: object, is_exempt: Callable[[StagedPdu], bool]
    ) -> bool:
        """Prunes some of what is staged for the room, and no PDU for which this is true (L3). It is
        asked in database threads, too. Gives whether any was pruned."""

    def replace_pruning(self, prune: Callable[[str, object], Awaitable[bool]]) -> None:
        """From now on prunes by this what is staged for a room: gets the room's ID and version. If
        it fails, nothing is pruned."""


class PruningHandler:
    """Decides which staged PDUs Synapse may not prune."""

    def __init__(self, homeserver: Homeserver, staging: Pruned) -> None:
        self._homeserver = homeserver
        self._staging = staging

    def install(self) -> None:
        """Takes effect from the next pruning on."""
        timed = self._homeserver.metrics.timed
        self._staging.replace_pruning(timed("pruning", "prune", self.prune))

    async def prune(self, room_id: str, room_version: object) -> bool:
        """Prunes some of what is staged for the room. Gives whether any was pruned."""
        return await self._staging.prune(room_id, room_version, self.is_exempt)

    def is_exempt(self, staged: StagedPdu) -> bool:
        """Is the staged PDU sticky (S1), and unexpired (S2) by when it was received?"""
        return staged.until_ms() > self._homeserver.now_ms()
