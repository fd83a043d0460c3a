"""The staging area of inbound PDUs: what Synapse prunes of it, and what becomes of the others."""

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import Any

import attr
from canonicaljson import encode_canonical_json
from synapse.api.constants import MAX_PDU_SIZE, EventContentFields, StickyEvent
from synapse.api.errors import SynapseError
from synapse.api.room_versions import EventFormatVersions
from synapse.federation.federation_server import _INBOUND_EVENT_HANDLING_LOCK_NAME
from synapse.metrics import SERVER_NAME_LABEL
from synapse.module_api import EventBase
from synapse.storage.databases.main.event_federation import pdus_pruned_from_federation_queue
from synapse.util.json import json_decoder, json_encoder

from synapse_sticky.handlers.staging.pruning import StagedPdu, prev_event_ids_of
from synapse_sticky.handlers.staging.tables import ParkedPdu
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, Method, table
from synapse_sticky.homeserver.staged import begin_on_staged_pdus

logger = logging.getLogger(__name__)

_EVENT_HANDLER = "synapse.handlers.federation_event.FederationEventHandler"
_SERVER = "synapse.federation.federation_server.FederationServer"

SEAMS = (
    Method(HOMESERVER, "get_federation_server"),
    Method(HOMESERVER, "get_federation_event_handler"),
    Method(_EVENT_HANDLER, "on_receive_pdu", 2, is_async=True, is_replaced=True),
    Attribute(_EVENT_HANDLER, "room_queues"),
    Method(_SERVER, "_process_incoming_pdus_in_room_inner", 3),
    Method(STORE, "prune_staged_events_in_room", 2, is_async=True, is_replaced=True),
    Method(STORE, "get_room_version", 1, is_async=True),
    Method(STORE, "try_acquire_lock", 2, is_async=True),
    Method(STORE, "have_events_in_timeline", 1, is_async=True),
    Method(STORE, "is_host_joined", 2, is_async=True),
    Attribute("synapse.storage.engines._base.BaseDatabaseEngine", "module"),
    Attribute("synapse.api.room_versions.RoomVersion", "event_format"),
    table(
        "federation_inbound_events_staging",
        *("origin", "event_id", "room_id", "received_ts", "event_json", "internal_metadata"),
    ),
    table("rooms", "room_id"),
)

_FIELD: str = StickyEvent.EVENT_FIELD_NAME
_PRUNE_FROM = 100
"""How many PDUs may be staged for a room before Synapse prunes."""

_DELETED_AT_ONCE = 1_000  # a database takes only so many parameters in a statement
_ROOMS_REMEMBERED = 64  # rooms that have so many PDUs staged at once are few
_MAX_PREV_EVENTS = 20  # Synapse refuses a PDU with more
_MAX_AUTH_EVENTS = 10  # likewise

Park = Callable[[ParkedPdu, StagedPdu, str], Awaitable[None]]
RetryAfter = Callable[[StagedPdu, int], int | None]


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _KnownPdu:
    is_exempt: bool
    prev_event_ids: tuple[str, ...]


