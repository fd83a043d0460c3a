"""Synapse's way into the sticky events stream, in a process that persists events."""

from collections.abc import Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

from synapse.api.constants import StickyEvent
from synapse.module_api import EventBase, LoggingTransaction
from synapse.types import StreamKeyType

from synapse_sticky._core import sticky_until_ms
from synapse_sticky.handlers.deferral.handler import DeferTxn, NewStickyEvent
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.attempt import attempt_txn
from synapse_sticky.homeserver.causes import Cause
from synapse_sticky.homeserver.database import found_txn, portions
from synapse_sticky.homeserver.received import Received
from synapse_sticky.homeserver.retention import Retention, earlier_end_ms
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, attributes, method, table
from synapse_sticky.homeserver.sticky_rows import stream_ids_txn
from synapse_sticky.homeserver.whole import still_whole
from synapse_sticky.index.key import key_of, newness_ms
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_METADATA = "synapse.synapse_rust.events.EventInternalMetadata"

SEAMS = (
    method(HOMESERVER, "get_notifier() -> Notifier"),
    method("synapse.notifier.Notifier", "on_new_event(stream_key, new_token, /, *, rooms)"),
    Attribute("synapse.config.workers.WriterLocations", "events"),
    Attribute("synapse.config.workers.WorkerConfig", "events_shard_config"),
    method(
        "synapse.config._base.ShardedWorkerHandlingConfig",
        "should_handle(instance_name, key, /) -> bool",
    ),
    method(STORE, "get_sticky_events_stream_token() -> MultiWriterStreamToken"),
    method(STORE, "get_sticky_events_stream_id_generator() -> MultiWriterIdGenerator"),
    method(
        "synapse.storage.util.id_generators.MultiWriterIdGenerator",
        "get_next_mult_txn(txn, n, /) -> list[int]",
    ),
    method(STORE, "insert_sticky_events_txn(txn, events)", is_replaced=True),
    method(STORE, "un_soft_fail_sticky_events_txn(txn, sticky_event_ids)", is_replaced=True),
    method(_METADATA, "is_outlier()"),
    method(_METADATA, "is_soft_failed()"),
    *attributes(_METADATA, "policy_server_spammy", "spam_checker_spammy", "stream_ordering"),
    table(
        "sticky_events",
        "stream_id integer, instance_name text, room_id text, event_id text, sender text, "
        "expires_at integer, event_stream_ordering integer",
    ),
    table("event_json", "event_id text"),
)

_FIELD: str = StickyEvent.EVENT_FIELD_NAME
_STREAM: Final = StreamKeyType.STICKY_EVENTS
_COLUMNS = "event_id, room_id, sender, expires_at, event_stream_ordering"


