"""How often the parked PDUs of one origin and room are tried, and how many at once (H1, H2, H4).

A round is a few PDUs that are staged together. Each that lacks something has its server asked for
it, while Synapse has the room's lock. So a round has two PDUs, and the next one waits, longer and
longer, and at least as long as the last one took. A round of which something is persisted tells
that the server answers: the next one has no delay, and twice as many PDUs.

What a server answers may lead to ever more events that are missing, and each costs time to look at.
If something is missing all the same after some rounds, the next ones are rare. All of these
together are no more than one in two seconds, by whoever they are caused: each server has the same
share, and each of its rooms has the same of that.

Pure: no clock. All times are of a clock that nobody sets.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence

import attr

from synapse_sticky.backoff import Backoff
from synapse_sticky.handlers.staging.parking.pdus import ScheduledPdu

ROUNDS = Backoff(1_000, 10_000, spread=0)
"""The delays between rounds of which nothing is persisted."""

LONGEST_DELAY_MS = 60_000
"""What takes long, or what a server has parked in many rooms, is tried this often at least, but for
rare rounds of many servers or rooms."""

_EACH_ROOM_MS = 500
"""A server that has PDUs parked in many rooms is asked about no more than two of them a second."""

_RARE_FROM = 10
"""After so many rounds in a row that left something missing, the next ones are rare."""

EACH_RARE_MS = 2_000
_SPREAD = Backoff(1_000, 1_000, spread=0.5)
_REMEMBERED_MS = 3_600_000
"""For so long it is remembered how many rounds left something missing, if nothing is parked now."""

_AT_ONCE = 2
_MOST_AT_ONCE = 16
_LOOK_AFTER_MS = 1_000
_MOST_PAIRS = 10_000
"""Twice as many as PDUs may be parked."""

Pair = tuple[str, str]
"""An origin, and a room."""


@attr.s(auto_attribs=True, slots=True)
class Pace:
    """Of one origin and room.

    failures: how many rounds in a row came to nothing, or could not begin.
    in_vain: after how many rounds in a row something was missing that Synapse had asked for.
    at_once: how many PDUs the next round has.
    under_way: what of the last round may not have been tried yet.
    next_ms: when the next round may begin.
    look_ms: when somebody is to look what has become of the last one; None if that is not needed.
    ended_ms: when the last round that came to nothing had ended.
    """

    failures: int = 0
    in_vain: int = 0
    at_once: int = _AT_ONCE
    under_way: frozenset[str] = frozenset()
    next_ms: int = 0
    look_ms: int | None = None
    ended_ms: int = 0
    _began_ms: int = 0
    _thousandths: int = 1_000
    _looks: int = 0
    _has_progress: bool = False
    _is_woken: bool = False
    _woken_ms: int = -LONGEST_DELAY_MS

    def may_begin(self, now_ms: int, share_ms: int = 0) -> bool:
        """May the next round begin?

        Args:
            share_ms: how far apart the rare rounds of this origin and room are at present.
        """
        return not self.under_way and now_ms >= self._may_begin_ms(share_ms)

    def _may_begin_ms(self, share_ms: int) -> int:
        if not self.is_rare:
            return self.next_ms
        # Give or take a half: else those that ended together would always be tried together.
        return max(self.next_ms, self.ended_ms + share_ms * self._thousandths // 1_000)

    def begin(self, event_ids: Collection[str], now_ms: int) -> None:
        """A round of these PDUs begins. If one is under way, these come to it."""
        if not self.under_way:
            self._began_ms = now_ms
            self._looks, self._has_progress = 0, False
        self.under_way |= frozenset(event_ids)
        self.look_ms = now_ms + _LOOK_AFTER_MS

    def goes_on(self, has_progress: bool, now_ms: int) -> None:
        """Not all of the round was tried yet. Was any PDU persisted meanwhile?"""
        self._has_progress |= has_progress
        self._looks = 0 if has_progress else self._looks + 1
        self.look_ms = now_ms + ROUNDS.after(self._looks + 1)

    @property
    def is_rare(self) -> bool:
        """Did so many rounds leave something missing that the next ones are rare?"""
        return self.in_vain >= _RARE_FROM

    def ended(self, has_progress: bool, rooms: int, now_ms: int, *, lacks: bool = True) -> bool:
        """All of the round was tried. Gives whether the server answers again.

        Args:
            has_progress: whether any PDU was persisted meanwhile.
            rooms: in how many rooms the origin has parked PDUs.
            lacks: whether a PDU of the round comes after events that are missing.
        """
        self.under_way = frozenset()
        if has_progress or self._has_progress:
            answers_again = self.failures > 1
            self.failures = self.in_vain = 0
            self.at_once = min(2 * self.at_once, _MOST_AT_ONCE)
            self.next_ms = now_ms
            self.look_ms = None
            return answers_again
        self.in_vain += lacks
        self.ended_ms, self._thousandths = now_ms, _SPREAD.after(1)
        self.pause(rooms, now_ms, now_ms - self._began_ms)
        # Synapse may go on with what it has fetched after it gave the PDU itself up.
        self.look_ms = min(self.next_ms, now_ms + _LOOK_AFTER_MS)
        is_woken, self._is_woken = self._is_woken, False
        if is_woken:
            self.wake(now_ms)
        return False

    def pause(self, rooms: int, now_ms: int, took_ms: int = 0) -> None:
        """The server does not answer now."""
        self.failures += 1
        self.at_once = _AT_ONCE
        delay_ms = max(ROUNDS.after(self.failures), rooms * _EACH_ROOM_MS, took_ms)
        self.next_ms = now_ms + min(delay_ms, LONGEST_DELAY_MS)
        self.look_ms = self.next_ms

    def look_again_ms(self, now_ms: int, share_ms: int) -> int:
        """After which delay to look whether something else has brought what is missing."""
        left_ms = self._may_begin_ms(share_ms) - now_ms if self.is_rare else 0
        return min(max(left_ms, ROUNDS.max_ms), LONGEST_DELAY_MS)

    def put_off(self, now_ms: int) -> None:
        """The server has enough to answer."""
        self.next_ms = now_ms + _LOOK_AFTER_MS

    def begins_nothing(self, now_ms: int, share_ms: int = 0) -> None:
        """Somebody has looked, and no round begins."""
        if not self.under_way:
            may_ms = self._may_begin_ms(share_ms)
            # Its share may be larger by then.
            self.look_ms = min(may_ms, now_ms + LONGEST_DELAY_MS) if now_ms < may_ms else None

    def wake(self, now_ms: int) -> None:
        """The server has answered something: the next round has no delay. Not too often, as that
        may be about other rooms; and not where it has answered for long, and in vain."""
        if self.is_rare or now_ms - self._woken_ms < ROUNDS.max_ms:
            return
        self._is_woken = bool(self.under_way)
        if not self._is_woken:
            self._woken_ms = now_ms
            self.next_ms = min(self.next_ms, now_ms)
            self.look_ms = now_ms


class Paces:
    """Those of all origins and rooms that have parked PDUs, as far as this process knows."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, Pace]] = {}
        # Those used last behind.
        self._pairs: OrderedDict[Pair, None] = OrderedDict()
        # By origin: the rooms with rare rounds, now or before.
        self._rare: dict[str, set[str]] = {}
        # Those that left something missing and have nothing parked now, the last ones behind.
        self._before: OrderedDict[Pair, Pace] = OrderedDict()

    def of(self, pair: Pair) -> Pace:
        """The pace of this origin and room."""
        origin, room_id = pair
        self._pairs[pair] = None
        self._pairs.move_to_end(pair)
        if len(self._pairs) > _MOST_PAIRS:
            self.forget(next(iter(self._pairs)))
        rooms = self._of.setdefault(origin, {})
        if room_id not in rooms:
            rooms[room_id] = self._before.pop(pair) if pair in self._before else Pace()
        return rooms[room_id]

    def _oldest_ended_ms(self) -> int:
        return next(iter(self._before.values())).ended_ms

    def note(self, pair: Pair) -> None:
        """The pace may have got rare, or not be any more."""
        self._note_rare(pair, is_rare=self._of[pair[0]][pair[1]].is_rare)

    def _note_rare(self, pair: Pair, *, is_rare: bool) -> None:
        origin, room_id = pair
        if is_rare:
            self._rare.setdefault(origin, set()).add(room_id)
        elif rare := self._rare.get(origin):
            rare.discard(room_id)
            if not rare:
                del self._rare[origin]

    def forget(self, pair: Pair) -> None:
        """Nothing of this origin and room is parked any more."""
        if pair in self._pairs:
            del self._pairs[pair]
            rooms = self._of[pair[0]]
            pace = rooms.pop(pair[1])
            if pace.in_vain:
                # Else it would be tried often again whenever what is parked has expired.
                pace.under_way, pace.look_ms = frozenset(), None
                self._before[pair] = pace
                if len(self._before) > _MOST_PAIRS:
                    self._note_rare(self._before.popitem(last=False)[0], is_rare=False)
            if not rooms:
                del self._of[pair[0]]

    def share_ms(self, origin: str, now_ms: int) -> int:
        """How far apart the rare rounds of one room of the origin are, if all have their share.

        Those of before count as well. Else a server would have a large share each time that what it
        has parked has expired, and is parked again.
        """
        while self._before and self._oldest_ended_ms() < now_ms - _REMEMBERED_MS:
            self._note_rare(self._before.popitem(last=False)[0], is_rare=False)
        return len(self._rare) * len(self._rare.get(origin, ())) * EACH_RARE_MS

    def rooms(self, origin: str) -> int:
        """In how many rooms the origin has parked PDUs."""
        return len(self._of.get(origin, ()))

    def under_way(self, origin: str) -> int:
        """In how many rooms a round of the origin is under way."""
        return sum(bool(pace.under_way) for pace in self._of.get(origin, {}).values())

    def wake(self, origin: str, now_ms: int) -> bool:
        """The origin answers. Gives whether anything waits for that."""
        paces = self._of.get(origin, {})
        for pace in paces.values():
            pace.wake(now_ms)
        return bool(paces)

    def due(self, now_ms: int, most: int) -> list[Pair]:
        """Where somebody is to look now, so many at most, the longest overdue first."""
        due = ((ms, pair) for pair, ms in self._looks() if ms <= now_ms)
        return [pair for _, pair in sorted(due)[:most]]

    def next_look_ms(self) -> int | None:
        """When somebody is to look next; None if nowhere."""
        return min((ms for _, ms in self._looks()), default=None)

    def _looks(self) -> Iterator[tuple[Pair, int]]:
        for origin, rooms in self._of.items():
            for room_id, pace in rooms.items():
                if pace.look_ms is not None:
                    yield (origin, room_id), pace.look_ms


def of_round(pdus: Sequence[ScheduledPdu], most: int) -> list[ScheduledPdu]:
    """So many of the PDUs for the next round.

    Args:
        pdus: those that were tried longest ago in front, and then those received first.

    As PDUs mostly form a chain, those in front are tried. What these lack may be nowhere: so one is
    the newest of the first half. Synapse fetches the ones before a PDU on the way to it.
    """
    chosen = [*pdus[: max(most - 1, 1)]]
    left = pdus[len(chosen) : max(len(chosen) + 1, len(pdus) // 2 + 1)]
    if left and most > 1:
        chosen.append(max(left, key=lambda pdu: pdu.received_ts_ms))
    return chosen
