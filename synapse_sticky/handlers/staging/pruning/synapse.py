"""The staging area of inbound PDUs, as Synapse prunes it."""

import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import attr
from synapse.api.constants import StickyEvent
from synapse.api.room_versions import EventFormatVersions
from synapse.metrics import SERVER_NAME_LABEL
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
    Attribute("synapse.api.room_versions.RoomVersion", "event_format"),
    table(
        "federation_inbound_events_staging",
        "event_id text, room_id text, received_ts integer, event_json text",
    ),
)

_FIELD: str = StickyEvent.EVENT_FIELD_NAME
_V1_FORMAT = EventFormatVersions.ROOM_V1_V2
_PRUNE_FROM = 100
"""How many PDUs may be staged for a room before Synapse prunes."""

_DELETED_AT_ONCE = 1_000  # a database takes only so many parameters in a statement
_ROOMS_REMEMBERED = 64  # rooms that have so many PDUs staged at once are few


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _KnownPdu:
    is_exempt: bool
    prev_event_ids: tuple[str, ...]


class SynapsePruning:
    """Implements ``handler.Pruned``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        # Synapse thinks of pruning after every single PDU of a busy room. What is known of the
        # staged ones is remembered, so that each is read and parsed once.
        self._known: OrderedDict[str, dict[str, _KnownPdu]] = OrderedDict()
        self._may_prune: Callable[[str], bool] = lambda room_id: True

    def prune_only_if(self, may_prune: Callable[[str], bool]) -> None:
        """Asks this of a room before all IDs that are staged for it are read."""
        self._may_prune = may_prune

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
        if not self._may_prune(room_id):
            return False
        to_delete = await self._to_delete(room_id, room_version, is_exempt)
        if not to_delete:
            return False
        logger.info("Pruning %d staged PDUs of %s", len(to_delete), room_id)

        def delete_txn(txn: Cursor) -> None:
            # No index helps with the IDs: each statement reads all of the room's staged PDUs.
            ids = list(to_delete)
            for at in range(0, len(ids), _DELETED_AT_ONCE):
                clause, args = self._homeserver.in_list("event_id", ids[at : at + _DELETED_AT_ONCE])
                txn.execute(
                    f"DELETE FROM federation_inbound_events_staging WHERE room_id = ? AND {clause}",
                    (room_id, *args),
                )

        await self._homeserver.transact("prune_staged", delete_txn)
        labels = {SERVER_NAME_LABEL: self._homeserver.server_name}
        pdus_pruned_from_federation_queue.labels(**labels).inc(len(to_delete))
        return True

    async def _to_delete(
        self, room_id: str, room_version: Any, is_exempt: Callable[[StagedPdu], bool]
    ) -> set[str]:
        """The event IDs to prune: as Synapse does it, but for what is exempt."""
        known = self._known.get(room_id, {})

        def read_txn(txn: Cursor) -> tuple[list[str], list[tuple[str, str, int]]] | None:
            txn.execute(
                "SELECT event_id FROM federation_inbound_events_staging WHERE room_id = ?",
                (room_id,),
            )
            staged = [event_id for (event_id,) in txn.fetchall()]
            if len(staged) < _PRUNE_FROM:
                return None
            unknown = [event_id for event_id in staged if event_id not in known]
            if not unknown:
                return staged, []
            clause, args = self._homeserver.in_list("event_id", unknown)
            txn.execute(
                "SELECT event_id, event_json, received_ts"
                f" FROM federation_inbound_events_staging WHERE room_id = ? AND {clause}",
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
                is_exempt(StagedPdu(event_id, field, sent_ms, received_ts_ms)),
                prev_event_ids_of(content, v1_format),
            )
        self._known[room_id] = now_known
        self._known.move_to_end(room_id)
        while len(self._known) > _ROOMS_REMEMBERED:
            self._known.popitem(last=False)

        referenced = {p for s in now_known.values() for p in s.prev_event_ids}
        return {e for e, s in now_known.items() if e in referenced and not s.is_exempt}