class SynapseWriter:
    """Implements ``handler.Writer``."""

    def __init__(self, homeserver: Homeserver, received: Received) -> None:
        self._homeserver = homeserver
        self._received = received
        self._store = homeserver.store
        self._retention = Retention(homeserver)
        self._notifier = homeserver.hs.get_notifier()
        worker = homeserver.hs.config.worker
        self._shards = worker.events_shard_config

    def handles(self, room_id: str) -> bool:
        return self._shards.should_handle(self._homeserver.instance_name, room_id)

    def defer_by(self, defer_txn: DeferTxn) -> None:
        def make_insert(original: Callable[..., None]) -> Callable[..., None]:
            def insert_sticky_events_txn(
                txn: LoggingTransaction, events: list[EventBase], *args: Any, **options: Any
            ) -> None:
                # All that is persisted comes by here.
                if not any(event.sticky_duration() is not None for event in events):
                    original(txn, events, *args, **options)
                    return
                new = self._kept_txn(txn, self._deliverable_txn(txn, events), events)
                deferred = self._defer_txn(defer_txn, txn, new)
                now = [event for event in events if event.event_id not in deferred]
                original(txn, now, *args, **options)

            return insert_sticky_events_txn

        def make_un_soft_fail(original: Callable[..., None]) -> Callable[..., None]:
            def un_soft_fail_sticky_events_txn(
                txn: LoggingTransaction,
                sticky_event_ids: AbstractSet[str],
                *args: Any,
                **options: Any,
            ) -> None:
                # Synapse enters these events anew. Only then do they become deliverable.
                original(txn, sticky_event_ids, *args, **options)
                if sticky_event_ids:
                    entered = self._entered_txn(txn, sticky_event_ids)
                    deferred = self._defer_txn(defer_txn, txn, entered)
                    self._delete_txn(txn, [e for e in entered if e.event_id in deferred])

            return un_soft_fail_sticky_events_txn

        replace = self._homeserver.replace
        replace(self._store, "insert_sticky_events_txn", make_insert)
        replace(self._store, "un_soft_fail_sticky_events_txn", make_un_soft_fail)

    def _defer_txn(
        self, defer_txn: DeferTxn, txn: Cursor, events: Sequence[NewStickyEvent]
    ) -> Collection[str]:
        try:
            return defer_txn(txn, events)
        except Exception as e:
            if Cause.of_database(e) is not None:
                raise  # the transaction is no good any more, and Synapse may try it again
            logger.exception("Could not defer any of %d sticky events", len(events))
            return ()

    def attempt_txn(self, txn: Cursor, change: Callable[[], None]) -> Exception | None:
        return attempt_txn(self._homeserver, txn, change)

    def _deliverable_txn(self, txn: Cursor, events: Sequence[EventBase]) -> list[NewStickyEvent]:
        """The events that Synapse would enter into the stream and deliver from it."""
        try:
            now_ms = self._homeserver.now_ms()
            # Reading a field of an event takes microseconds, and most events have none of it.
            sticky = [(e, e.get(_FIELD)) for e in events if e.sticky_duration() is not None]
            found = [(e, field) for e, field in sticky if _deliverable(e, field, now_ms, now_ms)]
            self._received.learn_txn(txn, [e.event_id for e, _ in found if not self._is_own(e)])
            deliverable = (
                _deliverable(e, field, self._received.first_ms(e.event_id, now_ms), now_ms)
                for e, field in found
            )
            return [new for new in deliverable if new is not None]
        except Exception as e:
            if Cause.of_database(e) is not None:
                raise  # as in ``_defer_txn``
            logger.exception("Could not read %d events, deferring none of them", len(events))
            return []

    def _kept_txn(
        self, txn: Cursor, new: Sequence[NewStickyEvent], events: Sequence[EventBase]
    ) -> list[NewStickyEvent]:
        """Those of the new events that this server keeps (S2). Each has the end of its own: whoever
        reads the rows goes by the policy of then, which may be longer."""
        if not new or not self._retention.is_on:
            return list(new)
        sent_ms = {event.event_id: event.origin_server_ts for event in events}
        lifetimes_ms = self._retention.lifetimes_txn(txn, {event.room_id for event in new})
        now_ms = self._homeserver.now_ms()
        kept = []
        for event in new:
            lifetime_ms = lifetimes_ms.get(event.room_id)
            ends_ms = earlier_end_ms(event.expires_at_ms, sent_ms[event.event_id], lifetime_ms)
            if now_ms < ends_ms:
                kept.append(event)
        return kept

    def _is_own(self, event: EventBase) -> bool:
        return event.sender.partition(":")[2] == self._homeserver.server_name

    def _entered_txn(self, txn: Cursor, event_ids: AbstractSet[str]) -> list[NewStickyEvent]:
        """The unexpired events of these in the stream, in its order; as keys of their own, since
        they are few and their content is not at hand."""
        found: list[tuple[Any, ...]] = []
        for portion in portions(stream_ids_txn(self._homeserver, txn, event_ids).values()):
            clause, args = self._homeserver.in_list("stream_id", portion)
            txn.execute(
                f"SELECT stream_id, {_COLUMNS} FROM sticky_events"
                f" WHERE ? < expires_at AND {clause}",
                (self._homeserver.now_ms(), *args),
            )
            found += txn.fetchall()
        return [NewStickyEvent(*row) for _, *row in sorted(found)]

    def _delete_txn(self, txn: Cursor, events: Sequence[NewStickyEvent]) -> None:
        for portion in portions(event.event_stream_ordering for event in events):
            clause, args = self._homeserver.in_list("event_stream_ordering", portion)
            txn.execute(f"DELETE FROM sticky_events WHERE {clause}", args)

    def enter_txn(self, txn: Cursor, events: Sequence[NewStickyEvent]) -> None:
        events = self._missing_txn(txn, events)
        if not events:
            return
        ids = self._store.get_sticky_events_stream_id_generator()
        stream_ids = ids.get_next_mult_txn(txn, len(events))
        txn.execute_batch(
            f"INSERT INTO sticky_events (stream_id, instance_name, {_COLUMNS})"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    stream_id,
                    self._homeserver.instance_name,
                    event.event_id,
                    event.room_id,
                    event.sender,
                    event.expires_at_ms,
                    event.event_stream_ordering,
                )
                for stream_id, event in zip(stream_ids, events, strict=True)
            ],
        )

    def _missing_txn(self, txn: Cursor, events: Sequence[NewStickyEvent]) -> list[NewStickyEvent]:
        """The events that are in the database and not in the stream."""
        there = self._existing_txn(txn, [event.event_id for event in events])
        # The table has no index by event ID.
        entered = found_txn(
            self._homeserver,
            txn,
            "SELECT event_stream_ordering FROM sticky_events WHERE",
            "event_stream_ordering",
            (event.event_stream_ordering for event in events),
        )
        return [
            event
            for event in events
            if event.event_id in there and event.event_stream_ordering not in entered
        ]

    def _existing_txn(self, txn: Cursor, event_ids: Collection[str]) -> set[str]:
        select = "SELECT event_id FROM event_json WHERE"
        return found_txn(self._homeserver, txn, select, "event_id", event_ids)

    async def existing(self, event_ids: Collection[str]) -> set[str]:
        return await self._homeserver.transact("existing", self._existing_txn, event_ids)

    async def still_sticky(self, event_ids: Collection[str]) -> set[str]:
        whole = await still_whole(self._homeserver, event_ids)
        return {
            event_id
            for event_id, event in whole.items()
            if event.sticky_duration() is not None and not event.internal_metadata.is_soft_failed()
        }

    def wake(self, room_ids: Collection[str]) -> None:
        self._notifier.on_new_event(
            _STREAM,
            self._store.get_sticky_events_stream_token(),
            rooms=list(room_ids),
        )


def _deliverable(
    event: EventBase, field: object, received_ms: int, now_ms: int
) -> NewStickyEvent | None:
    metadata = event.internal_metadata
    expires_at_ms = sticky_until_ms(field, event.origin_server_ts, received_ms)
    if (
        expires_at_ms is None
        or expires_at_ms <= now_ms
        or event.rejected_reason is not None
        or metadata.is_outlier()
        or metadata.is_soft_failed()
        or metadata.policy_server_spammy
        or metadata.spam_checker_spammy
        or metadata.stream_ordering is None
    ):
        return None
    return NewStickyEvent(
        event.event_id,
        event.room_id,
        event.sender,
        expires_at_ms,
        metadata.stream_ordering,
        key_of(event.type, event.content),
        newness_ms(field, event.origin_server_ts),
    )
