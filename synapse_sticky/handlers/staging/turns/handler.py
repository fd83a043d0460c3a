"""The origins of the PDUs that are staged for a room take turns (D7).

Synapse processes the PDUs of a room one by one, first in, first out. So the PDUs of one server
stand in front of all that another server sends later. This module chooses instead, by the rules of
``room.py``.

What decides is in the database: the PDUs that are staged, and when the last events of each server
were persisted. So another process that goes on with the room, or this one after a restart, goes on
with the same turns. What this process knows of staged PDUs is remembered, so that each is read and
parsed once.

For each PDU that is processed a bounded number of rows is read, however many are staged.

What is held (``held.py``) is passed over.

Fails open: if it cannot be chosen, Synapse takes the PDU that was received first.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import attr

from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.turns.pdu import Key, WaitingPdu
from synapse_sticky.handlers.staging.turns.room import Choice, StagedRoom
from synapse_sticky.handlers.staging.turns.waiting import Persisted
from synapse_sticky.homeserver import Cursor, Homeserver

PAGE = 100
"""How many staged PDUs are read at once."""

_MOST_PAGES = 20
"""In one choice. More than a few are needed only where a process begins with a room."""

_OVERLAP_MS = 2_000
"""A PDU that is staged may become visible after others that were received later."""

_LOOK_AGAIN_AFTER_MS = 10_000
"""All IDs that are staged for a room are compared with what is known, as late as this, one page of
them for each PDU that is processed: another process may have processed some, and the clocks of two
machines may differ by more than that."""

_MOST_KNOWN = 20_000
"""How many staged PDUs are remembered, of all rooms; about 30 MB, and 280 MB if each has 20
prev_events of its own with the longest IDs. One whose own ID is longer counts for several. Of a
room with more of them the later ones take part when the first are processed."""

_MOST_EXCESS = 1_000
"""For so many more PDUs those of a room may count. Then no more of them are read for now."""

_MOST_ROOMS = 2_000
"""How many rooms with several staged PDUs are remembered. With more of them, each choice in a room
that was forgotten reads the room's PDUs anew."""

_MOST_GONE = 100
"""How many choices may turn out to be staged no more, until more is compared."""

_MOST_PRUNED = 250
"""How many are pruned at once. The next ones are when the next PDU was processed."""

_RECENT = 50
"""How many of a room's last events are looked at, where a process begins with a room. They say
whose turns there were."""


class Area(Protocol):
    """The staging area of inbound PDUs. All but ``choose_by`` is part of one transaction."""

    def choose_by(self, choose_txn: Callable[[Cursor, str], Key | None]) -> None:
        """From now on Synapse processes the PDU of a room next that this chooses.

        If it raises an error, Synapse goes by when the PDUs were received.
        """

    def first_txn(self, txn: Cursor, room_id: str) -> Sequence[Key]:
        """The first two PDUs of the room; to be asked while one of the room is chosen."""

    def page_txn(self, txn: Cursor, room_id: str, from_ms: int) -> Sequence[WaitingPdu]:
        """The first ``PAGE`` PDUs of the room that were received at this time or later."""

    def keys_txn(
        self, txn: Cursor, room_id: str, from_ms: int, to_ms: int, most: int
    ) -> Sequence[tuple[Key, int]]:
        """The same without what has to be parsed, and when each was received in ms, up to a time
        and a number."""

    def pdus_txn(self, txn: Cursor, room_id: str, keys: Collection[Key]) -> Sequence[WaitingPdu]:
        """These PDUs of the room, without those that are not staged."""

    def persisted_txn(self, txn: Cursor, event_ids: Collection[str]) -> set[str]:
        """Those of the events that Synapse does not fetch any more."""

    def last_persisted_txn(
        self, txn: Cursor, room_id: str, after: int, most: int
    ) -> Sequence[Persisted]:
        """The last events of the room after this place in the stream, at most so many, in order."""


