"""Acknowledged sticky events stay in the inbound staging area until they are processed (L3).

Synapse prunes the area of a room once 100 PDUs are staged there: it deletes those that others
refer to. Unexpired sticky ones are exempt. Fails open: if the pruning cannot be decided, nothing is
pruned this time.
"""

from collections.abc import Callable
from typing import Protocol

from synapse_sticky.handlers.staging.pdu import StagedPdu
from synapse_sticky.homeserver import Homeserver


class Pruned(Protocol):
    """The staging area that Synapse prunes."""

    def exempt_from_pruning(self, is_exempt: Callable[[StagedPdu], bool]) -> None:
        """From now on Synapse prunes no PDU for which this is true (L3). It is asked in database
        threads, too."""


class PruningHandler:
    """Decides which staged PDUs Synapse may not prune."""

    def __init__(self, homeserver: Homeserver, staging: Pruned) -> None:
        self._homeserver = homeserver
        self._staging = staging

    def install(self) -> None:
        """Takes effect from the next pruning on."""
        self._staging.exempt_from_pruning(self.is_exempt)

    def is_exempt(self, staged: StagedPdu) -> bool:
        """Is the staged PDU sticky (S1), and unexpired (S2) by when it was received?"""
        return staged.until_ms() > self._homeserver.now_ms()
