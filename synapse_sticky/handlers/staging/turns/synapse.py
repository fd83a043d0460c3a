"""The staging area of inbound PDUs, as Synapse takes them out of it."""

import json
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

from synapse.api.constants import StickyEvent
from synapse.events import make_event_from_dict
from synapse.module_api import EventBase

from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.pdu import StagedPdu
from synapse_sticky.handlers.staging.turns.handler import PAGE
from synapse_sticky.handlers.staging.turns.pdu import Key, WaitingPdu
from synapse_sticky.handlers.staging.turns.waiting import Persisted
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.database import found_txn
from synapse_sticky.homeserver.seams import STORE, method, table
from synapse_sticky.homeserver.spec import LONGEST_NAME
from synapse_sticky.logs import bounded

logger = bounded(__name__)

SEAMS = (
    method(
        STORE,
        "async get_next_staged_event_id_for_room(room_id) -> tuple[_, _] | None",
        is_replaced=True,
    ),
    method(
        STORE,
        "async get_next_staged_event_for_room(room_id, room_version) -> tuple[_, _] | None",
        is_replaced=True,
    ),
    method(
        "synapse.events",
        "make_event_from_dict(event_dict, /, *, room_version, internal_metadata_dict)",
    ),
    table(
        "federation_inbound_events_staging",
        "origin text, event_id text, room_id text, received_ts integer, event_json text, "
        "internal_metadata text",
    ),
    table(
        "events",
        "event_id text, room_id text, sender text, received_ts integer, outlier boolean, "
        "stream_ordering integer",
    ),
)

_FIELD: str = StickyEvent.EVENT_FIELD_NAME
_STAGED = "FROM federation_inbound_events_staging WHERE room_id = ?"
_OF_PDU = "origin, event_id, received_ts, event_json"
_CONTENT = "received_ts, event_json, internal_metadata"
_MOST_PREV_EVENTS = 20
"""Synapse refuses a PDU with more of them, without a look at them."""

_GREATEST_DEPTH = 2**63 - 1

TellTxn = Callable[[Cursor, str, str, int], None]
"""Takes a transaction, a PDU's origin and event ID, and when it was staged, in ms since the
epoch."""


class _First(threading.local):
    """What the first PDUs of a room have, while a transaction of this thread chooses one."""

    def __init__(self) -> None:
        self.rows: dict[Key, tuple[int, str, str]] = {}


