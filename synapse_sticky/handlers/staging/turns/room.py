"""Which of the PDUs that are staged for a room is processed next (D7).

The origins take turns, by who has waited longest. An origin's turn is one PDU:

1. Its first PDU none of whose prev_events waits here. They are persisted, or Synapse fetches them.
2. Else its first or its last PDU waits for few others: one of these.
3. Else, if so much is staged that plain Synapse would prune what is in between, its last PDU is
   processed now. Synapse fetches the events just before it from its server, and the state before
   these. This is done as often as plain Synapse would do it, and not more often.
4. Else its first or its last PDU waits for less than Synapse prunes: one of these.

One origin's PDUs have the order of when they were received, then of their depth, then of their IDs.

Pure: no clock, no database. A choice costs by the number of origins, not by that of PDUs. Only to
count the tips all are gone through, once for each 100 that were received.
"""

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Collection, Iterable, Iterator

import attr

PRUNE_FROM = 100
"""How many PDUs are staged for a room before Synapse prunes."""

_FEW = 20
"""For so many PDUs one waits without a gap: as many as a PDU may have prev_events."""

_MOST_LOOKED_INTO = 8
"""Of how many origins whose PDUs all wait for others it is found out, in one choice, for what."""

Key = tuple[str, str]
"""The origin and the event ID: the same event may be staged of several origins."""

Turn = tuple[int, int]
"""When an origin had its last turn, in ms since the epoch, and the number of that turn."""

_FAR_MS = 2**62

_Place = tuple[int, int, str]
_NEVER: Turn = (0, 0)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class WaitingPdu:
    """A staged PDU, as far as its turn depends on it.

    prev_event_ids: a PDU with so many that Synapse refuses it can have none here.
    until_ms: when it stops being sticky; 0 if it is not sticky.
    """

    origin: str
    event_id: str
    received_ts_ms: int
    depth: int
    prev_event_ids: tuple[str, ...]
    until_ms: int = 0

    @property
    def key(self) -> Key:
        return self.origin, self.event_id

    @property
    def place(self) -> _Place:
        """Its place among the PDUs of its origin."""
        return self.received_ts_ms, self.depth, self.event_id


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Persisted:
    """An event of the room: its place in the stream, its sender's server, and when it was
    persisted, in ms since the epoch."""

    stream_ordering: int
    server: str
    at_ms: int


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Choice:
    """What is processed next.

    turn_of: the origin whose turn it is: that of the PDU, or of one that waits for the PDU.
    """

    pdu: WaitingPdu
    turn_of: str


