"""Finds out whether a newcomer has what it acknowledged (P7).

A plain Synapse that has a hundred PDUs of a room staged prunes those that others reference, and
leaves the tips (L3). So the newcomer is asked for referenced events only, for many at once, and
never for the last one: for that its acknowledgement suffices.
"""

from collections.abc import Awaitable, Callable

from synapse_sticky._core import MAX_STICKY_DURATION_MS
from synapse_sticky.backoff import Backoff
from synapse_sticky.handlers.joins.confirmation.asking import Answer, AnswerKind, Asked, Asking
from synapse_sticky.handlers.joins.confirmation.copies import (
    LEAST_LIMIT,
    MOST_ASKED_FOR,
    Copies,
)
from synapse_sticky.handlers.joins.confirmation.questions import APART_MS, Questions
from synapse_sticky.handlers.joins.push import Push
from synapse_sticky.handlers.joins.sent import PACE_MS, PATIENCE_MS, Sent
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.logs import bounded

logger = bounded(__name__)

SOON_MS = 500
"""When a newcomer is asked whether half of the window is free: it is time for the next events."""

LATER_MS = 2_000
"""When it is asked where nothing waits for the answer."""

_IN_VAIN = Backoff(SOON_MS, 30_000)
_IN_VAIN_AND_NOTHING_WAITS = Backoff(LATER_MS, 60_000)
_REFUSALS_TO_BELIEVE = 3
_MOST_BELIEVED = 10_000
_UNASKED_MS = 60_000
"""A destination that waited in line for too long is asked nothing for this long. Meanwhile its
acknowledgements suffice."""