class SynapseTurns:
    """Implements ``handler.Area``."""

    def __init__(self, homeserver: Homeserver, held: Held) -> None:
        self._homeserver = homeserver
        self._held = held
        self._store = homeserver.store
        self._has_failed = False
        self._tell_txn: TellTxn | None = None
        self._first = _First()

    def tell_chosen(self, tell_txn: TellTxn) -> None:
        """From now on tells of each sticky PDU that is chosen, in the same transaction."""
        self._tell_txn = tell_txn

    def choose_by(self, choose_txn: Callable[[Cursor, str], Key | None]) -> None:
        def read_txn(txn: Cursor, room_id: str) -> tuple[str, str, str, str] | None:
            self._first.rows = {}
            try:
                chosen = choose_txn(txn, room_id)
                return None if chosen is None else content_txn(txn, room_id, chosen)
            finally:
                self._first.rows = {}

        def content_txn(txn: Cursor, room_id: str, chosen: Key) -> tuple[str, str, str, str] | None:
            if (row := self._first.rows.get(chosen)) is None:
                txn.execute(
                    f"SELECT {_CONTENT} {_STAGED} AND origin = ? AND event_id = ?",
                    (room_id, *chosen),
                )
                if (row := txn.fetchone()) is None:
                    return None
            received_ts_ms, event_json, metadata = row
            if self._tell_txn is not None and _FIELD in event_json:
                self._tell_txn(txn, *chosen, received_ts_ms)
            return (*chosen, event_json, metadata)

        async def choose(room_id: str) -> tuple[str, str, str, str] | None:
            found = await self._homeserver.transact("next_staged", read_txn, room_id)
            self._has_failed = False
            return found

        def make_for_id(original: Callable[..., Any]) -> Callable[..., Any]:
            async def get_next_id(room_id: str, **options: Any) -> Key | None:
                try:
                    found = await choose(room_id)
                except Exception:
                    self._say_failed(room_id)
                    next_key: Key | None = await original(room_id, **options)
                    return None if next_key in self._held else next_key
                return found and found[:2]

            return get_next_id

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            async def get_next(
                room_id: str, room_version: Any, **options: Any
            ) -> tuple[str, EventBase] | None:
                try:
                    found = await choose(room_id)
                    if found is None:
                        return None
                    origin, _, event_json, metadata = found
                    event = make_event_from_dict(
                        json.loads(event_json),
                        room_version=room_version,
                        internal_metadata_dict=json.loads(metadata),
                    )
                except Exception:
                    self._say_failed(room_id)
                    next_pdu: tuple[str, EventBase] | None = await original(
                        room_id, room_version, **options
                    )
                    # Synapse knows no other than the first one, and would take it again and again.
                    if next_pdu and (next_pdu[0], next_pdu[1].event_id) in self._held:
                        return None
                    return next_pdu
                return origin, event

            return get_next

        replace = self._homeserver.replace
        replace(self._store, "get_next_staged_event_id_for_room", make_for_id)
        replace(self._store, "get_next_staged_event_for_room", make)

    def _say_failed(self, room_id: str) -> None:
        # Once, until it goes well again: this is done for every PDU.
        if not self._has_failed:
            logger.exception("Could not choose a staged PDU of %s, taking the first", room_id)
        self._has_failed = True

    # Reading

    def first_txn(self, txn: Cursor, room_id: str) -> Sequence[Key]:
        # With all that Synapse needs of them: mostly there is one, and it is chosen.
        txn.execute(
            f"SELECT origin, event_id, {_CONTENT} {_STAGED} ORDER BY received_ts LIMIT 2",
            (room_id,),
        )
        self._first.rows = {(row[0], row[1]): row[2:] for row in txn.fetchall()}
        return [*self._first.rows]

    def page_txn(self, txn: Cursor, room_id: str, from_ms: int) -> Sequence[WaitingPdu]:
        txn.execute(
            f"SELECT {_OF_PDU} {_STAGED} AND received_ts >= ? ORDER BY received_ts LIMIT ?",
            (room_id, from_ms, PAGE),
        )
        return [_waiting_pdu_of(*row) for row in txn.fetchall()]

    def keys_txn(
        self, txn: Cursor, room_id: str, from_ms: int, to_ms: int, most: int
    ) -> Sequence[tuple[Key, int]]:
        txn.execute(
            f"SELECT origin, event_id, received_ts {_STAGED}"
            " AND received_ts >= ? AND received_ts <= ? ORDER BY received_ts LIMIT ?",
            (room_id, from_ms, to_ms, most),
        )
        return [((origin, event_id), at_ms) for origin, event_id, at_ms in txn.fetchall()]

    def pdus_txn(self, txn: Cursor, room_id: str, keys: Collection[Key]) -> Sequence[WaitingPdu]:
        found = []
        for key in keys:
            # There is an index by both. Of some databases it is not used for a list of pairs.
            txn.execute(
                f"SELECT {_OF_PDU} {_STAGED} AND origin = ? AND event_id = ?", (room_id, *key)
            )
            found += [_waiting_pdu_of(*row) for row in txn.fetchall()]
        return found

    def persisted_txn(self, txn: Cursor, event_ids: Collection[str]) -> set[str]:
        # Postgres can be asked for no text with NUL in it.
        possible = [event_id for event_id in event_ids if "\0" not in event_id]
        select = "SELECT event_id FROM events WHERE NOT outlier AND"
        return found_txn(self._homeserver, txn, select, "event_id", possible)

    def last_persisted_txn(
        self, txn: Cursor, room_id: str, after: int, most: int
    ) -> Sequence[Persisted]:
        txn.execute(
            "SELECT stream_ordering, sender, received_ts FROM events"
            " WHERE room_id = ? AND stream_ordering > ? ORDER BY stream_ordering DESC LIMIT ?",
            (room_id, after, most),
        )
        return [
            Persisted(stream_ordering, sender.partition(":")[2], received_ts_ms or 0)
            for stream_ordering, sender, received_ts_ms in reversed(txn.fetchall())
        ]


def _waiting_pdu_of(origin: str, event_id: str, received_ts_ms: int, event_json: str) -> WaitingPdu:
    content = json.loads(event_json)
    depth = content.get("depth")
    is_depth = isinstance(depth, int) and 0 <= depth <= _GREATEST_DEPTH
    staged = StagedPdu(
        event_id, content.get(_FIELD), content.get("origin_server_ts"), received_ts_ms
    )
    return WaitingPdu(
        origin,
        event_id,
        received_ts_ms,
        int(depth) if is_depth else 0,
        _prev_event_ids_of(content),
        staged.until_ms(),
    )


def _prev_event_ids_of(content: Any) -> tuple[str, ...]:
    """In each format that a room version has: an ID, or a list of an ID and hashes.

    No PDU has to wait for an event with a longer ID. All of these are kept in memory.
    """
    prev_events = content.get("prev_events")
    if not isinstance(prev_events, list) or len(prev_events) > _MOST_PREV_EVENTS:
        return ()
    event_ids = (p[0] if isinstance(p, list) and p else p for p in prev_events)
    return tuple(
        event_id
        for event_id in event_ids
        if isinstance(event_id, str) and len(event_id) <= LONGEST_NAME
    )
