"""The origins of the PDUs that are staged for a room take turns (D7).

Synapse processes the PDUs of a room one by one, first in, first out. So the PDUs of one server
stand in front of all that another server sends later. This module chooses instead, by the rules of
``room.py``.

What decides is in the database: the PDUs that are staged, and when the last events of each server
were persisted. So another process that goes on with the room, or this one after a restart, goes on
with the same turns. What this process knows of staged PDUs is remembered, so that each is read and
parsed once.

What is held (``held.py``) is passed over.

Fails open: if it cannot be chosen, Synapse takes the PDU that was received first.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import attr

from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.turns.room import (
    Choice,
    Key,
    Persisted,
    StagedRoom,
    WaitingPdu,
)
from synapse_sticky.homeserver import Cursor, Homeserver

PAGE = 100
"""How many staged PDUs are read at once."""

_MOST_PAGES = 20
"""In one choice. More than a few are needed only where a process begins with a room."""

_OVERLAP_MS = 2_000
"""A PDU that is staged may become visible after others that were received later."""

_LOOK_AGAIN_AFTER_MS = 10_000
"""All IDs that are staged for a room are compared with what is known, as late as this: another
process may have processed some, and the clocks of two machines may differ by more than that."""

_MOST_KNOWN = 20_000
"""How many staged PDUs are remembered, of all rooms; about 20 MB. Of a room with more of them the
later ones take part when the first are processed."""

_MOST_ROOMS = 2_000
"""How many rooms with several staged PDUs are remembered. With more of them, each choice in a room
that was forgotten reads the room's PDUs anew."""

_MOST_GONE = 5
"""How many choices may turn out to be staged no more, until all IDs are compared."""

_RECENT = 50
"""How many of a room's last events are looked at, where a process begins with a room. They say
whose turns there were."""


