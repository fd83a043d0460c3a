"""What the copies are worth that a newcomer says to have (P7).

A Synapse that misses the prev_events of a PDU may fetch them. What it fetched without the state
before it is an *outlier*, and is not sticky there until it is sent to it. Where ``/backfill`` is
asked for an event by itself, the answer has outliers, too. Where it is asked for an event that
refers to it, the answer leaves outliers out, and rejected events.

So what an answer names is asked for once more, in this other way: one question for all of it. An
event counts as an outlier only if the newcomer has one that refers to it: for no other reason would
it have been fetched.
"""

from collections.abc import Callable, Collection, Container, Iterable

from synapse_sticky.handlers.joins.confirmation.asking import (
    Answer,
    AnswerKind,
    Asking,
    Place,
)
from synapse_sticky.handlers.joins.push import Push
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.logs import bounded

logger = bounded(__name__)

MOST_ASKED_FOR = 50
"""For so many events a question asks at once."""

LEAST_LIMIT = 10
"""An answer may have at least so many events."""

_MOST_IN_VAIN = 3

_PASSES = {AnswerKind.LIMITED, AnswerKind.BUSY, AnswerKind.UNREACHABLE}


class Copies:
    """Asks about events that the newcomer is taken to have."""

    def __init__(
        self,
        homeserver: Homeserver,
        asking: Asking,
        *,
        servers: Callable[[str], int],
        done: Callable[[Push, int], list[str]],
        update: Callable[[Push], None],
    ) -> None:
        """
        Args:
            servers: how many servers have sticky events in the room.
            done: the last own events that a push is done with, at most so many, ascending.
            update: has a push take in the present events of its room.
        """
        self._metrics = homeserver.metrics
        self._asking = asking
        self._servers = servers
        self._done = done
        self._update = update

    async def ask_for(self, push: Push, event_ids: Collection[str], expected: int) -> Answer:
        """Asks for these events of the push's room, and for those that they refer to.

        Args:
            expected: so many own events are expected in the answer.
        """
        limit = expected * max(self._servers(push.room_id), 1) + LEAST_LIMIT
        answer = await self._asking.has_events(
            push.destination, push.room_id, event_ids, min(limit, push.asked.limit)
        )
        self._metrics.asked(answer.kind.name.lower())
        return answer

    async def ask_who_is_back(self, push: Push) -> Answer | None:
        """The newcomer was in the room before: does it still have what it got then? Gives its
        answer, None if there is nothing to ask for. It may take a second question.

        The join makes the newcomer fetch the last events of the room. So it proves little that it
        has one of them, and it is asked for many.
        """
        asked = self._done(push, min(MOST_ASKED_FOR, push.asked.limit))
        if not asked:
            push.is_back = False
            return None
        if push.asked.is_doubted:
            return await self._ask_for_oldest(push, asked[0])
        answer = await self.ask_for(push, asked, len(asked))
        if answer.kind is AnswerKind.REFUSES:
            push.is_back = False
        if answer.kind is not AnswerKind.SAYS:
            return answer
        places = await self._asking.places(asked)
        there = set(answer.event_ids)
        found = [event_id for event_id in asked if event_id in there]
        missing = [e for e in asked if e not in there and _is_told(places.get(e), answer)]
        if missing and not found:
            # It may not be able to say: it says nothing as long as it has partial state.
            push.asked.is_doubted = True
            return answer
        push.is_back = False
        if missing:
            self._send_all_again(push)
        else:
            push.named.update(dict.fromkeys(found))
        return answer

    async def _ask_for_oldest(self, push: Push, event_id: str) -> Answer:
        answer = await self._asking.has_event(push.destination, event_id)
        self._metrics.asked(answer.kind.name.lower())
        if answer.kind not in _PASSES:
            push.is_back = push.asked.is_doubted = False
        if answer.kind is AnswerKind.LACKS:
            self._send_all_again(push)
        return answer

    def _send_all_again(self, push: Push) -> None:
        logger.info("%s lacks what it had of %s", push.destination, push.room_id)
        push.restart_in_full()
        self._update(push)

    async def tell_outliers(self, push: Push) -> Answer | None:
        """Are there outliers among what the newcomer named? Then all is sent once more. Gives its
        answer, None if there is nothing to ask for."""
        named = list(push.named)[:MOST_ASKED_FOR]
        places = await self._asking.places(named)
        asked = {one for place in places.values() for one in place.referring} - set(named)
        # What no event refers to is no outlier.
        asked.update(event_id for event_id, place in places.items() if not place.referring)
        if not asked:
            _forget(push, named)
            return None
        answer = await self.ask_for(push, sorted(asked)[:MOST_ASKED_FOR], 2 * len(named))
        if answer.kind in _PASSES and push.asked.in_vain < _MOST_IN_VAIN:
            return answer
        there = set(answer.event_ids)
        left = [event_id for event_id in named if event_id not in there]
        if answer.down_to and 0 < 2 * len(left) <= len(named):
            # The others are asked for again, as long as they become fewer by half.
            _forget(push, there.intersection(named))
            return answer
        _forget(push, named)
        if any(_is_outlier(places.get(event_id), answer, there) for event_id in left):
            logger.info("%s has only fetched events of %s", push.destination, push.room_id)
            push.note_outlier()
        return answer


def _is_told(place: Place | None, answer: Answer) -> bool:
    """Would the answer have an event of this place that can be reached?"""
    return place is not None and place.depth > answer.down_to


def _is_outlier(place: Place | None, answer: Answer, there: Container[str]) -> bool:
    """Is an event that refers to it in the answer, and the event itself, which was named, not?"""
    refers = place is not None and any(event_id in there for event_id in place.referring)
    return refers and _is_told(place, answer)


def _forget(push: Push, event_ids: Iterable[str]) -> None:
    for event_id in event_ids:
        push.named.pop(event_id, None)
