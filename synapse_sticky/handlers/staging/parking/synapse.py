"""How Synapse processes the PDUs of its staging area, and what becomes of those that it drops."""

import json
from collections.abc import Awaitable, Callable, Collection, Sequence
from http import HTTPStatus
from typing import Any

import attr
from canonicaljson import encode_canonical_json
from synapse.api.constants import StickyEvent
from synapse.federation.federation_server import _INBOUND_EVENT_HANDLING_LOCK_NAME
from synapse.module_api import EventBase
from synapse.module_api.errors import Codes, SynapseError
from synapse.replication.http.federation import ReplicationFederationSendEventsRestServlet

from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.parking.passed_over import PassedOver
from synapse_sticky.handlers.staging.parking.pdus import ParkedPdu
from synapse_sticky.handlers.staging.parking.possible import is_possible
from synapse_sticky.handlers.staging.parking.reasons import Reason
from synapse_sticky.handlers.staging.pdu import StagedPdu, ids_to_wait_for
from synapse_sticky.handlers.staging.received.synapse import note_handed_on
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.causes import Cause, Verdict
from synapse_sticky.homeserver.database import found_txn
from synapse_sticky.homeserver.process import replace_shared
from synapse_sticky.homeserver.received import Received
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, method, table
from synapse_sticky.homeserver.staged import begin_on_staged_pdus
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_EVENT_HANDLER = "synapse.handlers.federation_event.FederationEventHandler"
_SERVER = "synapse.federation.federation_server.FederationServer"
_PERSISTING = "synapse.replication.http.federation.ReplicationFederationSendEventsRestServlet"

SEAMS = (
    method(HOMESERVER, "get_federation_server() -> FederationServer"),
    method(HOMESERVER, "get_federation_event_handler() -> FederationEventHandler"),
    method(_EVENT_HANDLER, "async on_receive_pdu(origin, pdu)", is_replaced=True),
    method(
        _EVENT_HANDLER,
        "async _process_pulled_event(origin, event, backfilled)",
        is_replaced=True,
    ),
    Attribute(_EVENT_HANDLER, "room_queues"),
    method(_PERSISTING, "async _handle_request(request, content) -> tuple[_, _]", is_replaced=True),
    Attribute(_PERSISTING, "federation_event_handler"),
    method(_SERVER, "async _process_incoming_pdus_in_room_inner(room_id, room_version, lock, /)"),
    method(STORE, "async get_room_version(room_id, /) -> RoomVersion"),
    method(STORE, "async try_acquire_lock(lock_name, lock_key, /) -> Lock | None"),
    method(STORE, "async is_host_joined(room_id, host, /) -> bool"),
    method(
        STORE,
        "async remove_received_event_from_staging(origin, event_id) -> int | None",
        is_replaced=True,
    ),
    table(
        "federation_inbound_events_staging",
        "origin text, event_id text, room_id text, received_ts integer, event_json text, "
        "internal_metadata text",
    ),
    table("rooms", "room_id text"),
    table("events", "event_id text, outlier boolean"),
)

_FIELD: str = StickyEvent.EVENT_FIELD_NAME
_MAX_PDU_SIZE = 65_536  # bytes; the specification's limit

_DEPTH = 5
"""So many errors, each the cause of the one before, are looked at."""

_CAUSE = "org.matrix.msc4354.synapse_sticky.cause"
"""The field of an event persister's answer with the cause of its error."""

_READS_CAUSE = "_synapse_sticky_reads_cause"
"""What the servlet, whose class all homeservers of a process share, does for one of them."""

Fail = Callable[[ParkedPdu, StagedPdu, str, Verdict], Awaitable[None]]


