"""Acknowledged sticky events stay in the inbound staging area until they are processed (L3).

Synapse prunes the area of a room once 100 PDUs are staged there: it deletes those that others
refer to. Unexpired sticky ones are exempt. Fails open: if the pruning cannot be decided, nothing is
pruned this time.
"""

from collections.abc import Callable
from typing import Any, Protocol

import attr

from synapse_sticky._core import sticky_until_ms
from synapse_sticky.homeserver import Homeserver


@attr.s(auto_attribs=True, frozen=True, slots=True)
class StagedPdu:
    """What the rules need of a staged PDU.

    sticky_field: the value of its sticky field as it was received, None if there is none.
    origin_server_ts: as it was received: a claim, and not surely a number.
    """

    event_id: str
    sticky_field: object
    origin_server_ts: object
    received_ts_ms: int

    def until_ms(self) -> int:
        """When the PDU stops being sticky (S2); 0 if it is not sticky (S1)."""
        until_ms = sticky_until_ms(self.sticky_field, self.origin_server_ts, self.received_ts_ms)
        return 0 if until_ms is None else until_ms


class Pruned(Protocol):
    """The staging area that Synapse prunes."""

    def exempt_from_pruning(self, is_exempt: Callable[[StagedPdu], bool]) -> None:
        """From now on Synapse prunes no PDU for which this is true (L3)."""


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


def prev_event_ids_of(content: Any, v1_format: bool) -> tuple[str, ...]:
    """The prev_events of a PDU as it was received; v1_format: is its room of version 1 or 2?"""
    prev_events = content.get("prev_events")
    if not isinstance(prev_events, list):
        return ()
    if v1_format:
        prev_events = [p[0] for p in prev_events if isinstance(p, list) and p]
    return tuple(p for p in prev_events if isinstance(p, str))
