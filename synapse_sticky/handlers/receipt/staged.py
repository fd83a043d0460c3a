"""How many unexpired sticky PDUs of a server are staged, and in which rooms (L6, H3).

A check reads a bounded number of rows, however many are staged:

1. Are there more than can matter? If not, nothing of the server is remembered.
2. The next page of the server's PDUs. All have their turns: other processes stage some, and some
   were staged before a restart. Sticky ones that this process stages itself, it knows without
   reading.
3. Where too many seem to be staged: are those that are known longest still there?

Each PDU is read once, as long as it is remembered. Nothing that has expired counts.
"""

import threading
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from typing import Protocol

import attr

from synapse_sticky.homeserver import Cursor
from synapse_sticky.homeserver.database import portions
from synapse_sticky.homeserver.spec import LONGEST_NAME

_FAR_MS = 2**62

_PAGE = 2_000
"""How many of an origin's PDUs are looked at in each check."""

_AT_ONCE = 500
"""So many event IDs are asked for in one statement."""

_MOST_VERIFIED = 1_000
"""In one check and room, without those that turn out to be gone."""

_MOST_KNOWN = 100_000
"""Of so many staged PDUs it is remembered whether they are sticky; about 30 MB."""

_MOVES_MS = 10_000
"""A room of which nothing was processed for so long may well hang."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class StickyPdu:
    """A PDU that is staged.

    until_ms: when it stops being sticky, in ms since the epoch; 0 if it is not sticky.
    """

    event_id: str
    room_id: str
    until_ms: int


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Excess:
    """By how much too many are staged, at least 1.

    ends_ms: when so many have expired, in ms since the epoch.
    is_moving: were some processed lately, as far as it is known?
    """

    number: int
    ends_ms: int
    is_moving: bool


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Page:
    """Some staged PDUs of a server.

    event_ids: without those that are longer than ``LONGEST_NAME``.
    last_event_id: that of the last one, however long; empty if there is none.
    number: how many there are, with those.
    """

    event_ids: Sequence[str]
    last_event_id: str
    number: int


class StagingArea(Protocol):
    """The PDUs of a server in the staging area, as part of one transaction."""

    def has_more_txn(self, txn: Cursor, origin: str, at_most: int) -> bool:
        """Are more PDUs of the origin staged than this, sticky or not?"""

    def page_txn(self, txn: Cursor, origin: str, after_event_id: str, most: int) -> Page:
        """So many of the origin's PDUs, in the database's order, after this one."""

    def pdus_txn(self, txn: Cursor, origin: str, event_ids: Sequence[str]) -> Sequence[StickyPdu]:
        """These PDUs of the origin, read as they were received; those that are staged."""

    def staged_txn(self, txn: Cursor, origin: str, event_ids: Sequence[str]) -> Collection[str]:
        """Those of the origin's PDUs that are staged."""


class _OfOrigin:
    """What is known of the staged PDUs of one origin; the room None stands for all rooms."""

    def __init__(self) -> None:
        self.after_event_id = ""
        self.counted = 0
        self._not_sticky: set[str] = set()
        self._sticky: dict[str, StickyPdu] = {}
        # By room: the event IDs, those known longest in front; and when they expire, in order.
        self._ids: dict[str | None, OrderedDict[str, None]] = {}
        self._ends: dict[str | None, list[tuple[int, str]]] = {}
        self._moved_ms: dict[str | None, int] = {}

    def __len__(self) -> int:
        return len(self._not_sticky) + len(self._sticky)

    def __contains__(self, event_id: str) -> bool:
        return event_id in self._sticky or event_id in self._not_sticky

    def add(self, pdu: StickyPdu, now_ms: int) -> None:
        if pdu.event_id in self:
            return
        if pdu.until_ms <= now_ms:
            self._not_sticky.add(pdu.event_id)
            return
        self._sticky[pdu.event_id] = pdu
        for room_id in (None, pdu.room_id):
            self._ids.setdefault(room_id, OrderedDict())[pdu.event_id] = None
            insort(self._ends.setdefault(room_id, []), (pdu.until_ms, pdu.event_id))
            self._moved_ms.setdefault(room_id, now_ms)

    def _remove(self, event_id: str) -> StickyPdu:
        pdu = self._sticky.pop(event_id)
        for room_id in (None, pdu.room_id):
            del self._ids[room_id][event_id]
            ends = self._ends[room_id]
            del ends[bisect_left(ends, (pdu.until_ms, event_id))]
            if not ends:
                del self._ids[room_id], self._ends[room_id], self._moved_ms[room_id]
        return pdu

    def expire(self, now_ms: int) -> None:
        """From now on those do not count that have expired."""
        ends = self._ends.get(None, [])
        for _, event_id in ends[: bisect_left(ends, (now_ms + 1, ""))]:
            self._remove(event_id)
            self._not_sticky.add(event_id)

    def known_longest(self, room_id: str | None, most: int) -> list[str]:
        return [*islice(self._ids.get(room_id, ()), most)]

    def verified(self, event_ids: Collection[str], staged: Collection[str], now_ms: int) -> None:
        """Of these only some are staged; they are verified again after all others."""
        for event_id in event_ids:
            if event_id not in self._sticky:
                continue
            if event_id in staged:
                for room_id in (None, self._sticky[event_id].room_id):
                    self._ids[room_id].move_to_end(event_id)
            else:
                pdu = self._remove(event_id)
                for room_id in (None, pdu.room_id):
                    if room_id in self._moved_ms:
                        self._moved_ms[room_id] = now_ms

    def number(self, room_id: str | None) -> int:
        """How many count."""
        return len(self._ends.get(room_id, ()))

    def excess(self, room_id: str | None, number: int, now_ms: int) -> Excess:
        ends = self._ends.get(room_id, [])
        ends_ms = ends[number - 1][0] if number <= len(ends) else _FAR_MS
        moved_ms = self._moved_ms.get(room_id, 0)
        return Excess(number, ends_ms, 0 <= now_ms - moved_ms < _MOVES_MS)

    def forget_others(self) -> None:
        """Forgets those that do not count. Each is read once more."""
        self._not_sticky.clear()


