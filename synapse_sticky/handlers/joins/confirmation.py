"""Asks a newcomer whether it has what it acknowledged (P7).

A plain Synapse may prune from its staging area what it acknowledged.
"""

from collections.abc import Callable
from enum import Enum
from typing import Protocol

from synapse_sticky.handlers.joins.push import CONFIRM_PATIENCE_MS, Push, Sent
from synapse_sticky.homeserver import Homeserver

_MIN_MS = 100
_MAX_MS = 5_000
_REFUSALS_TO_BELIEVE = 3


class Possession(Enum):
    """A remote server's answer to "do you have this event?"."""

    HAS = "has"
    LACKS = "lacks"
    REFUSES = "refuses to say"
    UNREACHABLE = "unreachable"


class Asking(Protocol):
    """Asking other servers for events."""

    async def has_event(self, destination: str, event_id: str) -> Possession:
        """Asks the destination for the event (federation ``/event``)."""


class Confirmation:
    """Asks for the acknowledged events of a push, oldest first, until the newcomer has all."""

    def __init__(
        self,
        homeserver: Homeserver,
        federation: Asking,
        is_current: Callable[[Push], bool],
        *,
        update: Callable[[Push], None],
        on_progress: Callable[[Push], None],
        on_end: Callable[[Push], None],
    ) -> None:
        """
        Args:
            is_current: is the push still of interest?
            update: has a push take in the present events of its room.
            on_progress: there may be something to send.
            on_end: nothing is left to be asked for.
        """
        self._homeserver = homeserver
        self._federation = federation
        self._is_current = is_current
        self._update = update
        self._on_progress = on_progress
        self._on_end = on_end

    def begin(self, push: Push) -> None:
        """Asks in the background, unless that is under way for this push."""
        if not push.is_confirming:
            push.is_confirming = True
            self._homeserver.in_background("confirm", self._confirm, push)

    async def _confirm(self, push: Push) -> None:
        delay_ms = _MIN_MS
        try:
            # A newcomer acknowledges an event before it processes it.
            await self._homeserver.sleep_ms(delay_ms)
            while self._is_current(push) and (waiting := push.unconfirmed()):
                if await self._confirm_one(push, waiting):
                    delay_ms = _MIN_MS
                    if push.worth_sending(self._homeserver.now_ms()):
                        self._on_progress(push)
                    continue
                await self._homeserver.sleep_ms(delay_ms)
                delay_ms = min(delay_ms * 2, _MAX_MS)
                self._update(push)
        finally:
            push.is_confirming = False
            self._on_end(push)

    async def _confirm_one(self, push: Push, waiting: list[Sent]) -> bool:
        """Asks for the oldest of these events. Is it clear now whether the newcomer has it?"""
        if push.is_blocked:
            return False  # the newcomer tells nothing to a server that is not in the room
        oldest, newest = waiting[0], waiting[-1]
        answer = await self._federation.has_event(push.destination, oldest.event_id)
        if answer is Possession.REFUSES:
            oldest.refusal_count += 1
            # No answer will come: the acknowledgement has to do.
            if oldest.refusal_count >= _REFUSALS_TO_BELIEVE:
                answer = Possession.HAS
        if answer is Possession.HAS:
            push.confirm(oldest.event_id, self._homeserver.now_ms())
            return True
        if answer is Possession.UNREACHABLE:
            push.suspect_loss()
        if answer is not Possession.LACKS:
            return False
        if newest is not oldest and (
            await self._federation.has_event(push.destination, newest.event_id) is Possession.HAS
        ):
            push.confirm(newest.event_id, self._homeserver.now_ms())
        # A newcomer processes staged events in order: if it has a later one, it pruned this one.
        # One such answer is no proof: events that arrived together are processed in any order.
        oldest.overtaken_count += push.is_overtaken(oldest)
        now_ms = self._homeserver.now_ms()
        waited_ms = now_ms - (oldest.acknowledged_ms or now_ms)
        if oldest.overtaken_count >= 2 or waited_ms > CONFIRM_PATIENCE_MS:
            push.mark_lost(oldest, now_ms)
            return True
        return False
