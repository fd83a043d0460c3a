"""How Synapse processes the PDUs of its staging area, and what becomes of those that it drops."""

import json
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import Any

from canonicaljson import encode_canonical_json
from synapse.api.constants import EventContentFields, StickyEvent
from synapse.federation.federation_server import _INBOUND_EVENT_HANDLING_LOCK_NAME
from synapse.module_api import EventBase
from synapse.module_api.errors import SynapseError

from synapse_sticky.handlers.staging.parking.tables import ParkedPdu
from synapse_sticky.handlers.staging.pdu import StagedPdu
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, method, table
from synapse_sticky.homeserver.staged import begin_on_staged_pdus

logger = logging.getLogger(__name__)

_EVENT_HANDLER = "synapse.handlers.federation_event.FederationEventHandler"
_SERVER = "synapse.federation.federation_server.FederationServer"

SEAMS = (
    method(HOMESERVER, "get_federation_server() -> FederationServer"),
    method(HOMESERVER, "get_federation_event_handler() -> FederationEventHandler"),
    method(_EVENT_HANDLER, "async on_receive_pdu(origin, pdu)", is_replaced=True),
    Attribute(_EVENT_HANDLER, "room_queues"),
    method(_SERVER, "async _process_incoming_pdus_in_room_inner(room_id, room_version, lock, /)"),
    method(STORE, "async get_room_version(room_id, /) -> RoomVersion"),
    method(STORE, "async try_acquire_lock(lock_name, lock_key, /) -> Lock | None"),
    method(STORE, "async have_events_in_timeline(event_ids, /) -> set"),
    method(STORE, "async is_host_joined(room_id, host, /) -> bool"),
    Attribute("synapse.storage.engines._base.BaseDatabaseEngine", "module"),
    table(
        "federation_inbound_events_staging",
        "origin text, event_id text, room_id text, received_ts integer, event_json text, "
        "internal_metadata text",
    ),
    table("rooms", "room_id text"),
)

_FIELD: str = StickyEvent.EVENT_FIELD_NAME
_LABELS = EventContentFields.LABELS
_MAX_PDU_SIZE = 65_536  # bytes; the specification's limit
_MAX_PREV_EVENTS = 20  # Synapse refuses a PDU with more
_MAX_AUTH_EVENTS = 10  # likewise

Park = Callable[[ParkedPdu, StagedPdu, str], Awaitable[None]]
RetryAfter = Callable[[StagedPdu, int], int | None]


class SynapseStaging:
    """Implements ``handler.Staging``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        self._handler: Any = homeserver.hs.get_federation_event_handler()
        self.receives = homeserver.place.serves("federation")
        errors = self._store.database_engine.module
        self._database_errors = (errors.OperationalError, errors.InterfaceError)

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
        if len(encode_canonical_json(pdu.get_pdu_json())) > _MAX_PDU_SIZE:
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
    labels = pdu.content.get(_LABELS)
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


def _dumped(value: object) -> str:
    # As Synapse stages it: without what JSON has no word for.
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _parked_pdu_of(origin: str, pdu: EventBase) -> ParkedPdu:
    return ParkedPdu(
        origin,
        pdu.event_id,
        pdu.room_id,
        _dumped(pdu.get_dict()),
        _dumped(pdu.internal_metadata.get_dict()),
        tuple(pdu.prev_event_ids()),
    )
