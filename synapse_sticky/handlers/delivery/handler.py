"""The sections of sticky events in /sync and sliding sync (D1 to D8), out of the index.

Fails open: what the index cannot answer, the database does.
"""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Protocol

from synapse_sticky.handlers.delivery.pages import Answer, Question, both, end_of_page
from synapse_sticky.handlers.delivery.present import first_answer, is_first, read_apart
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.index import IndexFollower, Position

_MOST_APART = 3
"""So many responses at a time are read apart. After a restart all clients come at once, while the
index is being filled from the same database."""


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
        self._apart = 0

    def install(self) -> None:
        """Takes effect from the next sync on."""
        self._delivery.answer_from(self._metrics.timed("delivery", "sync", self.answer))

    async def answer(self, question: Question) -> Answer | None:
        """The answer by the index; None to have the database asked."""
        # A client may have a token from the future, or this process be behind.
        if question.limit == 0 or question.up_to.is_before_or_at(question.after):
            return {}, question.after
        if not question.room_ids:
            return {}, both(question.after, question.up_to)
        answer = self._by_index(question)
        if answer is None:
            # Many are often woken by the same event: one of them reads it for all. So it is with
            # one that may have been redacted.
            answer = await self._follower.catch_up(partial(self._by_index, question))
        self._metrics.answered("database" if answer is None else "index")
        if answer is None and is_first(question):
            answer = await self._first_by_database(question)
        return answer

    def _by_index(self, question: Question) -> Answer | None:
        after, up_to, limit = question.after, question.up_to, question.limit
        if not self._follower.holds(up_to):
            return None
        index = self._follower.index
        if is_first(question):
            by_room, reached = first_answer(index, question, _position(index.positions()))
        else:
            by_room, count, last = index.events_by_room(
                question.room_ids,
                after.stream_id,
                after.writers,
                up_to.stream_id,
                up_to.writers,
                question.now_ms,
                limit,
            )
            is_full = last is not None and count == limit
            reached = end_of_page(after, up_to, last or 0) if is_full else both(after, up_to)
        # One event in doubt is the doubt of those alone who would get it.
        if self._follower.doubts(by_room.values()):
            return None
        return by_room, reached

    async def _first_by_database(self, question: Question) -> Answer | None:
        """What the index would answer; None if the rooms have too many events, or too many others
        ask."""
        if self._apart >= _MOST_APART:
            return None
        self._apart += 1
        try:
            now = _position(self._follower.stream.positions())
            index = await read_apart(self._follower.stream, question, now)
        finally:
            self._apart -= 1
        return None if index is None else first_answer(index, question, now)


def _position(positions: Mapping[str, int]) -> Position:
    return Position(min(positions.values(), default=0), dict(positions))
