"""The staging area of inbound PDUs, what Synapse prunes of it, and what becomes of the others."""

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attr
from canonicaljson import encode_canonical_json
from synapse.api.constants import MAX_PDU_SIZE, EventContentFields, StickyEvent
from synapse.api.errors import SynapseError
from synapse.api.room_versions import EventFormatVersions, RoomVersion
from synapse.events import EventBase, relation_from_event
from synapse.federation.federation_server import _INBOUND_EVENT_HANDLING_LOCK_NAME
from synapse.metrics import SERVER_NAME_LABEL
from synapse.storage.database import LoggingTransaction, make_in_list_sql_clause
from synapse.storage.databases.main.event_federation import pdus_pruned_from_federation_queue
from synapse.util.duration import Duration
from synapse.util.json import json_decoder, json_encoder

from synapse_sticky.adapter import hooks
from synapse_sticky.adapter.listeners import serves
from synapse_sticky.homeserver import Cursor, IncompletePdu, StagedEvent

if TYPE_CHECKING:
    from synapse.server import HomeServer

logger = logging.getLogger(__name__)

_PRUNE_FROM = 100
"""How many PDUs may be staged for a room before Synapse prunes."""

_ROOMS_REMEMBERED = 64
_MAX_PREV_EVENTS = 20
_MAX_AUTH_EVENTS = 10


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _Staged:
    keep: bool
    prev_event_ids: tuple[str, ...]


def start_on_staged_events(server: Any, clock: Any) -> None:
    """Begins with what an earlier run left, if that has not begun."""
    if not hooks.attribute(server, "_started_handling_of_staged_events"):
        server._started_handling_of_staged_events = True
        server._handle_old_staged_events()
        clock.looping_call(server._handle_old_staged_events, Duration(minutes=1))