class StagedRoom:
    """The staged PDUs of one room.

    learnt_up_to: the place in the stream of the last event that turns were learnt from.
    """

    def __init__(self) -> None:
        self._pdus: dict[Key, WaitingPdu] = {}
        self._origins_of: dict[str, set[str]] = {}
        self._places: dict[str, list[_Place]] = {}
        # By prev_event, staged or not: the PDUs that name it.
        self._dependents: dict[str, set[Key]] = {}
        # By origin: those that wait for no other, and some that came to wait since.
        self._ready: dict[str, list[_Place]] = {}
        self._in_ready: set[Key] = set()
        self._persisted: set[str] = set()
        self._plain: set[Key] = set()
        self._first_until_ms = _FAR_MS
        self._turns: dict[str, Turn] = {}
        self._number = 0
        self._now_ms = 0
        self.learnt_up_to = 0
        # Up to when PDUs count as pruned by plain Synapse, and how many gaps it would have left.
        self._cut_ms = -1
        self._gaps_left = 0

    def __len__(self) -> int:
        return len(self._pdus)

    def __contains__(self, key: Key) -> bool:
        return key in self._pdus

    def staged(self) -> set[Key]:
        """All PDUs that are staged, as far as it is known."""
        return set(self._pdus)

    def last_received_ms(self) -> int:
        """When the last of them was received, in ms since the epoch; 0 if there is none."""
        return max((places[-1][0] for places in self._places.values()), default=0)

    def number_of_origins(self) -> int:
        """How many take turns."""
        return len(self._places)

    def may_be_pruned(self, now_ms: int) -> bool:
        """Could there be a PDU that is not sticky, or not any more, and that others refer to?"""
        return len(self._pdus) >= PRUNE_FROM and (
            self._first_until_ms <= now_ms
            or any(event_id in self._dependents for _, event_id in tuple(self._plain))
        )

    # What is staged

    def add(self, pdu: WaitingPdu) -> None:
        """One that is staged; it may be known already."""
        if pdu.key in self._pdus:
            return
        self._pdus[pdu.key] = pdu
        self._origins_of.setdefault(pdu.event_id, set()).add(pdu.origin)
        insort(self._places.setdefault(pdu.origin, []), pdu.place)
        for prev_event_id in pdu.prev_event_ids:
            self._dependents.setdefault(prev_event_id, set()).add(pdu.key)
        if pdu.until_ms:
            self._first_until_ms = min(self._first_until_ms, pdu.until_ms)
        else:
            self._plain.add(pdu.key)
        self._note_if_ready(pdu)

    def remove(self, key: Key) -> None:
        """One that is staged no more; it need not be known."""
        pdu = self._pdus.pop(key, None)
        if pdu is None:
            return
        places = self._places[pdu.origin]
        del places[bisect_left(places, pdu.place)]
        if not places:
            del self._places[pdu.origin]
            self._ready.pop(pdu.origin, None)
        self._in_ready.discard(key)
        self._plain.discard(key)
        for prev_event_id in pdu.prev_event_ids:
            dependents = self._dependents.get(prev_event_id, set())
            dependents.discard(key)
            if not dependents:
                self._dependents.pop(prev_event_id, None)
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

    def had_turn(self, origin: str, at_ms: int) -> None:
        """The origin goes behind all others that wait then."""
        self._number += 1
        self._turns[origin] = (max(at_ms, self._turns.get(origin, _NEVER)[0]), self._number)

    def learn_turns(self, persisted: Iterable[Persisted], now_ms: int) -> None:
        """Events that were persisted, by this process or another, in the order of the stream."""
        for event in persisted:
            self.learnt_up_to = max(self.learnt_up_to, event.stream_ordering)
            at_ms = min(event.at_ms, now_ms)
            if at_ms > self._turns.get(event.server, _NEVER)[0]:
                self.had_turn(event.server, at_ms)

    def _forget_turns(self) -> None:
        # Of those who have nothing staged; they would be the first anyway when they have.
        if len(self._turns) > 2 * len(self._places) + 100:
            self._turns = {o: turn for o, turn in self._turns.items() if o in self._places}

    def _waits_since(self, origin: str) -> tuple[int, int, _Place]:
        first = self._places[origin][0]
        received_ms = min(first[0], self._now_ms)
        at_ms, number = self._turns.get(origin, _NEVER)
        # An origin that comes now does not go in front of those that wait already.
        return max(at_ms, received_ms), number, first

    def choose(
        self, now_ms: int, persisted: Callable[[Collection[str]], Collection[str]]
    ) -> Choice | None:
        """What is processed next; None if nothing is staged.

        Args:
            persisted: tells which of these event IDs, at most 101, are persisted.
        """
        if not self._pdus:
            return None
        self._forget_turns()
        if now_ms < self._now_ms:
            # A clock that was set back keeps no origin from its turns.
            self._turns = {o: (min(ms, now_ms), n) for o, (ms, n) in self._turns.items()}
        self._now_ms = now_ms
        looked_into = 0
        for origin in sorted(self._places, key=self._waits_since):
            choice = self._first_ready(origin)
            if choice is None and looked_into < _MOST_LOOKED_INTO:
                looked_into += 1
                choice = self._instead(origin, persisted)
                if choice is None:
                    # It waits for PDUs that have their own turns.
                    self.had_turn(origin, now_ms)
            if choice is not None:
                return choice
        # Event IDs of the first room versions are chosen freely: they may name each other.
        place, origin = min((places[0], origin) for origin, places in self._places.items())
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
            if self._received_after(self._cut_ms) < PRUNE_FROM:
                return False
            self._cut_ms = self.last_received_ms()
            self._gaps_left = self._number_of_tips()
        self._gaps_left -= 1
        return True

    def _received_after(self, ms: int) -> int:
        return sum(
            len(places) - bisect_right(places, ms, key=lambda place: place[0])
            for places in self._places.values()
        )

    def _number_of_tips(self) -> int:
        """How many PDUs wait for others, and none waits for them; at least one."""
        return max(
            1,
            sum(
                pdu.event_id not in self._dependents and self._waits(pdu)
                for pdu in self._pdus.values()
            ),
        )
