"""Who sends a room's dummy events, and which rooms are left out as nobody here can (F2, H2)."""

from collections.abc import Sequence
from typing import Protocol

import attr

from synapse_sticky.homeserver import Homeserver
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_HOUR_MS = 3_600_000
_MAX_ROOMS = 40_000
"""More than can be left out within the hour: each of them has its hour."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Able:
    """The local members of a room who have the power to send a dummy event.

    users: their IDs, most power first.
    basis: the same number as long as neither they nor the room's power levels change.
    """

    users: Sequence[str]
    basis: int


class DummyEvents(Protocol):
    """What Synapse does with dummy events."""

    async def able(self, room_id: str) -> Able:
        """Who may send one, as the room's power levels have it. The number of queries does not grow
        with the members."""

    async def send(self, room_id: str, user_id: str) -> str | None:
        """Sends one that refers to ten forward extremities. Makes one event, no more.

        Returns:
            Why it was refused; None if it was sent.

        Raises:
            Exception: it failed for a cause that passes, such as the database's.
        """

    def left_out_since_ms(self, room_id: str) -> int | None:
        """Since when Synapse leaves the room out, in ms since the epoch; None if it does not."""

    def leave_out(self, room_id: str) -> None:
        """Has Synapse leave the room out from now on, as it does where it finds nobody."""

    def leave_in(self, room_id: str) -> None:
        """Has Synapse look at the room again."""


@attr.s(auto_attribs=True, slots=True)
class _Verdict:
    """That nobody can send to a room.

    until_ms: when that is tried again; 0 if somebody can, though not all with the power can.
    basis: see ``Able``; None if it is not known yet.
    refusals: how many events were refused; each time it is another member's turn.
    is_doubted: whether the room's state has changed since.
    is_told: whether Synapse leaves the room out by this verdict.
    """

    until_ms: int = 0
    basis: int | None = None
    refusals: int = 0
    is_doubted: bool = False
    is_told: bool = False


class Senders:
    """Sends dummy events, each as one local member who has the power to.

    A room where that is not possible is left out for an hour, whatever the cause; or until its
    power levels change, or who of its local members has the power.
    """

    def __init__(self, homeserver: Homeserver, dummy_events: DummyEvents) -> None:
        self._now_ms = homeserver.steady_ms
        self._metrics = homeserver.metrics
        self._dummy_events = dummy_events
        self._verdicts: dict[str, _Verdict] = {}

    def is_left_out(self, room_id: str) -> bool:
        """Is there nothing to try in the room now? Asks nobody."""
        verdict = self._verdicts.get(room_id)
        return verdict is not None and not verdict.is_doubted and self._now_ms() < verdict.until_ms

    def has_failed(self, room_id: str) -> bool:
        """Could nobody send to the room, or not all with the power, when that was last tried?"""
        return room_id in self._verdicts

    def doubt(self, room_id: str) -> bool:
        """The room's state has changed. Gives whether the room was left out: it has to be looked at
        again."""
        verdict = self._verdicts.get(room_id)
        if verdict is None:
            return False
        verdict.is_doubted = True
        return True

    async def send(self, room_id: str) -> bool:
        """Sends a dummy event to the room. If none can be sent, the room is left out."""
        if self.is_left_out(room_id):
            return False
        # It is there before anything is read: a change from here on is not missed.
        verdict = self._verdicts.pop(room_id, None) or _Verdict()
        verdict.is_doubted = False
        self._verdicts[room_id] = verdict
        try:
            is_sent = await self._send(room_id, verdict)
        except Exception:
            # That says nothing of the room.
            verdict.is_doubted = True
            if verdict.until_ms == 0:
                self._forget(room_id)
            raise
        if is_sent:
            # Whoever had it left out, it is wrong by now.
            self._dummy_events.leave_in(room_id)
            verdict.until_ms, verdict.is_told = 0, False
            if verdict.refusals == 0:
                self._forget(room_id)
        if len(self._verdicts) > _MAX_ROOMS:
            self._forget(next(iter(self._verdicts)))
        return is_sent

    async def _send(self, room_id: str, verdict: _Verdict) -> bool:
        able = await self._dummy_events.able(room_id)
        now_ms = self._now_ms()
        until_ms = verdict.until_ms
        if (since_ms := self._dummy_events.left_out_since_ms(room_id)) is not None:
            until_ms = max(until_ms, since_ms + _HOUR_MS)
        # A room that Synapse has tried by itself is as good as tried here.
        if now_ms < until_ms and verdict.basis in (None, able.basis):
            verdict.until_ms, verdict.basis = until_ms, able.basis
            return False
        if able.users:
            user_id = able.users[verdict.refusals % len(able.users)]
            refusal = await self._dummy_events.send(room_id, user_id)
            if refusal is None:
                return True
            verdict.refusals += 1
            logger.info(
                "A dummy event of %s to %s was refused, left out for an hour: %s",
                *(user_id, room_id, refusal),
            )
        else:
            logger.info("Nobody here can send a dummy event to %s, left out for an hour", room_id)
        verdict.until_ms, verdict.basis = now_ms + _HOUR_MS, able.basis
        self._metrics.left_out()
        # Of several, Synapse may find one who can: a rule of its operator's may be about users.
        if len(able.users) <= 1:
            verdict.is_told = True
            self._dummy_events.leave_out(room_id)
        return False

    def _forget(self, room_id: str) -> None:
        if self._verdicts.pop(room_id).is_told:
            self._dummy_events.leave_in(room_id)
