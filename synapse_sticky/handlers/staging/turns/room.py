"""Which of the PDUs that are staged for a room is processed next (D7).

The origins take turns, by who has waited longest. An origin's turn is one PDU:

1. Its first PDU none of whose prev_events waits here. They are persisted, or Synapse fetches them.
2. Else its first or its last PDU waits for few others: one of these.
3. Else, if so much is staged that plain Synapse would prune what is in between, its last PDU is
   processed now. Synapse fetches the events just before it from its server, and the state before
   these. This is done as often as plain Synapse would do it, and not more often.
4. Else its first or its last PDU waits for less than Synapse prunes: one of these.

One origin's PDUs have the order of when they were received, then of their depth, then of their IDs.

Pure: no clock, no database. A choice costs the same however many PDUs there are. Only to count the
tips all are gone through, once for each 100 that were received.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterator
from itertools import islice

import attr

from synapse_sticky.handlers.staging.turns.pdu import Key, WaitingPdu
from synapse_sticky.handlers.staging.turns.waiting import Place, WaitingOrigins

PRUNE_FROM = 100
"""How many PDUs are staged for a room before Synapse prunes."""

_FEW = 20
"""For so many PDUs one waits without a gap: as many as a PDU may have prev_events."""

_MOST_LOOKED_INTO = 8
"""Of how many origins whose PDUs all wait for others it is found out, in one choice, for what."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Choice:
    """What is processed next.

    turn_of: the origin whose turn it is: that of the PDU, or of one that waits for the PDU.
    """

    pdu: WaitingPdu
    turn_of: str