class SynapseStaging:
    """Implements ``homeserver.Staging``."""

    def __init__(self, hs: "HomeServer") -> None:
        self._store: Any = hs.get_datastores().main
        self._replace = hooks.replace(
            self._store, "prune_staged_events_in_room", "room_id", "room_version"
        )
        self._clock = hs.get_clock()
        self._server = hs.get_federation_server() if serves(hs, "federation") else None
        self._handler = hs.get_federation_event_handler()
        hooks.method(self._store, "have_events_in_timeline", "event_ids")
        hooks.method(self._store, "is_host_joined", "room_id", "host")
        self._server_name = hs.hostname
        errors = self._store.database_engine.module
        self._database_errors = (errors.OperationalError, errors.InterfaceError)
        hooks.attribute(self._handler, "room_queues")
        self._replace_on_receive_pdu = hooks.replace(
            self._handler, "on_receive_pdu", "origin", "pdu"
        )
        # Pruning is considered after every single PDU of a busy room. What is known of the
        # waiting ones is remembered, so that each is read and parsed once.
        self._known: OrderedDict[str, dict[str, _Staged]] = OrderedDict()

    def keep_from_pruning(self, keep: Callable[[StagedEvent], bool]) -> None:
        async def prune(room_id: str, room_version: RoomVersion) -> bool:
            try:
                to_delete = await self._to_delete(room_id, room_version, keep)
                if not to_delete:
                    return False
                logger.info("Pruning %d staged PDUs of %s", len(to_delete), room_id)
                await self._store.db_pool.simple_delete_many(
                    table="federation_inbound_events_staging",
                    column="event_id",
                    iterable=to_delete,
                    keyvalues={"room_id": room_id},
                    desc="synapse_sticky_prune_staged",
                )
                counter = pdus_pruned_from_federation_queue
                counter.labels(**{SERVER_NAME_LABEL: self._server_name}).inc(len(to_delete))
                return True
            except Exception:
                # Pruning is housekeeping: leaving it out this time loses nothing.
                logger.exception("Could not prune the staged PDUs of %s", room_id)
                return False

        self._replace(prune)

    def process_what_is_left(self) -> None:
        if self._server is not None:
            start_on_staged_events(self._server, self._clock)

    async def process(self, room_id: str) -> None:
        if self._server is None:
            return
        room_version = await self._store.get_room_version(room_id)
        lock = await self._store.try_acquire_lock(_INBOUND_EVENT_HANDLING_LOCK_NAME, room_id)
        if lock:  # else whoever has it goes on until nothing is left
            self._server._process_incoming_pdus_in_room_inner(room_id, room_version, lock)

    def set_aside(self, take: Callable[[IncompletePdu, StagedEvent, str], Awaitable[None]]) -> None:
        original = self._handler.on_receive_pdu

        async def keep(origin: str, pdu: EventBase, why: str) -> None:
            # It is checked late, after the prev_events have been fetched.
            if len(encode_canonical_json(pdu.get_pdu_json())) > MAX_PDU_SIZE:
                return
            try:
                await take(_incomplete(origin, pdu), self._staged(pdu), why)
            except Exception:
                logger.exception("Could not set the sticky PDU %s aside", pdu.event_id)

        async def on_receive_pdu(origin: str, pdu: EventBase) -> None:
            if self._staged(pdu).sticky_field is None or not _is_possible(pdu):
                await original(origin, pdu)
                return
            in_room = await self._may_be_in_room(pdu.room_id)
            try:
                await original(origin, pdu)
            except Exception as e:
                # Synapse drops it.
                if self._may_go_well_later(e):
                    await keep(origin, pdu, "it could not be persisted for now")
                elif await self._lacks_prev_events(pdu):
                    await keep(origin, pdu, "its prev_events cannot be fetched for now")
                raise
            # Who joins the room is the main process; it has what comes to it meanwhile in memory
            # only, and others ignore it. By then it has left the staging area.
            if self._is_queued(pdu):
                await keep(origin, pdu, "the room is being joined")
            elif not in_room:
                await keep(origin, pdu, "this server is not in the room, or not yet")

        hooks.replace(self._handler, "on_receive_pdu", "origin", "pdu")(on_receive_pdu)

    async def _may_be_in_room(self, room_id: str) -> bool:
        try:
            return bool(await self._store.is_host_joined(room_id, self._server_name))
        except Exception:
            logger.exception("Could not look whether this server is in %s", room_id)
            return False

    def _is_queued(self, pdu: EventBase) -> bool:
        queue = self._handler.room_queues.get(pdu.room_id)
        return queue is not None and len(queue) > 0 and queue[-1][0] is pdu

    def holds_up(self, room_id: str) -> bool:
        return room_id in self._handler.room_queues

    def _is_passing(self, e: Exception) -> bool:
        """Does the database fail, or is the event persister away?"""
        # Synapse wraps some.
        if isinstance(e, self._database_errors) or isinstance(e.__cause__, self._database_errors):
            return True
        # An answer of the persister has no cause.
        return isinstance(e, SynapseError) and e.code == 502 and e.__cause__ is not None

    def _may_go_well_later(self, e: Exception) -> bool:
        # What fails in the persister, its database perhaps, is an answer with an error here.
        return self._is_passing(e) or (isinstance(e, SynapseError) and e.code >= 500)

    async def _lacks_prev_events(self, pdu: EventBase) -> bool:
        prev_event_ids = set(pdu.prev_event_ids())
        try:
            return bool(prev_event_ids - await self.persisted(prev_event_ids))
        except Exception as e:
            logger.exception("Could not look for the prev_events of %s", pdu.event_id)
            return isinstance(e, self._database_errors)

    async def persisted(self, event_ids: Collection[str]) -> set[str]:
        there: set[str] = await self._store.have_events_in_timeline(event_ids)
        return there

    def stage_txn(self, txn: Cursor, room_id: str, pdus: Sequence[IncompletePdu]) -> None:
        # Synapse gets stuck on what is staged for a room that it does not know.
        txn.execute("SELECT 1 FROM rooms WHERE room_id = ?", (room_id,))
        if txn.fetchone() is None:
            return
        now_ms = self._clock.time_msec()
        txn.execute_batch(
            "INSERT INTO federation_inbound_events_staging"
            " (origin, event_id, room_id, received_ts, event_json, internal_metadata)"
            " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (origin, event_id) DO NOTHING",
            # They are processed in the order of the time, which is to be one.
            [
                (
                    *(pdu.origin, pdu.event_id, room_id, now_ms + number),
                    *(pdu.event_json, pdu.internal_metadata),
                )
                for number, pdu in enumerate(pdus)
            ],
        )

    def retry_processing(self, again: Callable[[StagedEvent, int], int | None]) -> None:
        original = self._handler.on_receive_pdu

        async def on_receive_pdu(origin: str, pdu: EventBase) -> None:
            failures = 0
            while True:
                try:
                    return await original(origin, pdu)
                except Exception as e:
                    failures += 1
                    is_passing = self._is_passing(e)
                    delay_ms = again(self._staged(pdu), failures) if is_passing else None
                    if delay_ms is None:
                        raise
                    logger.warning(
                        "Could not process the sticky PDU %s, trying again in %d ms: %s",
                        pdu.event_id,
                        delay_ms,
                        e.__cause__ or e,
                    )
                await self._clock.sleep(Duration(milliseconds=delay_ms))

        self._replace_on_receive_pdu(on_receive_pdu)

    def _staged(self, pdu: EventBase) -> StagedEvent:
        field = pdu.get_dict().get(StickyEvent.EVENT_FIELD_NAME)
        return StagedEvent(pdu.event_id, field, pdu.origin_server_ts, self._clock.time_msec())

    async def _to_delete(
        self, room_id: str, room_version: RoomVersion, keep: Callable[[StagedEvent], bool]
    ) -> set[str]:
        """The event IDs to prune: as Synapse does it, but for what is to be kept.

        Never Synapse itself: what is staged between its look at the area and this one is to be
        kept, too.
        """
        store = self._store
        known = self._known.get(room_id, {})

        def read_txn(
            txn: LoggingTransaction,
        ) -> tuple[list[str], list[tuple[str, str, int]]] | None:
            txn.execute(
                "SELECT event_id FROM federation_inbound_events_staging WHERE room_id = ?",
                (room_id,),
            )
            staged = [event_id for (event_id,) in txn]
            if len(staged) < _PRUNE_FROM:
                return None
            unknown = [event_id for event_id in staged if event_id not in known]
            if not unknown:
                return staged, []
            clause, args = make_in_list_sql_clause(store.database_engine, "event_id", unknown)
            txn.execute(
                "SELECT event_id, event_json, received_ts"
                f" FROM federation_inbound_events_staging WHERE room_id = ? AND {clause}",
                (room_id, *args),
            )
            return staged, [(row[0], row[1], row[2]) for row in txn]

        found = await store.db_pool.runInteraction("synapse_sticky_read_staged", read_txn)
        if found is None:
            self._known.pop(room_id, None)
            return set()
        staged, new = found

        v1_format = room_version.event_format == EventFormatVersions.ROOM_V1_V2
        now_known = {event_id: known[event_id] for event_id in staged if event_id in known}
        for event_id, event_json, received_ts_ms in new:
            content = json_decoder.decode(event_json)
            now_known[event_id] = _Staged(
                keep(
                    StagedEvent(
                        event_id,
                        content.get(StickyEvent.EVENT_FIELD_NAME),
                        content.get("origin_server_ts"),
                        received_ts_ms,
                    )
                ),
                _prev_event_ids(content, v1_format),
            )
        self._known[room_id] = now_known
        self._known.move_to_end(room_id)
        while len(self._known) > _ROOMS_REMEMBERED:
            self._known.popitem(last=False)

        referenced = {p for s in now_known.values() for p in s.prev_event_ids}
        return {e for e, s in now_known.items() if e in referenced and not s.keep}