class Area(Protocol):
    """The staging area of inbound PDUs. All but ``choose_by`` is part of one transaction."""

    def choose_by(self, choose_txn: Callable[[Cursor, str], Key | None]) -> None:
        """From now on Synapse processes the PDU of a room next that this chooses.

        If it raises an error, Synapse goes by when the PDUs were received.
        """

    def page_txn(self, txn: Cursor, room_id: str, from_ms: int) -> Sequence[WaitingPdu]:
        """The first ``PAGE`` PDUs of the room that were received at this time or later."""

    def keys_txn(
        self, txn: Cursor, room_id: str, from_ms: int, before_ms: int | None, most: int
    ) -> Sequence[Key]:
        """The same without what has to be parsed, up to a time and a number."""

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
    """

    room: StagedRoom = attr.Factory(StagedRoom)
    lock: threading.Lock = attr.Factory(threading.Lock)
    up_to_ms: int = 0
    compared_ms: int = 0
    chosen: Choice | None = None
    chosen_ms: int = 0


class TurnsHandler:
    """Chooses the PDU of a room that Synapse processes next."""

    def __init__(self, homeserver: Homeserver, area: Area, held: Held) -> None:
        self._homeserver = homeserver
        self._area = area
        self._held = held
        # The most recently used ones last. Transactions run in several threads.
        self._rooms: OrderedDict[str, _Known] = OrderedDict()
        self._lock = threading.Lock()

    def install(self) -> None:
        """Takes effect from the next PDU on."""
        self._area.choose_by(self.choose_txn)
        self._held.is_heeded = True

    def may_prune(self, room_id: str) -> bool:
        """Is it worth while to look for staged PDUs of the room that can be pruned?"""
        known = self._rooms.get(room_id)
        return known is None or known.room.may_be_pruned(self._homeserver.now_ms())

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
            # This is all that it takes where one PDU comes at a time: it is not even parsed.
            first = self._area.keys_txn(txn, room_id, 0, None, 2)
            if len(first) <= 1:
                return first[0] if first and first[0] not in self._held else None
            known = self._remember(room_id)
        try:
            with known.lock:
                choice = self._choose_txn(txn, room_id, known)
        except Exception:
            # What is known may be what is wrong. The next choice reads all of it anew.
            self._forget(room_id, known)
            raise
        if choice is None and not self._held:
            self._forget(room_id, known)
        return None if choice is None else choice.pdu.key

    def _remember(self, room_id: str) -> _Known:
        with self._lock:
            known = self._rooms.setdefault(room_id, _Known())
            self._rooms.move_to_end(room_id)
            while len(self._rooms) > _MOST_ROOMS:
                self._rooms.popitem(last=False)
            return known

    def _forget(self, room_id: str, known: _Known) -> None:
        with self._lock:
            if self._rooms.get(room_id) is known:
                del self._rooms[room_id]

    def _choose_txn(self, txn: Cursor, room_id: str, known: _Known) -> Choice | None:
        now_ms = self._homeserver.now_ms()
        self._read_txn(txn, room_id, known, now_ms)
        if known.chosen is not None:
            if self._is_staged_txn(txn, room_id, known.chosen):
                return known.chosen
            known.room.remove(known.chosen.pdu.key)
            # Not now: others may have had a turn since, in other processes.
            known.room.had_turn(known.chosen.turn_of, known.chosen_ms)
            known.chosen = None
        if known.room.number_of_origins() > 1:
            after = known.room.learnt_up_to
            last = self._area.last_persisted_txn(txn, room_id, after, _RECENT)
            known.room.learn_turns(last, now_ms)
        for _ in range(_MOST_GONE):
            choice = known.room.choose(now_ms, lambda ids: self._area.persisted_txn(txn, ids))
            if choice is None:
                break
            if self._is_staged_txn(txn, room_id, choice):
                known.chosen, known.chosen_ms = choice, now_ms
                return choice
            # Another process did, or Synapse pruned it.
            known.room.remove(choice.pdu.key)
        self._compare_txn(txn, room_id, known, now_ms)
        known.chosen = known.room.choose(now_ms, lambda ids: self._area.persisted_txn(txn, ids))
        known.chosen_ms = now_ms
        return known.chosen

    def _is_staged_txn(self, txn: Cursor, room_id: str, choice: Choice) -> bool:
        key = choice.pdu.key
        return key not in self._held and bool(self._area.pdus_txn(txn, room_id, [key]))

    # What is staged

    def _read_txn(self, txn: Cursor, room_id: str, known: _Known, now_ms: int) -> None:
        """Learns of what was staged since."""
        if not 0 <= now_ms - known.compared_ms < _LOOK_AGAIN_AFTER_MS:
            self._compare_txn(txn, room_id, known, now_ms)
        else:
            from_ms = now_ms - _OVERLAP_MS
            if from_ms < known.up_to_ms:
                late = self._area.keys_txn(txn, room_id, from_ms, known.up_to_ms, 5 * PAGE)
                self._add_late_txn(txn, room_id, known, late)
            self._read_pages_txn(txn, room_id, known)

    def _read_pages_txn(self, txn: Cursor, room_id: str, known: _Known) -> None:
        for _ in range(_MOST_PAGES):
            if not self._has_room_for(known):
                return
            page = self._area.page_txn(txn, room_id, known.up_to_ms)
            self._add(known, page)
            before_ms = known.up_to_ms
            if page:
                known.up_to_ms = page[-1].received_ts_ms
            if len(page) < PAGE or known.up_to_ms == before_ms:
                return

    def _compare_txn(self, txn: Cursor, room_id: str, known: _Known, now_ms: int) -> None:
        """Makes what is known of the room the same as what is staged."""
        known.compared_ms = now_ms
        staged = self._area.keys_txn(txn, room_id, 0, None, _MOST_KNOWN)
        for key in known.room.staged() - {key for key in staged if key not in self._held}:
            known.room.remove(key)
        if len(staged) == _MOST_KNOWN:
            # Some that are staged may be among those.
            known.up_to_ms = known.room.last_received_ms()
        self._read_pages_txn(txn, room_id, known)
        self._add_late_txn(txn, room_id, known, staged)

    def _add_late_txn(self, txn: Cursor, room_id: str, known: _Known, keys: Sequence[Key]) -> None:
        late = [key for key in keys if key not in known.room and key not in self._held][:PAGE]
        if late and self._has_room_for(known):
            self._add(known, self._area.pdus_txn(txn, room_id, late))

    def _add(self, known: _Known, pdus: Sequence[WaitingPdu]) -> None:
        for pdu in pdus:
            if pdu.key not in self._held:
                known.room.add(pdu)

    def _has_room_for(self, known: _Known) -> bool:
        """Forgets other rooms, if need be."""
        with self._lock:
            total = sum(len(other.room) for other in self._rooms.values())
            for room_id in list(self._rooms):
                if total < _MOST_KNOWN:
                    break
                if self._rooms[room_id] is not known:
                    total -= len(self._rooms.pop(room_id).room)
            return total < _MOST_KNOWN