class SynapseStaging:
    """Implements ``pruning.Pruned`` and ``parking.Staging``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        self._handler: Any = homeserver.hs.get_federation_event_handler()
        self.receives = homeserver.serves("federation")
        errors = self._store.database_engine.module
        self._database_errors = (errors.OperationalError, errors.InterfaceError)
        # Synapse thinks of pruning after every single PDU of a busy room. What is known of the
        # staged ones is remembered, so that each is read and parsed once.
        self._known: OrderedDict[str, dict[str, _KnownPdu]] = OrderedDict()

    # Pruning

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
        v1_format = room_version.event_format == EventFormatVersions.ROOM_V1_V2
        now_known = {event_id: known[event_id] for event_id in staged if event_id in known}
        for event_id, event_json, received_ts_ms in new:
            content = json_decoder.decode(event_json)
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

    # Processing

    def begin_on_staged_pdus(self) -> None:
        if self.receives:
            begin_on_staged_pdus(self._homeserver)

    async def process(self, room_id: str) -> None:
        if not self.receives:
            return
        server: Any = self._homeserver.hs.get_federation_server()
        room_version = await self._store.get_room_version(room_id)
        lock = await self._store.try_acquire_lock(_INBOUND_EVENT_HANDLING_LOCK_NAME, room_id)
        if lock:  # else whoever has it goes on until nothing is left
            server._process_incoming_pdus_in_room_inner(room_id, room_version, lock)

    def is_joining(self, room_id: str) -> bool:
        return room_id in self._handler.room_queues

    async def persisted(self, event_ids: Collection[str]) -> set[str]:
        return await self._store.have_events_in_timeline(event_ids)

    def stage_txn(self, txn: Cursor, room_id: str, pdus: Sequence[ParkedPdu]) -> None:
        # Synapse gets stuck on what is staged for a room that it does not know.
        txn.execute("SELECT 1 FROM rooms WHERE room_id = ?", (room_id,))
        if txn.fetchone() is None:
            return
        now_ms = self._homeserver.now_ms()
        txn.execute_batch(
            "INSERT INTO federation_inbound_events_staging"
            " (origin, event_id, room_id, received_ts, event_json, internal_metadata)"
            " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (origin, event_id) DO NOTHING",
            # Synapse processes them in the order of the time.
            [
                (
                    *(pdu.origin, pdu.event_id, room_id, now_ms + number),
                    *(pdu.event_json, pdu.internal_metadata),
                )
                for number, pdu in enumerate(pdus)
            ],
        )

    # Parking

    def park_by(self, park: Park, retry_after_ms: RetryAfter) -> None:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            async def on_receive_pdu(
                origin: str, pdu: EventBase, *args: Any, **options: Any
            ) -> None:
                staged = self._staged_pdu_of(pdu)
                if staged.sticky_field is None or not _is_possible(pdu):
                    await original(origin, pdu, *args, **options)
                    return
                in_room = await self._may_be_in_room(pdu.room_id)
                try:
                    await self._retry(
                        lambda: original(origin, pdu, *args, **options), staged, retry_after_ms
                    )
                except Exception as e:
                    # Synapse drops it.
                    if self._may_go_well_later(e):
                        await self._park(park, origin, pdu, "it could not be persisted for now")
                    elif await self._lacks_prev_events(pdu):
                        await self._park(park, origin, pdu, "its prev_events cannot be fetched")
                    raise
                # The main process joins rooms. Until it has, it queues the room's PDUs in memory
                # only, and the other processes ignore them. None is in the staging area any more.
                if self._is_queued(pdu):
                    await self._park(park, origin, pdu, "the room is being joined")
                elif not in_room:
                    await self._park(park, origin, pdu, "this server is not in the room yet")

            return on_receive_pdu

        self._homeserver.replace(self._handler, "on_receive_pdu", make)

    async def _retry(
        self,
        process: Callable[[], Awaitable[None]],
        staged: StagedPdu,
        retry_after_ms: RetryAfter,
    ) -> None:
        failures = 0
        while True:
            try:
                return await process()
            except Exception as e:
                failures += 1
                delay_ms = retry_after_ms(staged, failures) if self._is_temporary(e) else None
                if delay_ms is None:
                    raise
                logger.warning(
                    "Could not process the sticky PDU %s, trying again in %d ms: %s",
                    staged.event_id,
                    delay_ms,
                    e.__cause__ or e,
                )
            await self._homeserver.sleep_ms(delay_ms)

    async def _park(self, park: Park, origin: str, pdu: EventBase, why: str) -> None:
        # Synapse checks the size late, after it has fetched the prev_events.
        if len(encode_canonical_json(pdu.get_pdu_json())) > MAX_PDU_SIZE:
            return
        try:
            await park(_parked_pdu_of(origin, pdu), self._staged_pdu_of(pdu), why)
        except Exception:
            logger.exception("Could not park the sticky PDU %s", pdu.event_id)

    def _staged_pdu_of(self, pdu: EventBase) -> StagedPdu:
        field = pdu.get_dict().get(_FIELD)
        return StagedPdu(pdu.event_id, field, pdu.origin_server_ts, self._homeserver.now_ms())

    async def _may_be_in_room(self, room_id: str) -> bool:
        try:
            return bool(await self._store.is_host_joined(room_id, self._homeserver.server_name))
        except Exception:
            logger.exception("Could not find out whether this server is in %s", room_id)
            return False

    def _is_queued(self, pdu: EventBase) -> bool:
        queue = self._handler.room_queues.get(pdu.room_id)
        return bool(queue) and queue[-1][0] is pdu

    def _is_temporary(self, e: Exception) -> bool:
        """Does the database fail, or is the event persister away?"""
        if any(isinstance(cause, self._database_errors) for cause in (e, e.__cause__)):
            return True
        # An error that the persister itself answered with has no cause: the persister is not away.
        return isinstance(e, SynapseError) and e.code == 502 and e.__cause__ is not None

    def _may_go_well_later(self, e: Exception) -> bool:
        # If the persister fails, or its database, its answer to this process is such an error.
        return self._is_temporary(e) or (isinstance(e, SynapseError) and e.code >= 500)

    async def _lacks_prev_events(self, pdu: EventBase) -> bool:
        prev_event_ids = set(pdu.prev_event_ids())
        try:
            return bool(prev_event_ids - await self.persisted(prev_event_ids))
        except Exception as e:
            logger.exception("Could not find out whether the prev_events of %s are here", pdu)
            return isinstance(e, self._database_errors)


def _is_possible(pdu: EventBase) -> bool:
    """Can it ever be persisted? Synapse takes only so many prev_events and auth_events. Postgres
    neither stores text with NUL in it, nor takes a query with one."""
    prev_event_ids, auth_event_ids = pdu.prev_event_ids(), pdu.auth_event_ids()
    return (
        len(set(prev_event_ids)) <= _MAX_PREV_EVENTS
        and len(auth_event_ids) <= _MAX_AUTH_EVENTS
        and not any("\0" in text for text in (*prev_event_ids, *auth_event_ids, *_texts(pdu)))
    )


def _texts(pdu: EventBase) -> Iterator[str]:
    """What of the PDU goes into columns of its own."""
    labels = pdu.content.get(EventContentFields.LABELS)
    listed = labels if isinstance(labels, list | tuple) else ()
    related: tuple[str, ...] = ()
    match pdu.content.get("m.relates_to"):
        case {"rel_type": "m.annotation", "event_id": str(parent_id), "key": str(key)}:
            related = (parent_id, key)
        case {"rel_type": str(rel_type), "event_id": str(parent_id)}:
            related = (parent_id, rel_type)
        case _:
            pass  # Synapse stores no other relation, whatever is in it
    for field in (pdu.type, pdu.get("state_key"), pdu.redacts, *related, *listed):
        if isinstance(field, str):
            yield field


def _parked_pdu_of(origin: str, pdu: EventBase) -> ParkedPdu:
    return ParkedPdu(
        origin,
        pdu.event_id,
        pdu.room_id,
        json_encoder.encode(pdu.get_dict()),
        json_encoder.encode(pdu.internal_metadata.get_dict()),
        tuple(pdu.prev_event_ids()),
    )