class StagedRoom:
    """The staged PDUs of one room.

    waiting: the origins that have some, and take turns.
    weight: that of all PDUs (``WaitingPdu.weight``).
    """

    def __init__(self) -> None:
        self.waiting = WaitingOrigins()
        self.weight = 0
        self._pdus: dict[Key, WaitingPdu] = {}
        self._origins_of: dict[str, set[str]] = {}
        self._places: dict[str, list[Place]] = {}
        # Those of all origins, in order, with the origin.
        self._received: list[tuple[Place, str]] = []
        # By prev_event, staged or not: the PDUs that name it.
        self._dependents: dict[str, set[Key]] = {}
        # By origin: those that wait for no other, and some that came to wait since.
        self._ready: dict[str, list[Place]] = {}
        self._in_ready: set[Key] = set()
        self._persisted: set[str] = set()
        # Those that are sticky, by when they expire; and of all others, those that some depend on.
        self._sticky: list[tuple[int, Key]] = []
        self._plain: set[Key] = set()
        self._prunable: dict[Key, None] = {}
        # Sticky ones that some depend on, and that were not counted yet.
        self._kept: set[Key] = set()
        # Up to when PDUs count as pruned by plain Synapse, and how many gaps it would have left.
        self._cut_ms = -1
        self._gaps_left = 0

    def __len__(self) -> int:
        return len(self._pdus)

    def __contains__(self, key: Key) -> bool:
        return key in self._pdus

    def received(self, from_ms: int, before_ms: int | None) -> list[Key]:
        """Those that were received in this time."""
        to = len(self._received) if before_ms is None else self._at(before_ms)
        return [(origin, place[2]) for place, origin in self._received[self._at(from_ms) : to]]

    def _at(self, ms: int) -> int:
        return bisect_left(self._received, ((ms, -1, ""), ""))

    def prunable(self, now_ms: int, most: int) -> list[Key]:
        """PDUs that are not sticky, or not any more, and that others refer to; so many at most.

        As Synapse does, this gives none before 100 are staged.
        """
        if len(self._pdus) < PRUNE_FROM:
            return []
        ended = self._sticky[: min(most, bisect_left(self._sticky, (now_ms + 1, ("", ""))))]
        del self._sticky[: len(ended)]
        for _, key in ended:
            self._plain.add(key)
            self._note_if_prunable(key)
        # After a clock was set back, some that had expired have not.
        some = islice(self._prunable, most)
        return [key for key in some if self._pdus[key].until_ms <= now_ms]

    def take_kept(self) -> int:
        """How many that are sticky plain Synapse would prune; each is counted once."""
        if len(self._pdus) < PRUNE_FROM:
            return 0
        count = len(self._kept)
        self._kept.clear()
        return count

    # What is staged

    def add(self, pdu: WaitingPdu) -> None:
        """One that is staged; it may be known already."""
        if pdu.key in self._pdus:
            return
        self._pdus[pdu.key] = pdu
        self.weight += pdu.weight
        self._origins_of.setdefault(pdu.event_id, set()).add(pdu.origin)
        insort(self._received, (pdu.place, pdu.origin))
        places = self._places.setdefault(pdu.origin, [])
        insort(places, pdu.place)
        self.waiting.set_first(pdu.origin, places[0])
        if pdu.until_ms:
            insort(self._sticky, (pdu.until_ms, pdu.key))
        else:
            self._plain.add(pdu.key)
        for prev_event_id in pdu.prev_event_ids:
            dependents = self._dependents.setdefault(prev_event_id, set())
            dependents.add(pdu.key)
            if len(dependents) == 1:
                for origin in self._origins_of.get(prev_event_id, ()):
                    self._note_if_prunable((origin, prev_event_id))
        self._note_if_prunable(pdu.key)
        self._note_if_ready(pdu)

    def remove(self, key: Key) -> None:
        """One that is staged no more; it need not be known."""
        pdu = self._pdus.pop(key, None)
        if pdu is None:
            return
        self.weight -= pdu.weight
        places = self._places[pdu.origin]
        del places[bisect_left(places, pdu.place)]
        del self._received[bisect_left(self._received, (pdu.place, pdu.origin))]
        self.waiting.set_first(pdu.origin, places[0] if places else None)
        if not places:
            del self._places[pdu.origin]
            self._ready.pop(pdu.origin, None)
        self._in_ready.discard(key)
        if key in self._plain:
            self._plain.remove(key)
        else:
            del self._sticky[bisect_left(self._sticky, (pdu.until_ms, key))]
        self._prunable.pop(key, None)
        self._kept.discard(key)
        for prev_event_id in pdu.prev_event_ids:
            dependents = self._dependents.get(prev_event_id, set())
            dependents.discard(key)
            if not dependents:
                self._dependents.pop(prev_event_id, None)
                for origin in self._origins_of.get(prev_event_id, ()):
                    self._prunable.pop((origin, prev_event_id), None)
        origins = self._origins_of[pdu.event_id]
        origins.discard(pdu.origin)
        if not origins:
            del self._origins_of[pdu.event_id]
            self._persisted.discard(pdu.event_id)
            self._note_dependents(pdu.event_id)

    def mark_persisted(self, event_ids: Collection[str]) -> None:
        """These are persisted, and some may be staged still: nothing waits for them."""
        for event_id in event_ids:
            if event_id in self._origins_of and event_id not in self._persisted:
                self._persisted.add(event_id)
                self._note_dependents(event_id)

    def _note_dependents(self, event_id: str) -> None:
        for key in self._dependents.get(event_id, ()):
            self._note_if_ready(self._pdus[key])

    def _note_if_prunable(self, key: Key) -> None:
        if key[1] not in self._dependents:
            return
        if key in self._plain:
            self._prunable[key] = None
        else:
            self._kept.add(key)

    def _note_if_ready(self, pdu: WaitingPdu) -> None:
        if pdu.key not in self._in_ready and not self._waits(pdu):
            self._in_ready.add(pdu.key)
            heapq.heappush(self._ready.setdefault(pdu.origin, []), pdu.place)

    def _waits(self, pdu: WaitingPdu) -> bool:
        return next(self._before(pdu), None) is not None

    def _before(self, pdu: WaitingPdu) -> Iterator[str]:
        """Those of its prev_events that are staged and not persisted."""
        for event_id in pdu.prev_event_ids:
            is_staged = event_id in self._origins_of and event_id != pdu.event_id
            if is_staged and event_id not in self._persisted:
                yield event_id

    # Turns

    def choose(
        self, now_ms: int, persisted: Callable[[Collection[str]], Collection[str]]
    ) -> Choice | None:
        """What is processed next; None if nothing is staged.

        Args:
            persisted: tells which of these event IDs, at most 101, are persisted.
        """
        if not self._pdus:
            return None
        self.waiting.set_time(now_ms)
        passed: list[str] = []
        choice = self._choose(passed, persisted)
        for origin in passed:
            # It waits for PDUs that have their own turns.
            self.waiting.had_turn(origin, now_ms)
        return choice

    def _choose(
        self, passed: list[str], persisted: Callable[[Collection[str]], Collection[str]]
    ) -> Choice:
        looked_into = 0
        for origin in self.waiting.in_order():
            choice = self._first_ready(origin)
            if choice is None and looked_into < _MOST_LOOKED_INTO:
                looked_into += 1
                choice = self._instead(origin, persisted)
                if choice is None:
                    passed.append(origin)
            if choice is not None:
                return choice
        # Event IDs of the first room versions are chosen freely: they may name each other.
        place, origin = self._received[0]
        return Choice(self._pdus[origin, place[2]], origin)

    def _first_ready(self, origin: str) -> Choice | None:
        ready = self._ready.get(origin, [])
        while ready:
            key = origin, ready[0][2]
            pdu = self._pdus.get(key)
            if pdu is not None and not self._waits(pdu):
                return Choice(pdu, origin)
            # What it waits for came after it. It is noted again when that is gone.
            heapq.heappop(ready)
            self._in_ready.discard(key)
        return None

    def _instead(
        self, origin: str, persisted: Callable[[Collection[str]], Collection[str]]
    ) -> Choice | None:
        """What an origin has of its turn, all of whose PDUs wait for others."""
        places = self._places[origin]
        ends = dict.fromkeys(self._pdus[origin, place[2]] for place in (places[0], places[-1]))
        waits_for: dict[WaitingPdu, list[str]] = {}
        for pdu in ends:
            # What Synapse fetched on the way to another PDU is persisted and still staged.
            self.mark_persisted(persisted(self._nearest(pdu)))
            waits_for[pdu] = self._nearest(pdu)
            if len(waits_for[pdu]) <= _FEW:
                return Choice(self._first_before(pdu, waits_for[pdu]), origin)
        if self._may_leave_gap(last := self._pdus[origin, places[-1][2]]):
            return Choice(last, origin)
        for pdu, nearest in waits_for.items():
            if len(nearest) <= PRUNE_FROM:
                return Choice(self._first_before(pdu, nearest), origin)
        return None

    def _first_before(self, pdu: WaitingPdu, nearest: Collection[str]) -> WaitingPdu:
        """Of a PDU and all that it waits for, the first that waits for nothing."""
        ready = [before for before in self._staged(nearest) if not self._waits(before)]
        return min(ready, key=lambda before: before.place, default=pdu)

    def _nearest(self, pdu: WaitingPdu) -> list[str]:
        """What it waits for, directly or not, the nearest first: at most one more than 100."""
        found = dict.fromkeys(self._before(pdu))
        queue = list(found)
        for event_id in queue:
            if len(queue) > PRUNE_FROM:
                break
            for before in self._staged([event_id]):
                for prev_event_id in self._before(before):
                    if prev_event_id not in found and prev_event_id != pdu.event_id:
                        found[prev_event_id] = None
                        queue.append(prev_event_id)
        return queue[: PRUNE_FROM + 1]

    def _staged(self, event_ids: Collection[str]) -> Iterator[WaitingPdu]:
        for event_id in event_ids:
            yield self._pdus[min(self._origins_of[event_id]), event_id]

    def _may_leave_gap(self, pdu: WaitingPdu) -> bool:
        """Would plain Synapse prune what is before the PDU, and so have to fetch the state?

        It prunes when 100 PDUs are staged, and has one gap for each that no other refers to.
        """
        if pdu.received_ts_ms > self._cut_ms or self._gaps_left == 0:
            if len(self._received) - self._at(self._cut_ms + 1) < PRUNE_FROM:
                return False
            self._cut_ms = self._received[-1][0][0]
            self._gaps_left = self._number_of_tips()
        self._gaps_left -= 1
        return True

    def _number_of_tips(self) -> int:
        """How many PDUs wait for others, and none waits for them; at least one."""
        return max(
            1,
            sum(
                pdu.event_id not in self._dependents and self._waits(pdu)
                for pdu in self._pdus.values()
            ),
        )
