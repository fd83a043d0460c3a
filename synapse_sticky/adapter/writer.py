"""Entering events into the sticky events stream."""

import logging
from collections.abc import Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from synapse.events import EventBase
from synapse.storage.database import LoggingTransaction, make_in_list_sql_clause
from synapse.types import StreamKeyType

from synapse_sticky.adapter import hooks
from synapse_sticky.homeserver import Cursor, NewStickyEvent

if TYPE_CHECKING:
    from synapse.server import HomeServer

logger = logging.getLogger(__name__)

Hold = Callable[[Cursor, Sequence[NewStickyEvent]], Collection[str]]

_COLUMNS = "event_id, room_id, sender, expires_at, event_stream_ordering"


class SynapseStickyWriter:
    """Implements ``homeserver.StickyWriter``."""

    def __init__(self, hs: "HomeServer") -> None:
        self._store: Any = hs.get_datastores().main
        self._clock = hs.get_clock()
        self._notifier = hs.get_notifier()
        self._instance_name = hs.get_instance_name()
        self._shards = hs.config.worker.events_shard_config
        self.writes = self._instance_name in hs.config.worker.writers.events
        self._ids: Any = hooks.attribute(self._store, "_sticky_events_id_gen")
        hooks.method(self._ids, "get_next_mult_txn", "txn", "n")
        hooks.method(self._notifier, "on_new_event", "stream_key", "new_token", "users", "rooms")
        self._replace_insert = hooks.replace(
            self._store, "insert_sticky_events_txn", "txn", "events"
        )
        self._replace_un_soft_fail = hooks.replace(
            self._store, "un_soft_fail_sticky_events_txn", "txn", "sticky_event_ids"
        )

    def handles(self, room_id: str) -> bool:
        return self.writes and self._shards.get_instance(room_id) == self._instance_name

    def hold_back(self, hold_txn: Hold) -> None:
        insert_original = self._store.insert_sticky_events_txn
        un_soft_fail_original = self._store.un_soft_fail_sticky_events_txn

        def insert(txn: LoggingTransaction, events: list[EventBase]) -> None:
            held = self._held(hold_txn, txn, self._deliverable(events))
            insert_original(txn, [event for event in events if event.event_id not in held])

        def un_soft_fail(txn: LoggingTransaction, sticky_event_ids: AbstractSet[str]) -> None:
            un_soft_fail_original(txn, sticky_event_ids)
            if not sticky_event_ids:
                return
            clause, args = make_in_list_sql_clause(
                self._store.database_engine, "event_id", sticky_event_ids
            )
            txn.execute(
                f"SELECT {_COLUMNS} FROM sticky_events WHERE ? < expires_at AND {clause}"
                " ORDER BY stream_id",
                (self._clock.time_msec(), *args),
            )
            held = self._held(hold_txn, txn, [NewStickyEvent(*row) for row in txn.fetchall()])
            if held:
                clause, args = make_in_list_sql_clause(
                    self._store.database_engine, "event_id", held
                )
                txn.execute(f"DELETE FROM sticky_events WHERE {clause}", args)

        self._replace_insert(insert)
        self._replace_un_soft_fail(un_soft_fail)

    def _deliverable(self, events: Sequence[EventBase]) -> list[NewStickyEvent]:
        """Those that would be in the stream and be delivered from it, as Synapse decides it."""
        now_ms = self._clock.time_msec()
        deliverable = []
        for event in events:
            metadata = event.internal_metadata
            duration = event.sticky_duration()
            if (
                duration is None
                or event.rejected_reason is not None
                or metadata.is_outlier()
                or metadata.is_soft_failed()
                or metadata.policy_server_spammy
                or metadata.spam_checker_spammy
                or metadata.stream_ordering is None
            ):
                continue
            expires_at_ms = min(event.origin_server_ts, now_ms) + duration.as_millis()
            if expires_at_ms > now_ms:
                deliverable.append(
                    NewStickyEvent(
                        event.event_id,
                        event.room_id,
                        event.sender,
                        expires_at_ms,
                        metadata.stream_ordering,
                    )
                )
        return deliverable

    def _held(
        self, hold_txn: Hold, txn: LoggingTransaction, events: list[NewStickyEvent]
    ) -> Collection[str]:
        if not events:
            return ()
        try:
            return hold_txn(txn, events)
        except self._store.database_engine.module.Error:
            raise  # the transaction is no good any more, and Synapse may try it again
        except Exception:
            logger.exception("Could not decide on %d sticky events, entering them", len(events))
            return ()

    def enter_txn(self, txn: Cursor, events: Sequence[NewStickyEvent]) -> None:
        if not events:
            return
        clause, args = make_in_list_sql_clause(
            self._store.database_engine, "event_id", [event.event_id for event in events]
        )
        # Purged events are gone, and what is in the stream already has been delivered.
        txn.execute(
            f"SELECT event_id FROM events WHERE {clause} AND NOT EXISTS"
            " (SELECT 1 FROM sticky_events AS se"
            " WHERE se.event_stream_ordering = events.stream_ordering)",
            args,
        )
        there = {event_id for (event_id,) in txn.fetchall()}
        events = [event for event in events if event.event_id in there]
        stream_ids = self._ids.get_next_mult_txn(txn, len(events)) if events else []
        txn.execute_batch(
            "INSERT INTO sticky_events"
            f" (stream_id, instance_name, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    stream_id,
                    self._instance_name,
                    event.event_id,
                    event.room_id,
                    event.sender,
                    event.expires_at_ms,
                    event.event_stream_ordering,
                )
                for stream_id, event in zip(stream_ids, events, strict=True)
            ],
        )

    async def still_sticky(self, event_ids: Collection[str]) -> set[str]:
        events = await self._store.get_events(event_ids, allow_rejected=False)
        return {
            event_id
            for event_id, event in events.items()
            if event.sticky_duration() is not None and not event.internal_metadata.is_soft_failed()
        }

    def wake(self, room_ids: Collection[str]) -> None:
        self._notifier.on_new_event(
            StreamKeyType.STICKY_EVENTS,
            self._store.get_sticky_events_stream_token(),
            rooms=list(room_ids),
        )