def _is_never_persisted(event_id: str) -> bool:
    """Is the ID too long? Then the PDU counts as little as one that is not sticky, and it is not
    remembered: that would take its sender's choice of memory."""
    return len(event_id) > LONGEST_NAME


class StagedCounts:
    """Counts the staged PDUs of all origins. It is asked in several threads."""

    def __init__(self, area: StagingArea, now_ms: Callable[[], int]) -> None:
        """
        Args:
            now_ms: the time in ms since the epoch.
        """
        self._area = area
        self._now_ms = now_ms
        # The most recently used last. Only those with more staged than could be ignored.
        self._origins: OrderedDict[str, _OfOrigin] = OrderedDict()
        self._known = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many PDUs are remembered."""
        return self._known

    def is_known(self, origin: str) -> bool:
        """Is anything remembered of the origin's PDUs?"""
        return origin in self._origins

    def staged(self, origin: str, pdu: StickyPdu) -> None:
        """This process has staged a PDU."""
        # It may be processed and gone before any check looks.
        if pdu.until_ms <= self._now_ms() or _is_never_persisted(pdu.event_id):
            return
        with self._lock:
            if (of := self._origins.get(origin)) is not None:
                of.add(pdu, self._now_ms())
                self._forget(origin, of)

    def are_few_txn(self, txn: Cursor, origin: str, at_most: int) -> bool:
        """Are at most so many PDUs of the origin staged, sticky or not? Then nothing of it is
        remembered."""
        if self._area.has_more_txn(txn, origin, at_most):
            return False
        with self._lock:
            if (gone := self._origins.pop(origin, None)) is not None:
                self._known -= gone.counted
        return True

    def look_txn(self, txn: Cursor, origin: str, at_most: int) -> bool:
        """Are more than ``at_most`` PDUs of the origin staged, sticky or not? Then this learns of
        some that other processes have staged."""
        if self.are_few_txn(txn, origin, at_most):
            return False
        with self._lock:
            of = self._origins.setdefault(origin, _OfOrigin())
            self._origins.move_to_end(origin)
        page = self._area.page_txn(txn, origin, of.after_event_id, _PAGE)
        event_ids, last = [*page.event_ids], page.last_event_id
        if of.after_event_id and (left := _PAGE - page.number):
            page = self._area.page_txn(txn, origin, "", left)
            event_ids, last = [*event_ids, *page.event_ids], page.last_event_id or last
        unknown = [event_id for event_id in event_ids if event_id not in of]
        for portion in portions(unknown, _AT_ONCE):
            pdus = self._area.pdus_txn(txn, origin, portion)
            with self._lock:
                for pdu in pdus:
                    of.add(pdu, self._now_ms())
        with self._lock:
            of.after_event_id = last
            of.expire(self._now_ms())
            self._forget(origin, of)
        return True

    def _forget(self, origin: str, of: _OfOrigin) -> None:
        """Forgets others if too many are known; if that is not enough, some of this one."""
        if self._origins.get(origin) is not of:
            return  # another thread has forgotten it
        self._origins.move_to_end(origin)
        self._count(of)
        while self._known > _MOST_KNOWN and len(self._origins) > 1:
            self._known -= self._origins.popitem(last=False)[1].counted
        if self._known > _MOST_KNOWN:
            of.forget_others()
            self._count(of)

    def _count(self, of: _OfOrigin) -> None:
        self._known += len(of) - of.counted
        of.counted = len(of)

    def excess_txn(
        self, txn: Cursor, origin: str, room_id: str | None, fewer_than: int
    ) -> Excess | None:
        """By how much too many unexpired sticky PDUs of the origin are staged; None if they are
        not. It is asked after ``look_txn``.

        Args:
            room_id: in this room; None for all of them.
            fewer_than: so many are too many.
        """
        of = self._origins.get(origin)
        if of is None:
            return None
        left = min(of.number(room_id), _MOST_VERIFIED)
        while of.number(room_id) >= fewer_than and left > 0:
            event_ids = of.known_longest(room_id, min(left, _AT_ONCE))
            staged = self._area.staged_txn(txn, origin, event_ids)
            left -= len(staged)
            with self._lock:
                of.verified(event_ids, staged, self._now_ms())
                self._forget(origin, of)
        number = of.number(room_id) - fewer_than + 1
        return of.excess(room_id, number, self._now_ms()) if number > 0 else None
