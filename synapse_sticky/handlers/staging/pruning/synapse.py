"""The staging area of inbound PDUs, as Synapse prunes it.

Synapse thinks of pruning after every single PDU of a busy room. Turns know what is staged, and so
what can be pruned. Without them it is looked at in pages. The next page comes some PDUs later, the
later the more of the last one stays.
"""

import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any

import attr
from synapse.api.constants import StickyEvent
from synapse.storage.databases.main.event_federation import pdus_pruned_from_federation_queue

from synapse_sticky.handlers.staging.pdu import StagedPdu, prev_event_ids_of
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.seams import STORE, Attribute, method, table
from synapse_sticky.logs import bounded

logger = bounded(__name__)

SEAMS = (
    method(
        STORE,
        "async prune_staged_events_in_room(room_id, room_version) -> bool",
        is_replaced=True,
    ),
    Attribute("synapse.api.room_versions.RoomVersion", "identifier"),
    table(
        "federation_inbound_events_staging",
        "origin text, event_id text, room_id text, received_ts integer, event_json text",
    ),
)

_FIELD: str = StickyEvent.EVENT_FIELD_NAME
_V1_FORMAT = ("1", "2")
"""The versions of rooms whose events refer to others by lists."""

_PRUNE_FROM = 100
"""How many PDUs may be staged for a room before Synapse prunes."""

_PAGE = 1_000
"""How many staged PDUs are looked at in one go, where turns are off."""

_ROWS_PER_PDU = 10
"""How many rows are read for each PDU that is processed, on an average, without those pruned."""

_ROOMS_REMEMBERED = 64  # rooms that have so many PDUs staged at once are few

_STAGED = "FROM federation_inbound_events_staging WHERE room_id = ?"
_START = (0, "")


@attr.s(auto_attribs=True, slots=True)
class _Lap:
    """How far the staged PDUs of a room were looked at.

    after: when the last of them was received, in ms since the epoch, and its event ID.
    rests: how many PDUs are processed before the next page.
    """

    after: tuple[int, str] = _START
    rests: int = 0


_Key = tuple[str, str]  # origin and event ID


class SynapsePruning:
    """Implements ``handler.Pruned``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        # The most recently used rooms last.
        self._laps: OrderedDict[str, _Lap] = OrderedDict()
        self._take_prunable: Callable[[str], Collection[_Key] | None] = lambda room_id: None

    def prune_by(self, take_prunable: Callable[[str], Collection[_Key] | None]) -> None:
        """From now on prunes what this gives for a room, and looks at nothing itself."""
        self._take_prunable = take_prunable

    def replace_pruning(self, prune: Callable[[str, object], Awaitable[bool]]) -> None:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            # This never calls the original. The original would look at the area once more, and
            # might prune sticky PDUs that were staged in between.
            async def prune_staged(
                room_id: str, room_version: Any, *args: Any, **options: Any
            ) -> bool:
                try:
                    return await prune(room_id, room_version)
                except Exception:
                    # Pruning is housekeeping: leaving it out this time loses nothing.
                    logger.exception("Could not prune the staged PDUs of %s", room_id)
                    return False

            return prune_staged

        self._homeserver.replace(self._store, "prune_staged_events_in_room", make)

    async def prune(
        self, room_id: str, room_version: Any, is_exempt: Callable[[StagedPdu], bool]
    ) -> bool:
        keys = self._take_prunable(room_id)
        if keys is None:
            keys = await self._next_prunable(room_id, room_version, is_exempt)
        if keys:
            await self._delete(room_id, keys)
        return bool(keys)

    async def _delete(self, room_id: str, keys: Collection[_Key]) -> None:
        def delete_txn(txn: Cursor) -> None:
            txn.execute_batch(
                "DELETE FROM federation_inbound_events_staging WHERE origin = ? AND event_id = ?",
                [*keys],
            )

        await self._homeserver.transact("prune_staged", delete_txn)
        logger.info("Pruning %d staged PDUs of %s", len(keys), room_id)
        # It has this one label.
        pruned = pdus_pruned_from_federation_queue.labels(self._homeserver.server_name)
        pruned.inc(len(keys))

    async def _next_prunable(
        self, room_id: str, room_version: Any, is_exempt: Callable[[StagedPdu], bool]
    ) -> Collection[_Key]:
        """What is to be pruned of the next page: as Synapse does it, but for what is exempt."""
        lap = self._laps.get(room_id) or _Lap()
        if lap.rests > 0:
            lap.rests -= 1
            return ()
        v1_format = room_version.identifier in _V1_FORMAT

        # Parsed in the transaction's thread: a page may well have 60 MB.
        def read_txn(txn: Cursor) -> tuple[Collection[_Key], _Lap] | None:
            # In the order of the index, or Postgres may read the whole table.
            first = f"SELECT 1 {_STAGED} ORDER BY received_ts LIMIT ?"
            txn.execute(f"SELECT COUNT(*) FROM ({first}) AS first", (room_id, _PRUNE_FROM))
            row = txn.fetchone()
            if row is None or row[0] < _PRUNE_FROM:
                return None
            txn.execute(
                f"SELECT received_ts, event_id, origin, event_json {_STAGED}"
                " AND received_ts >= ? AND (received_ts > ? OR event_id > ?)"
                " ORDER BY received_ts, event_id LIMIT ?",
                (room_id, lap.after[0], *lap.after, _PAGE),
            )
            rows = txn.fetchall()
            keys = _prunable(rows, v1_format, is_exempt)
            after = (rows[-1][0], rows[-1][1]) if len(rows) == _PAGE else _START
            return keys, _Lap(after, (len(rows) - len(keys)) // _ROWS_PER_PDU)

        found = await self._homeserver.transact("read_staged", read_txn)
        if found is None:
            self._laps.pop(room_id, None)
            return ()
        keys, self._laps[room_id] = found
        self._laps.move_to_end(room_id)
        while len(self._laps) > _ROOMS_REMEMBERED:
            self._laps.popitem(last=False)
        return keys


def _prunable(
    rows: Iterable[tuple[int, str, str, str]],
    v1_format: bool,
    is_exempt: Callable[[StagedPdu], bool],
) -> list[_Key]:
    """Those that others of these refer to."""
    referenced = set[str]()
    found: list[_Key] = []
    for received_ts_ms, event_id, origin, event_json in rows:
        content = json.loads(event_json)
        referenced.update(prev_event_ids_of(content, v1_format))
        field, sent_ms = content.get(_FIELD), content.get("origin_server_ts")
        if not is_exempt(StagedPdu(event_id, field, sent_ms, received_ts_ms)):
            found.append((origin, event_id))
    return [key for key in found if key[1] in referenced]
