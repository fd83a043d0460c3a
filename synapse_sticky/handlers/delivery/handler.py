"""The sections of sticky events in /sync and sliding sync (D1 to D8), out of the index.

Fails open: what the index cannot answer, the database does.
"""

from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import NamedTuple, Protocol

from synapse_sticky.homeserver import Homeserver
from synapse_sticky.index import IndexFollower, Position


class Question(NamedTuple):
    """Which deliverable events of these rooms, unexpired at ``now_ms``, come after one position of
    the sticky events stream (exclusive) and up to another (inclusive)?

    limit: the most to give, None for all.
    """

    room_ids: Collection[str]
    after: Position
    up_to: Position
    now_ms: int
    limit: int | None


Answer = tuple[dict[str, list[str]], Position]
"""The events' IDs by room, in stream order; and up to where all there are have been given."""


class Delivery(Protocol):
    """What a user's sync is given in its sections of sticky events."""

    def answer_from(self, source: Callable[[Question], Awaitable[Answer | None]]) -> None:
        """From now on /sync and sliding sync get their sticky events from ``source``.

        If it fails or has no answer, Synapse's own query serves, without what was redacted (S5).
        """


class DeliveryHandler:
    """Answers what Synapse would ask its database at every sync of every user."""

    def __init__(self, homeserver: Homeserver, follower: IndexFollower, delivery: Delivery) -> None:
        self._metrics = homeserver.metrics
        self._follower = follower
        self._delivery = delivery

    def install(self) -> None:
        """Takes effect from the next sync on."""
        self._delivery.answer_from(self._metrics.timed("delivery", "sync", self.answer))

    async def answer(self, question: Question) -> Answer | None:
        """The answer by the index; None to have the database asked."""
        # A client may have a token from the future, or this process be behind.
        if question.limit == 0 or question.up_to.is_before_or_at(question.after):
            return {}, question.after
        if not question.room_ids:
            return {}, _both(question.after, question.up_to)
        answer = self._by_index(question)
        if answer is None:
            # Many are often woken by the same event: one of them reads it for all. So it is with
            # one that may have been redacted.
            answer = await self._follower.catch_up(partial(self._by_index, question))
        self._metrics.answered("database" if answer is None else "index")
        return answer

    def _by_index(self, question: Question) -> Answer | None:
        after, up_to, limit = question.after, question.up_to, question.limit
        if not self._follower.holds(up_to):
            return None
        by_room, count, last = self._follower.index.events_by_room(
            question.room_ids,
            after.stream_id,
            after.writers,
            up_to.stream_id,
            up_to.writers,
            question.now_ms,
            limit,
        )
        # One event in doubt is the doubt of those alone who would get it.
        if self._follower.doubts(by_room.values()):
            return None
        if last is not None and count == limit:
            return by_room, _end_of_page(after, up_to, last)
        return by_room, _both(after, up_to)


def _both(one: Position, other: Position) -> Position:
    """The position of each writer that is the further of the two."""
    if one.is_before_or_at(other):
        return other
    stream_id = max(one.stream_id, other.stream_id)
    writers = {writer: max(one.of(writer), other.of(writer)) for writer in _writers(one, other)}
    return Position(stream_id, writers)


def _end_of_page(after: Position, up_to: Position, last_stream_id: int) -> Position:
    """Where a full page ends: no writer is further than the page's last event or than ``up_to``,
    nor behind where the page began."""
    stream_id = max(after.stream_id, min(last_stream_id, up_to.stream_id))
    writers = {
        writer: max(after.of(writer), min(last_stream_id, up_to.of(writer)))
        for writer in _writers(after, up_to)
    }
    return Position(stream_id, writers)


def _writers(one: Position, other: Position) -> set[str]:
    return {*one.writers, *other.writers}