def _is_possible(pdu: EventBase) -> bool:
    """May it ever be taken in? Synapse takes no more prev_events and auth_events than that, and
    Postgres has no text with NUL in it, nor can it be asked for one."""
    prev_event_ids, auth_event_ids = pdu.prev_event_ids(), pdu.auth_event_ids()
    return (
        len(set(prev_event_ids)) <= _MAX_PREV_EVENTS
        and len(auth_event_ids) <= _MAX_AUTH_EVENTS
        and not any("\0" in text for text in (*prev_event_ids, *auth_event_ids, *_texts(pdu)))
    )


def _texts(pdu: EventBase) -> Iterator[str]:
    """What of the PDU goes into columns of its own."""
    labels = pdu.content.get(EventContentFields.LABELS)
    relation = relation_from_event(pdu)
    for field in (
        *(pdu.type, pdu.get("state_key"), pdu.redacts),
        *((relation.parent_id, relation.rel_type, relation.aggregation_key) if relation else ()),
        *(labels if isinstance(labels, list | tuple) else ()),
    ):
        if isinstance(field, str):
            yield field


def _incomplete(origin: str, pdu: EventBase) -> IncompletePdu:
    return IncompletePdu(
        origin,
        pdu.event_id,
        pdu.room_id,
        json_encoder.encode(pdu.get_dict()),
        json_encoder.encode(pdu.internal_metadata.get_dict()),
        tuple(pdu.prev_event_ids()),
    )


def _prev_event_ids(content: Any, v1_format: bool) -> tuple[str, ...]:
    prev_events = content.get("prev_events")
    if not isinstance(prev_events, list):
        return ()
    if v1_format:
        prev_events = [p[0] for p in prev_events if isinstance(p, list) and p]
    return tuple(p for p in prev_events if isinstance(p, str))
