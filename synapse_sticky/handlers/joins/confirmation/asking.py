"""What a newcomer can be asked, and what it can answer."""

from collections.abc import Collection, Mapping
from enum import Enum
from typing import Protocol

import attr


class AnswerKind(Enum):
    """What an answer says."""

    SAYS = "says what it has"
    LACKS = "lacks the event"
    SILENT = "does not say"
    """The server will not answer such a question later either."""
    TOO_LARGE = "says more than is read"
    REFUSES = "refuses to say"
    LIMITED = "answers 429"
    BUSY = "cannot say now"
    UNREACHABLE = "cannot be reached"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Answer:
    """An answer.

    event_ids: the events that the answer has. Of one that was asked for by itself, it has some
        copy: that may be an outlier. Of any other it has the event with its place in the room.
    down_to: the depth down to which it has what can be reached. 0 if it has all of it, and not as
        many events as it may have.
    reason: why it says nothing, for the log.
    """

    kind: AnswerKind
    event_ids: Collection[str] = ()
    down_to: int = 0
    reason: str = ""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Place:
    """
    depth: the event's.
    referring: some of the events that have it among their prev_events.
    """

    depth: int
    referring: Collection[str] = ()


class Asking(Protocol):
    """Asking other servers for events. No question is repeated by itself."""

    async def has_events(
        self, destination: str, room_id: str, event_ids: Collection[str], limit: int
    ) -> Answer:
        """Asks which of the room's events it has, of these and of those that they refer to, and so
        on (federation ``/backfill``). It may answer with ``limit`` events."""

    async def has_event(self, destination: str, event_id: str) -> Answer:
        """Asks for one event (federation ``/event``)."""

    async def referenced(self, event_ids: Collection[str]) -> set[str]:
        """Those of the events that are prev_events of others, by this server's database."""

    async def places(self, event_ids: Collection[str]) -> Mapping[str, Place]:
        """Where the events are in the room, by this server's database."""


@attr.s(auto_attribs=True, slots=True)
class Asked:
    """What came of the questions about one push.

    in_vain, refusals: how many answers in a row told nothing new, or nothing at all.
    limit: how many events an answer may have.
    is_doubted: whether the newcomer is to be asked for the oldest event by itself.
    last_ms: when there was an answer last.
    took_ms: how long the newcomer takes to process an event.
    """

    in_vain: int = 0
    refusals: int = 0
    limit: int = 100
    is_doubted: bool = False
    last_ms: int = 0
    took_ms: float = 0

    def note_taken(self, found: int, now_ms: int) -> float:
        """The newcomer has processed ``found`` events since the last answer. Gives how long it
        takes for one."""
        took_ms = max(now_ms - self.last_ms, 0) / found
        self.took_ms = (self.took_ms + took_ms) / 2 if self.took_ms else took_ms
        self.last_ms = now_ms
        return self.took_ms