class SynapseStaging:
    """Implements ``handler.Staging``."""

    def __init__(self, homeserver: Homeserver, held: Held, received: Received) -> None:
        self._homeserver = homeserver
        self._held = held
        self._received = received
        self._store = homeserver.store
        self._handler: Any = homeserver.hs.get_federation_event_handler()
        self.receives = homeserver.place.serves("federation")
        self._passed_over = PassedOver(homeserver.steady_ms)

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
        return await self._homeserver.transact(
            "persisted", self._found_txn, event_ids, "NOT outlier AND"
        )

    async def existing(self, event_ids: Collection[str]) -> set[str]:
        return await self._homeserver.transact("existing", self._found_txn, event_ids)

    def _found_txn(self, txn: Cursor, event_ids: Collection[str], which: str = "") -> set[str]:
        select = f"SELECT event_id FROM events WHERE {which}"
        return found_txn(self._homeserver, txn, select, "event_id", event_ids)

    def stage_txn(self, txn: Cursor, room_id: str, pdus: Sequence[ParkedPdu]) -> None:
        # Synapse gets stuck on what is staged for a room that it does not know.
        if not self.known_txn(txn, [room_id]):
            return
        now_ms = self._homeserver.now_ms()
        txn.execute_batch(
            "INSERT INTO federation_inbound_events_staging"
            " (origin, event_id, room_id, received_ts, event_json, internal_metadata)"
            " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (origin, event_id) DO NOTHING",
            # Synapse processes them in the order of the time.
            [
                (p.origin, p.event_id, room_id, now_ms + n, p.event_json, p.internal_metadata)
                for n, p in enumerate(pdus)
            ],
        )

    def known_txn(self, txn: Cursor, room_ids: Collection[str]) -> set[str]:
        select = "SELECT room_id FROM rooms WHERE"
        return found_txn(self._homeserver, txn, select, "room_id", room_ids)

    async def unstage(self, origin: str, event_id: str) -> None:
        def delete_txn(txn: Cursor) -> None:
            txn.execute(
                "DELETE FROM federation_inbound_events_staging WHERE origin = ? AND event_id = ?",
                (origin, event_id),
            )

        await self._homeserver.transact("unstage", delete_txn)

    # Parking

    def park_by(self, fail: Fail) -> None:
        def make(original: Callable[..., Awaitable[None]]) -> Callable[..., Any]:
            async def receive_sticky(
                origin: str, pdu: EventBase, *args: Any, **options: Any
            ) -> None:
                in_room = await self._may_be_in_room(pdu.room_id)
                try:
                    await original(origin, pdu, *args, **options)
                except Exception as e:
                    # Synapse drops it.
                    if is_possible(pdu) and (found := await self._verdict_on(pdu, e)):
                        await self._fail(fail, origin, pdu, *found)
                    raise
                # The main process joins rooms. Until it has, it queues the room's PDUs in memory
                # only, and the other processes ignore them. None is in the staging area any more.
                if self._is_queued(pdu):
                    await self._fail(fail, origin, pdu, str(Reason.JOINING), is_outside=True)
                # Synapse looks once more whether this server is in the room: it may have left.
                elif not in_room or not await self._may_be_in_room(pdu.room_id):
                    await self._fail(fail, origin, pdu, str(Reason.NOT_JOINED), is_outside=True)

            def on_receive_pdu(
                origin: str, pdu: EventBase, *args: Any, **options: Any
            ) -> Awaitable[None]:
                receive = original if pdu.sticky_duration() is None else receive_sticky
                return receive(origin, pdu, *args, **options)

            return on_receive_pdu

        self._homeserver.replace(self._handler, "on_receive_pdu", make)
        self._homeserver.replace(self._handler, "_process_pulled_event", self._passing_over)
        self._homeserver.replace(
            self._store, "remove_received_event_from_staging", self._leaving_held
        )
        self._homeserver.enter(self._handler, _READS_CAUSE, self._cause_of)
        replace_shared(ReplicationFederationSendEventsRestServlet, "_handle_request", _handing_on)

    def _passing_over(self, original: Callable[..., Any]) -> Callable[..., Any]:
        async def _process_pulled_event(
            origin: str, event: EventBase, backfilled: bool, *args: Any, **options: Any
        ) -> None:
            if event.event_id in self._passed_over:
                return
            try:
                await original(origin, event, backfilled, *args, **options)
            except Exception as e:
                cause = self._cause_of(e)
                verdict = None if backfilled or cause is None else cause.verdict()
                # Else nothing that comes after it in the room could be persisted. Synapse does the
                # same with an event that it refuses itself.
                if not verdict or not self._passed_over.failed(event.event_id, verdict):
                    raise
                logger.warning("Passing over %s of %s: %s", event.event_id, origin, cause)

        return _process_pulled_event

    def _leaving_held(self, original: Callable[..., Awaitable[int | None]]) -> Callable[..., Any]:
        async def leave() -> None:
            pass

        def remove_received_event_from_staging(
            origin: str, event_id: str, *args: Any, **options: Any
        ) -> Awaitable[int | None]:
            if (origin, event_id) in self._held:
                return leave()
            return original(origin, event_id, *args, **options)

        return remove_received_event_from_staging

    async def _verdict_on(self, pdu: EventBase, e: Exception) -> tuple[str, Verdict] | None:
        """Why it was not persisted, and whether that passes; None if Synapse itself refuses it."""
        cause = self._cause_of(e)
        verdict = None if cause is None else cause.verdict()
        if verdict is Verdict.PASSES:
            return f"{Reason.DATABASE}: {cause}", verdict
        if isinstance(e, SynapseError) and e.code == HTTPStatus.CONFLICT:
            # It did so in both of Synapse's attempts.
            return str(Reason.STATE), Verdict.PASSES
        if lacking := await self._lacking(pdu):
            # Synapse has not come to the PDU itself. One of these failed.
            return str(lacking), Verdict.PASSES
        if verdict is None:
            return None
        self._passed_over.failed(pdu.event_id, verdict)
        return f"{Reason.UNKNOWN}: {cause}", verdict

    async def _fail(
        self,
        fail: Fail,
        origin: str,
        pdu: EventBase,
        why: str,
        verdict: Verdict = Verdict.PASSES,
        *,
        is_outside: bool = False,
    ) -> None:
        # Synapse checks the size late, after it has fetched the prev_events.
        if not is_possible(pdu) or len(encode_canonical_json(pdu.get_pdu_json())) > _MAX_PDU_SIZE:
            return
        try:
            parked = attr.evolve(_parked_pdu_of(origin, pdu), is_outside=is_outside)
            received_ms = self._received.first_ms(pdu.event_id, self._homeserver.now_ms())
            field, sent_ms = pdu.get(_FIELD), pdu.origin_server_ts
            await fail(parked, StagedPdu(pdu.event_id, field, sent_ms, received_ms), why, verdict)
        except Exception:
            logger.exception("Could not park the sticky PDU %s", pdu.event_id)

    async def _may_be_in_room(self, room_id: str) -> bool:
        try:
            return bool(await self._store.is_host_joined(room_id, self._homeserver.server_name))
        except Exception:
            logger.exception("Could not find out whether this server is in %s", room_id)
            return False

    def _is_queued(self, pdu: EventBase) -> bool:
        queue = self._handler.room_queues.get(pdu.room_id)
        return bool(queue) and queue[-1][0] is pdu

    # Causes

    def verdict_of(self, e: Exception) -> Verdict | None:
        cause = self._cause_of(e)
        return None if cause is None else cause.verdict()

    def _cause_of(self, e: BaseException | None) -> Cause | None:
        """The first of the error and its causes that the table of causes knows; None if none is."""
        for _ in range(_DEPTH):
            if e is not None and (cause := Cause.of_database(e)):
                return cause
            if isinstance(e, SynapseError) and e.code >= 500:
                # An error that the persister itself answered with has no cause.
                if e.code == 502 and e.__cause__ is not None:
                    return Cause(is_unreachable=True, text=f"{e}: {e.__cause__!r}")
                handed_on = Cause.from_json(e.error_dict(None).get(_CAUSE))
                return handed_on or Cause(status=e.code, text=str(e))
            if e is None:
                break
            e = e.__cause__
        return None

    async def _lacking(self, pdu: EventBase) -> Reason | None:
        """Which of the events that it comes after are missing here; None if none is."""
        prev_event_ids, auth_event_ids = set(pdu.prev_event_ids()), set(pdu.auth_event_ids())
        try:
            if prev_event_ids - await self.persisted(prev_event_ids):
                return Reason.PREV_EVENTS
            if auth_event_ids - await self.existing(auth_event_ids):
                return Reason.AUTH_EVENTS
            return None
        except Exception as e:
            logger.exception("Could not find out whether the events before %s are here", pdu)
            passes = self.verdict_of(e) in (Verdict.PASSES, Verdict.UNKNOWN)
            return Reason.PREV_EVENTS if passes else None


def _handing_on(original: Callable[..., Any]) -> Callable[..., Any]:
    """In an event persister: answers an error of the database with its cause. Takes in when the
    events were received."""

    async def _handle_request(self: Any, request: Any, content: Any, *args: Any) -> Any:
        note_handed_on(self.federation_event_handler, content)
        try:
            return await original(self, request, content, *args)
        except Exception as e:
            read = getattr(self.federation_event_handler, _READS_CAUSE, None)
            cause: Cause | None = None if read is None else read(e)
            if cause is None or not cause.classes:
                raise
            # Synapse logs what it answers with 500 itself, but no SynapseError. What the database
            # says stays here: the answer may be passed on to whoever made the request.
            logger.exception("Could not persist events: %s", cause)
            message = "Internal server error"
            raise SynapseError(500, message, Codes.UNKNOWN, {_CAUSE: cause.to_json()}) from e

    return _handle_request


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
        ids_to_wait_for(pdu.prev_event_ids()),
        ids_to_wait_for(pdu.auth_event_ids()),
    )