class Confirmation:
    """Asks for the acknowledged events of the pushes, a few destinations and rooms at a time."""

    def __init__(
        self,
        homeserver: Homeserver,
        asking: Asking,
        *,
        is_on: bool,
        find: Callable[[str, str], Push | None],
        retry_at_ms: Callable[[str], Awaitable[int]],
        servers: Callable[[str], int],
        done: Callable[[Push, int], list[str]],
        update: Callable[[Push], None],
        on_progress: Callable[[Push], None],
        on_end: Callable[[Push], None],
    ) -> None:
        """
        Args:
            is_on: whether newcomers are asked at all; else all acknowledgements are believed.
            find: the present push to a destination of a room.
            retry_at_ms: when the destination's back-off ends (ms since the epoch).
            servers: how many servers have sticky events in the room.
            done: the last own events that a push is done with, at most so many, ascending.
            update: has a push take in the present events of its room.
            on_progress: there may be something to send.
            on_end: nothing is left to be asked for.
        """
        self._homeserver = homeserver
        self._asking = asking
        self._metrics = homeserver.metrics
        self._is_on = is_on
        self._find = find
        self._retry_at_ms = retry_at_ms
        self._update = update
        self._on_progress = on_progress
        self._on_end = on_end
        self._questions = Questions(
            homeserver,
            homeserver.metrics.timed("joins", "ask", self._ask),
            is_believed=self._is_believed,
            on_overdue=self._note_overdue,
        )
        self._copies = Copies(homeserver, asking, servers=servers, done=done, update=update)
        self._silent: dict[str, int] = {}
        self._overdue: dict[str, int] = {}
        """Until when a destination's acknowledgements suffice (ms of the steady time). One in
        ``_silent`` does not say what it has; one in ``_overdue`` waited in line for too long."""

    def begin(self, push: Push, delay_ms: int | None = None) -> None:
        """Asks in the background, unless that is under way for this push.

        Args:
            delay_ms: when; by default that depends on whether events wait for the answer.
        """
        now_ms = self._homeserver.now_ms()
        if delay_ms is None:
            delay_ms = SOON_MS if push.has_waiting(now_ms) else LATER_MS
            if push.is_believed or self._is_believed(push.destination):
                delay_ms = PACE_MS
        push.asked.last_ms = push.asked.last_ms or now_ms
        self._questions.add(push.destination, push.room_id, delay_ms)

    def reachable(self, destination: str) -> None:
        """The destination can be reached: it may be asked."""
        self._questions.allow(destination)

    def hasten(self, push: Push) -> None:
        """Asks soon, if that is under way for this push: what made it wait may be over."""
        push.asked.in_vain = 0
        self._questions.hasten(push.destination, push.room_id, SOON_MS)

    async def _ask(self, destination: str, room_id: str) -> int | None:
        push = self._find(destination, room_id)
        if push is None:
            return None
        self._update(push)
        delay_ms = self._believe_one(push) if push.is_believed else await self._confirm(push)
        if self._find(destination, room_id) is not push:
            return None
        if push.worth_sending(self._homeserver.now_ms()):
            self._on_progress(push)
        if delay_ms is None:
            push.asked = Asked()
            self._on_end(push)
        return delay_ms

    async def _confirm(self, push: Push) -> int | None:
        """Asks once; gives when to ask again, None if nothing is left to be asked for."""
        if self._is_silent(push.destination):
            push.is_back = False
            return self._believe_all(push)
        if push.is_blocked:  # the newcomer tells nothing to a server that is not in the room
            return self._in_vain(push)
        retry_at_ms = await self._retry_at_ms(push.destination)
        if retry_at_ms > self._homeserver.now_ms():
            return self._cannot_reach(push, retry_at_ms)
        if self._is_overdue(push.destination):
            return self._believe_all(push)
        if push.is_back:
            return self._after(push, await self._copies.ask_who_is_back(push))
        return await self._ask_for_referenced(push)

    async def _ask_for_referenced(self, push: Push) -> int | None:
        waiting = push.unconfirmed()
        referenced = await self._asking.referenced([s.event_id for s in waiting]) if waiting else ()
        asked = [s for s in waiting if s.event_id in referenced and not push.is_last(s)]
        rest = [sent.event_id for sent in waiting if sent not in asked]
        now_ms = self._homeserver.now_ms()
        if push.named and (not asked or len(push.named) >= MOST_ASKED_FOR):
            return self._after(push, await self._copies.tell_outliers(push))
        if not asked:
            self._metrics.pushed("believed", push.mark_present(rest, now_ms))
            return None
        late = [s for s in asked if now_ms - s.patient_from_ms > PATIENCE_MS]
        if late and push.asked.is_doubted:
            return await self._ask_for_one(push, late)
        return await self._ask_for_many(push, asked, rest)

    async def _ask_for_many(self, push: Push, asked: list[Sent], rest: list[str]) -> int | None:
        """Asks for these events. For the rest, the acknowledgements suffice."""
        event_ids = [sent.event_id for sent in asked[:MOST_ASKED_FOR]]
        answer = await self._copies.ask_for(push, event_ids, len(event_ids))
        if answer.kind is not AnswerKind.SAYS:
            return self._without_answer(push, answer)
        now_ms = self._homeserver.now_ms()
        self._questions.reached(push.destination)
        self._metrics.pushed("believed", push.mark_present(rest, now_ms))
        named = set(answer.event_ids).intersection(event_ids)
        found = push.mark_present(named, now_ms, is_named=True)
        self._metrics.pushed("confirmed", found)
        left_ms = [
            sent.patient_from_ms + PATIENCE_MS - now_ms
            for sent in asked
            if sent.event_id not in named
        ]
        if not left_ms:
            return APART_MS if push.named else None
        push.asked.is_doubted = min(left_ms) < 0
        if push.asked.is_doubted:
            return APART_MS
        if not found or not push.has_waiting(now_ms):
            return max(min(self._in_vain(push), min(left_ms) + 1), APART_MS)
        took_ms = push.asked.note_taken(found, now_ms)
        push.asked.in_vain = push.asked.refusals = 0
        return min(max(int(took_ms * push.missing_for_half(now_ms)), APART_MS), 10 * SOON_MS)

    async def _ask_for_one(self, push: Push, late: list[Sent]) -> int | None:
        """Asks for the oldest of the events that the newcomer should have had for a long time."""
        answer = await self._asking.has_event(push.destination, late[0].event_id)
        self._metrics.asked(answer.kind.name.lower())
        now_ms = self._homeserver.now_ms()
        push.asked.is_doubted = False
        if answer.kind is AnswerKind.SAYS:
            # The newcomer has it, though its answer about many events left it out.
            push.asked.refusals += 1
            is_enough = push.asked.refusals >= _REFUSALS_TO_BELIEVE
            event_ids = [sent.event_id for sent in late[: None if is_enough else 1]]
            found = push.mark_present(event_ids, now_ms, is_named=True)
            self._metrics.pushed("confirmed", found)
        elif answer.kind is AnswerKind.LACKS:
            self._metrics.pushed("given_up", push.mark_lost(late, now_ms))
        else:
            return self._without_answer(push, answer)
        self._questions.reached(push.destination)
        return APART_MS

    # Without an answer

    def _after(self, push: Push, answer: Answer | None) -> int | None:
        if answer is None or answer.kind in {AnswerKind.SAYS, AnswerKind.LACKS}:
            self._questions.reached(push.destination)
            return APART_MS
        return self._without_answer(push, answer)

    def _without_answer(self, push: Push, answer: Answer) -> int | None:
        if answer.kind is AnswerKind.UNREACHABLE:
            return self._cannot_reach(push)
        if answer.kind in {AnswerKind.LIMITED, AnswerKind.BUSY}:
            self._questions.put_off(push.destination)
            return self._in_vain(push)
        self._questions.reached(push.destination)
        if answer.kind is AnswerKind.SILENT:
            self._note_silence(push.destination, answer.reason)
            push.is_back = False
            return self._believe_all(push)
        if answer.kind is AnswerKind.TOO_LARGE and push.asked.limit > LEAST_LIMIT:
            push.asked.limit = LEAST_LIMIT
            return APART_MS
        push.asked.refusals += 1
        if push.asked.refusals < _REFUSALS_TO_BELIEVE:
            return self._in_vain(push)
        # No answer will come: the acknowledgements suffice.
        push.is_back = False
        push.named.clear()
        believed = push.unconfirmed()
        for sent in believed:
            push.mark_delivered(sent.event_id)
        self._metrics.pushed("believed", len(believed))
        return None

    def _cannot_reach(self, push: Push, until_ms: int = 0) -> int:
        """Asks for nothing until the destination can be reached. It may have lost what it has
        acknowledged up to now."""
        self._questions.put_off(push.destination, until_ms)
        push.suspect_loss()
        for room_id in self._questions.rooms(push.destination):
            if (other := self._find(push.destination, room_id)) is not None:
                other.suspect_loss()
        return self._in_vain(push)

    def _in_vain(self, push: Push) -> int:
        push.asked.in_vain += 1
        waits = push.has_waiting(self._homeserver.now_ms())
        return (_IN_VAIN if waits else _IN_VAIN_AND_NOTHING_WAITS).after(push.asked.in_vain)

    def _note_silence(self, destination: str, reason: str) -> None:
        logger.warning(
            "%s does not say which events it has (%s): its acknowledgements are believed",
            destination,
            reason,
        )
        self._believe_for(self._silent, destination, MAX_STICKY_DURATION_MS)

    def _note_overdue(self, destination: str) -> None:
        logger.info(
            "Too many servers are to be asked what they have: the acknowledgements of %s are"
            " believed for now",
            destination,
        )
        self._believe_for(self._overdue, destination, _UNASKED_MS)

    def _believe_for(self, until_ms: dict[str, int], destination: str, duration_ms: int) -> None:
        until_ms.pop(destination, None)
        until_ms[destination] = self._homeserver.steady_ms() + duration_ms
        if len(until_ms) > _MOST_BELIEVED:
            del until_ms[next(iter(until_ms))]

    def _is_believed(self, destination: str) -> bool:
        """Is the destination asked nothing, as its acknowledgements suffice?"""
        return self._is_silent(destination) or self._is_overdue(destination)

    def _is_silent(self, destination: str) -> bool:
        return not self._is_on or self._silent.get(destination, 0) > self._homeserver.steady_ms()

    def _is_overdue(self, destination: str) -> bool:
        return self._overdue.get(destination, 0) > self._homeserver.steady_ms()

    def _believe_one(self, push: Push) -> int | None:
        now_ms = self._homeserver.now_ms()
        next_ms = self._believe(push, now_ms)
        return None if next_ms is None else max(next_ms - now_ms, APART_MS)

    def _believe_all(self, push: Push) -> int | None:
        """Believes the acknowledgements of all the destination's rooms: that takes no question."""
        rooms = self._questions.rooms(push.destination)
        others = [p for r in rooms if (p := self._find(push.destination, r)) and p is not push]
        now_ms = self._homeserver.now_ms()
        for other in others:
            self._believe(other, now_ms)
            if other.worth_sending(now_ms):
                self._on_progress(other)
        times_ms = [self._believe(push, now_ms)]
        if push.is_back:  # it is asked for once the destination is asked again
            left_ms = self._overdue.get(push.destination, 0) - self._homeserver.steady_ms()
            times_ms.append(now_ms + left_ms if left_ms > 0 else None)
        next_ms = min((ms for ms in times_ms if ms is not None), default=None)
        return None if next_ms is None else max(next_ms - now_ms, APART_MS)

    def _believe(self, push: Push, now_ms: int) -> int | None:
        """What was acknowledged is delivered, at the pace of a plain Synapse. Gives when the next
        will be (ms since the epoch); None if nothing is left."""
        push.named.clear()
        times = {s.event_id: (s.acknowledged_ms or 0) + s.pace_ms() for s in push.unconfirmed()}
        believed = [event_id for event_id, ms in times.items() if ms <= now_ms]
        for event_id in believed:
            push.mark_delivered(event_id)
        self._metrics.pushed("believed", len(believed))
        return min((ms for ms in times.values() if ms > now_ms), default=None)
