"""A PDU in the inbound staging area, as far as the rules look at it."""

from collections.abc import Iterable
from typing import Any

import attr

from synapse_sticky._core import sticky_until_ms
from synapse_sticky.homeserver.spec import LONGEST_NAME

_NO_EVENT = ""


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


def prev_event_ids_of(content: Any, v1_format: bool) -> tuple[str, ...]:
    """The prev_events of a PDU as it was received; v1_format: is its room of version 1 or 2?"""
    prev_events = content.get("prev_events")
    if not isinstance(prev_events, list):
        return ()
    if v1_format:
        prev_events = [p[0] for p in prev_events if isinstance(p, list) and p]
    return tuple(p for p in prev_events if isinstance(p, str))


def ids_to_wait_for(event_ids: Iterable[str]) -> tuple[str, ...]:
    """Those of a PDU's prev_events or auth_events, as they are stored and read for each try (H1).

    For all that no event can have, one is there that none has: the PDU waits for it in vain.
    """
    known = (event_id if len(event_id) <= LONGEST_NAME else _NO_EVENT for event_id in event_ids)
    return tuple(dict.fromkeys(known))
