"""The staging area of inbound PDUs, as Synapse prunes it.

Synapse thinks of pruning after every single PDU of a busy room. Turns know what is staged, and so
what can be pruned. Without them all of it has to be looked at: the more is staged, the more seldom.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import attr
from synapse.api.constants import StickyEvent
from synapse.api.room_versions import EventFormatVersions
from synapse.metrics import SERVER_NAME_LABEL
from synapse.storage.databases.main.event_federation import pdus_pruned_from_federation_queue

from synapse_sticky.handlers.staging.pdu import StagedPdu, prev_event_ids_of
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.database import portions
from synapse_sticky.homeserver.seams import STORE, Attribute, method, table
from synapse_sticky.logs import bounded

logger = bounded(__name__)

SEAMS = (
    method(
        STORE,
        "async prune_staged_events_in_room(room_id, room_version) -> bool",
        is_replaced=True,
    ),
    Attribute("synapse.api.room_versions.RoomVersion", "event_format"),
    table(
        "federation_inbound_events_staging",
        "origin text, event_id text, room_id text, received_ts integer, event_json text",
    ),
)

_FIELD: str = StickyEvent.EVENT_FIELD_NAME
_V1_FORMAT = EventFormatVersions.ROOM_V1_V2
_PRUNE_FROM = 100
"""How many PDUs may be staged for a room before Synapse prunes."""

_NAMED_AT_ONCE = 1_000  # a database takes only so many parameters in a statement
_ROWS_PER_PDU = 10
"""How many rows are read for each PDU that is processed, on an average, where turns are off."""

_ROOMS_REMEMBERED = 64  # rooms that have so many PDUs staged at once are few


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _KnownPdu:
    staged: StagedPdu
    prev_event_ids: tuple[str, ...]


@attr.s(auto_attribs=True, slots=True)
class _KnownRoom:
    """What is known of the staged PDUs of a room.

    pdus: by their event IDs.
    rests: how many PDUs are processed before all are looked at again.
    """

    pdus: dict[str, _KnownPdu] = attr.Factory(dict)
    rests: int = 0


_Key = tuple[str, str]  # origin and event ID


class SynapsePruning:
    """Implements ``handler.Pruned``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        # Each staged PDU is read and parsed once. The most recently used rooms last.
        self._known: OrderedDict[str, _KnownRoom] = OrderedDict()
        self._take_prunable: Callable[[str], Collection[_Key] | None] = lambda room_id: None

    def prune_by(self, take_prunable: Callable[[str], Collection[_Key] | None]) -> None:
        """From now on prunes what this gives for a room, unless that is None."""
        self._take_prunable = take_prunable

    def exempt_from_pruning(self, is_exempt: Callable[[StagedPdu], bool]) -> None:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            # This never calls the original. The original would look at the area once more, and
            # might prune sticky PDUs that were staged in between.
            async def prune(room_id: str, room_version: Any, *args: Any, **options: Any) -> bool:
                try:
                    return await self._prune(room_id, room_version, is_exempt)
                except Exception:
                    # Pruning is housekeeping: leaving it out this time loses nothing.
                    logger.exception("Could not prune the staged PDUs of %s", room_id)
                    return False

            return prune

        self._homeserver.replace(self._store, "prune_staged_events_in_room", make)

    async def _prune(
        self, room_id: str, room_version: Any, is_exempt: Callable[[StagedPdu], bool]
    ) -> bool:
        if (keys := self._take_prunable(room_id)) is not None:
            if keys:
                await self._delete_keys(room_id, keys)
            return bool(keys)
        to_delete = await self._to_delete(room_id, room_version, is_exempt)
        if to_delete:
            await self._delete(room_id, to_delete)
        return bool(to_delete)

    async def _delete_keys(self, room_id: str, keys: Collection[_Key]) -> None:
        def delete_txn(txn: Cursor) -> None:
            txn.execute_batch(
                "DELETE FROM federation_inbound_events_staging WHERE origin = ? AND event_id = ?",
                [*keys],
            )

        await self._homeserver.transact("prune_staged", delete_txn)
        self._say_pruned(room_id, len(keys))

    async def _delete(self, room_id: str, event_ids: Collection[str]) -> None:
        def delete_txn(txn: Cursor) -> None:
            # No index helps with the IDs: each statement reads all of the room's staged PDUs.
            for portion in portions(event_ids, _NAMED_AT_ONCE):
                clause, args = self._homeserver.in_list("event_id", portion)
                txn.execute(
                    f"DELETE FROM federation_inbound_events_staging WHERE room_id = ? AND {clause}",
                    (room_id, *args),
                )

        await self._homeserver.transact("prune_staged", delete_txn)
        self._say_pruned(room_id, len(event_ids))

    def _say_pruned(self, room_id: str, count: int) -> None:
        logger.info("Pruning %d staged PDUs of %s", count, room_id)
        labels = {SERVER_NAME_LABEL: self._homeserver.server_name}
        pdus_pruned_from_federation_queue.labels(**labels).inc(count)

    async def _to_delete(
        self, room_id: str, room_version: Any, is_exempt: Callable[[StagedPdu], bool]
    ) -> set[str]:
        """The event IDs to prune: as Synapse does it, but for what is exempt."""
        room = self._known.get(room_id) or _KnownRoom()
        if room.rests > 0:
            room.rests -= 1
            return set()
        known = room.pdus

        def read_txn(txn: Cursor) -> tuple[list[str], list[tuple[str, str, int]]] | None:
            of_room = "FROM federation_inbound_events_staging WHERE room_id = ?"
            txn.execute(f"SELECT event_id {of_room}", (room_id,))
            staged = [event_id for (event_id,) in txn.fetchall()]
            if len(staged) < _PRUNE_FROM:
                return None
            unknown = [event_id for event_id in staged if event_id not in known]
            # No index helps with the IDs: each statement reads all of the room's staged PDUs.
            clause, args = "TRUE", list[Any]()
            if len(unknown) <= _NAMED_AT_ONCE:
                clause, args = self._homeserver.in_list("event_id", unknown)
            txn.execute(
                f"SELECT event_id, event_json, received_ts {of_room} AND {clause}",
                (room_id, *args),
            )
            return staged, [(row[0], row[1], row[2]) for row in txn.fetchall()]

        found = await self._homeserver.transact("read_staged", read_txn)
        if found is None:
            self._known.pop(room_id, None)
            return set()
        staged, new = found
        v1_format = room_version.event_format == _V1_FORMAT
        now_known = {event_id: known[event_id] for event_id in staged if event_id in known}
        for event_id, event_json, received_ts_ms in new:
            content = json.loads(event_json)
            field, sent_ms = content.get(_FIELD), content.get("origin_server_ts")
            now_known[event_id] = _KnownPdu(
                StagedPdu(event_id, field, sent_ms, received_ts_ms),
                prev_event_ids_of(content, v1_format),
            )
        self._known[room_id] = _KnownRoom(now_known, len(staged) // _ROWS_PER_PDU)
        self._known.move_to_end(room_id)
        while len(self._known) > _ROOMS_REMEMBERED:
            self._known.popitem(last=False)

        referenced = {p for s in now_known.values() for p in s.prev_event_ids}
        return {e for e, s in now_known.items() if e in referenced and not is_exempt(s.staged)}
