"""Parked PDUs, as they are stored, and as it is decided when they are tried."""

import enum
from collections.abc import Callable, Collection, Sequence

import attr

from synapse_sticky.homeserver import Cursor

LONGEST_MS = 120_000
"""No PDU is put off for longer."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class ParkedPdu:
    """An acknowledged PDU that cannot be persisted yet, as it is stored.

    is_outside: whether this server was not in the room when the PDU came.
    """

    origin: str
    event_id: str
    room_id: str
    event_json: str
    internal_metadata: str
    prev_event_ids: tuple[str, ...]
    auth_event_ids: tuple[str, ...] = ()
    is_outside: bool = False


@attr.s(auto_attribs=True, frozen=True, slots=True)
class ScheduledPdu:
    """A parked PDU without its content: what decides when it is tried.

    It expires at ``until_ms``, and is due at ``due_ms``. ``tries`` is how often it has failed for
    a reason that nobody knows.
    """

    event_id: str
    prev_event_ids: tuple[str, ...]
    received_ts_ms: int
    until_ms: int
    due_ms: int
    tries: int = 0
    auth_event_ids: tuple[str, ...] = ()

    def is_due(self, now_ms: int) -> bool:
        """Is it to be tried now? What is due later than anything is put off was put off before the
        clock was set back."""
        return not now_ms < self.due_ms <= now_ms + LONGEST_MS


class Outcome(enum.Enum):
    """What has become of a PDU that was to be parked."""

    PARKED = "parked"
    STILL_PARKED = "still parked"
    """It was already, and has failed again."""
    FULL = "full"
    """Too many are parked."""
    GIVEN_UP = "given up"
    """It was tried often enough, and is not parked any more."""


StageTxn = Callable[[Cursor, str, Sequence[ParkedPdu]], None]
"""``(cursor, room_id, pdus)``: puts PDUs of the room into Synapse's staging area."""

KnownTxn = Callable[[Cursor, Collection[str]], set[str]]
"""``(cursor, room_ids)``: those of the rooms that this server knows. A deleted one it does not."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Here:
    """Which events are persisted in full, and which auth_events are here at all."""

    persisted: set[str]
    existing: set[str]

    def has_all_before(self, pdu: ScheduledPdu) -> bool:
        """Is all here that the PDU comes after?"""
        return self.persisted.issuperset(pdu.prev_event_ids) and self.existing.issuperset(
            pdu.auth_event_ids
        )