@attr.s(auto_attribs=True, slots=True)
class _Known:
    """What this process knows of a room, and its last choice.

    up_to_ms: all that was received before this is known, but for what became visible late.
    compared_ms: when the last comparison began.
    compared_up_to_ms: what was received before this is compared; None if all is.
    counted: for how many PDUs those that it is known to have count.
    """

    room_id: str
    room: StagedRoom = attr.Factory(StagedRoom)
    lock: threading.Lock = attr.Factory(threading.Lock)
    up_to_ms: int = 0
    compared_ms: int = 0
    compared_up_to_ms: int | None = None
    counted: int = 0
    chosen: Choice | None = None
    chosen_ms: int = 0

    @property
    def is_heavy(self) -> bool:
        """Are its PDUs' IDs so long that it takes the memory of many more?"""
        return self.room.weight - len(self.room) > _MOST_EXCESS


class TurnsHandler:
    """Chooses the PDU of a room that Synapse processes next."""

    def __init__(self, homeserver: Homeserver, area: Area, held: Held) -> None:
        self._homeserver = homeserver
        self._area = area
        self._held = held
        # The most recently used ones last. Transactions run in several threads.
        self._rooms: OrderedDict[str, _Known] = OrderedDict()
        self._known = 0
        self._lock = threading.Lock()
        self._choose_among_txn = self._choose_txn

    def install(self) -> None:
        """Takes effect from the next PDU on."""
        timed = self._homeserver.metrics.timed_call
        self._choose_among_txn = timed("pruning", "turn", self._choose_txn)
        self._area.choose_by(self.choose_txn)
        self._held.is_heeded = True

    def take_prunable(self, room_id: str) -> list[Key]:
        """Some PDUs of the room that plain Synapse would prune and that are not sticky (L3). Waits
        for nothing.

        They take no turns any more. If they stay staged, the next comparison finds them. None if
        nothing is known of the room: the next choice learns of it.
        """
        known = self._rooms.get(room_id)
        if known is None or not known.lock.acquire(blocking=False):
            return []
        try:
            self._homeserver.metrics.kept_staged(known.room.take_kept())
            taken = known.room.prunable(self._homeserver.now_ms(), _MOST_PRUNED)
            for key in taken:
                known.room.remove(key)
            return taken
        finally:
            known.lock.release()

    def choose_txn(self, txn: Cursor, room_id: str) -> Key | None:
        """The origin and event ID of what is processed next; None if nothing is, but for what is
        held.

        The choice stands until that PDU is staged no more.
        """
        with self._lock:
            known = self._rooms.get(room_id)
            if known is not None:
                self._rooms.move_to_end(room_id)
        if known is None:
            # This is all that it takes where one PDU comes at a time.
            first = self._area.first_txn(txn, room_id)
            if len(first) <= 1:
                return first[0] if first and first[0] not in self._held else None
            known = self._remember(room_id)
        try:
            with known.lock:
                choice = self._choose_among_txn(txn, room_id, known)
                self._count(known)
        except Exception:
            # What is known may be what is wrong. The next choice reads all of it anew.
            self._forget(room_id, known)
            raise
        if choice is None and not self._held:
            self._forget(room_id, known)
        return None if choice is None else choice.pdu.key

    def _remember(self, room_id: str) -> _Known:
        with self._lock:
            known = self._rooms.setdefault(
                room_id, _Known(room_id, compared_ms=self._homeserver.now_ms())
            )
            self._rooms.move_to_end(room_id)
            while len(self._rooms) > _MOST_ROOMS:
                self._known -= self._rooms.popitem(last=False)[1].counted
            return known

    def _forget(self, room_id: str, known: _Known) -> None:
        with self._lock:
            if self._rooms.get(room_id) is known:
                del self._rooms[room_id]
                self._known -= known.counted

    def _count(self, known: _Known) -> None:
        with self._lock:
            if self._rooms.get(known.room_id) is known:
                self._known += known.room.weight - known.counted
                known.counted = known.room.weight

    def _choose_txn(self, txn: Cursor, room_id: str, known: _Known) -> Choice | None:
        now_ms = self._homeserver.now_ms()
        self._read_txn(txn, known, now_ms)
        if known.chosen is not None:
            if self._is_staged_txn(txn, room_id, known.chosen):
                return known.chosen
            known.room.remove(known.chosen.pdu.key)
            # Not now: others may have had a turn since, in other processes.
            known.room.waiting.had_turn(known.chosen.turn_of, known.chosen_ms)
            known.chosen = None
        waiting = known.room.waiting
        if len(waiting) > 1:
            last = self._area.last_persisted_txn(txn, room_id, waiting.learnt_up_to, _RECENT)
            waiting.learn(last, now_ms)
        known.chosen = self._next_txn(txn, known, now_ms)
        if known.chosen is None:
            # There is nothing else, or much of what is known is gone.
            for _ in range(_MOST_PAGES):
                if self._compare_page_txn(txn, known) is None:
                    break
            known.chosen = self._next_txn(txn, known, now_ms)
            if known.chosen is None and len(known.room):
                raise LookupError("too many that are known are not staged any more")
        known.chosen_ms = now_ms
        return known.chosen

    def _next_txn(self, txn: Cursor, known: _Known, now_ms: int) -> Choice | None:
        """None if nothing is known to be staged, or too many of those are gone."""
        for _ in range(_MOST_GONE):
            choice = known.room.choose(now_ms, lambda ids: self._area.persisted_txn(txn, ids))
            if choice is None or self._is_staged_txn(txn, known.room_id, choice):
                return choice
            # Another process did, or Synapse pruned it.
            known.room.remove(choice.pdu.key)
        return None

    def _is_staged_txn(self, txn: Cursor, room_id: str, choice: Choice) -> bool:
        key = choice.pdu.key
        return key not in self._held and bool(self._area.pdus_txn(txn, room_id, [key]))

    # What is staged

    def _read_txn(self, txn: Cursor, known: _Known, now_ms: int) -> None:
        """Learns of what was staged since."""
        if not 0 <= now_ms - known.compared_ms < _LOOK_AGAIN_AFTER_MS:
            known.compared_ms = now_ms
            known.compared_up_to_ms = 0
        if known.compared_up_to_ms is not None:
            self._compare_page_txn(txn, known)
        from_ms = now_ms - _OVERLAP_MS
        if from_ms < known.up_to_ms:
            late = self._area.keys_txn(txn, known.room_id, from_ms, known.up_to_ms - 1, 5 * PAGE)
            self._add_late_txn(txn, known, late)
        self._read_pages_txn(txn, known)

    def _read_pages_txn(self, txn: Cursor, known: _Known) -> None:
        for _ in range(_MOST_PAGES):
            if not self._has_room_for(known):
                return
            page = self._area.page_txn(txn, known.room_id, known.up_to_ms)
            self._add(known, page)
            before_ms = known.up_to_ms
            if page:
                known.up_to_ms = page[-1].received_ts_ms
            if len(page) < PAGE or known.up_to_ms == before_ms:
                return

    def _compare_page_txn(self, txn: Cursor, known: _Known) -> int | None:
        """Makes what is known of the room the same as what is staged, for the next page of it.

        Gives up to when that is so; None if it is for all that is known.
        """
        from_ms = known.compared_up_to_ms or 0
        page = self._area.keys_txn(txn, known.room_id, from_ms, known.up_to_ms, PAGE)
        before_ms = None
        if len(page) == PAGE:
            # There may be more of the last millisecond.
            before_ms = page[-1][1]
        staged = {key for key, _ in page if key not in self._held}
        for key in known.room.received(from_ms, before_ms):
            if key not in staged:
                known.room.remove(key)
        self._add_late_txn(txn, known, page)
        if before_ms is not None:
            before_ms = max(before_ms, from_ms + 1)
        known.compared_up_to_ms = before_ms
        return before_ms

    def _add_late_txn(self, txn: Cursor, known: _Known, found: Sequence[tuple[Key, int]]) -> None:
        late = [key for key, _ in found if key not in known.room and key not in self._held][:PAGE]
        if late and self._has_room_for(known):
            self._add(known, self._area.pdus_txn(txn, known.room_id, late))

    def _add(self, known: _Known, pdus: Sequence[WaitingPdu]) -> None:
        for pdu in pdus:
            if pdu.key not in self._held:
                known.room.add(pdu)

    def _has_room_for(self, known: _Known) -> bool:
        """Forgets other rooms, if need be."""
        self._count(known)
        if known.is_heavy:
            return False  # until some are gone: other rooms do not pay for it
        with self._lock:
            while self._known >= _MOST_KNOWN and len(self._rooms) > 1:
                # This one is the last, but for those that another thread is at.
                others = [room_id for room_id, other in self._rooms.items() if other is not known]
                heavy = (room_id for room_id in others if self._rooms[room_id].is_heavy)
                self._known -= self._rooms.pop(next(heavy, others[0])).counted
            return self._known < _MOST_KNOWN
