"""A staged PDU, as far as it matters whose turn it is."""

import attr

from synapse_sticky.handlers.staging.turns.waiting import Place
from synapse_sticky.homeserver.spec import LONGEST_NAME

Key = tuple[str, str]
"""The origin and the event ID: the same event may be staged of several origins."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class WaitingPdu:
    """A staged PDU, as far as its turn depends on it.

    prev_event_ids: those that an event can have. A PDU with so many that Synapse refuses it can
        have none here.
    until_ms: when it stops being sticky; 0 if it is not sticky.
    """

    origin: str
    event_id: str
    received_ts_ms: int
    depth: int
    prev_event_ids: tuple[str, ...]
    until_ms: int = 0

    @property
    def key(self) -> Key:
        return self.origin, self.event_id

    @property
    def weight(self) -> int:
        """For how many PDUs it counts in memory, as its ID may be too long."""
        return 1 + len(self.event_id) // (LONGEST_NAME + 1)

    @property
    def place(self) -> Place:
        """Its place among the PDUs of its origin."""
        return self.received_ts_ms, self.depth, self.event_id
