"""The sticky events stream: Synapse's table, its positions and what changes an event later."""

import functools
import logging
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from immutabledict import immutabledict
from synapse.replication.tcp.streams._base import StickyEventsStream
from synapse.storage.database import LoggingTransaction, make_in_list_sql_clause
from synapse.types import MultiWriterStreamToken
from synapse.util.json import json_decoder

from synapse_sticky.adapter import hooks
from synapse_sticky.homeserver import Position, StickyRow

if TYPE_CHECKING:
    from synapse.server import HomeServer

logger = logging.getLogger(__name__)

_COLUMNS = """
    SELECT se.stream_id, se.instance_name, se.room_id, se.event_id, se.sender, se.expires_at,
        ej.internal_metadata,
        EXISTS (SELECT 1 FROM redactions AS r WHERE r.redacts = se.event_id) OR EXISTS (
            SELECT 1 FROM room_ban_redactions AS b
            WHERE b.room_id = se.room_id AND b.user_id = se.sender
        )
    FROM sticky_events AS se
    INNER JOIN event_json AS ej ON ej.event_id = se.event_id
"""


class SynapseStickyStream:
    """Implements ``homeserver.StickyStream``."""

    def __init__(self, hs: "HomeServer") -> None:
        # Any, as in all of the adapter: Synapse's cached methods are typed by a plugin that it does
        # not ship.
        self._store: Any = hs.get_datastores().main
        self._notifier = hs.get_notifier()
        self._clock = hs.get_clock()
        self._own_senders = f"%:{hs.hostname}"
        self.writers: Sequence[str] = hs.config.worker.writers.events
        self._token = hooks.method(self._store, "get_sticky_events_stream_token")
        hooks.method(self._store, "_invalidate_local_get_event_cache", "event_id")
        hooks.method(
            self._store,
            "_invalidate_caches_for_event",
            *("stream_ordering", "event_id", "room_id", "etype", "state_key", "redacts"),
            *("relates_to", "backfilled"),
        )
        hooks.method(self._store, "_invalidate_local_get_event_cache_room_id", "room_id")
        hooks.method(
            self._store, "process_replication_rows", "stream_name", "instance_name", "token", "rows"
        )
        self._persisted_event: str | None = None
        self._takes_new_rows = False
        self._notes_new_events = False

    def positions(self) -> dict[str, int]:
        token = self._token()
        return {writer: token.get_stream_pos_for_instance(writer) for writer in self.writers}

    async def rows(self, *, after: int, up_to: int, limit: int) -> list[StickyRow]:
        return await self._rows(
            "WHERE ? < se.stream_id AND se.stream_id <= ? AND ? < se.expires_at "
            "ORDER BY se.stream_id LIMIT ?",
            (after, up_to, self._clock.time_msec(), limit),
        )

    async def rows_of(self, event_ids: Collection[str]) -> list[StickyRow]:
        clause, args = make_in_list_sql_clause(
            self._store.database_engine, "se.event_id", event_ids
        )
        return await self._rows(f"WHERE {clause}", args)

    async def last_rows(self, room_id: str) -> dict[str, int]:
        def read_txn(txn: LoggingTransaction) -> dict[str, int]:
            txn.execute(
                "SELECT instance_name, MAX(stream_id) FROM sticky_events"
                " WHERE room_id = ? AND ? < expires_at AND sender LIKE ? GROUP BY instance_name",
                (room_id, self._clock.time_msec(), self._own_senders),
            )
            return dict(txn.fetchall())

        last: dict[str, int] = await self._store.db_pool.runInteraction(
            "synapse_sticky_last_rows", read_txn
        )
        return last

    async def _rows(self, where: str, args: Sequence[Any]) -> list[StickyRow]:
        def read_txn(txn: LoggingTransaction) -> list[tuple[Any, ...]]:
            txn.execute(_COLUMNS + where, args)
            return txn.fetchall()

        found = await self._store.db_pool.runInteraction("synapse_sticky_read_rows", read_txn)

        # A redaction counts only where Synapse itself applies it: it may be invalid.
        still_sticky = set()
        if disputed := [row[3] for row in found if row[7]]:
            events = await self._store.get_events(disputed, allow_rejected=False)
            still_sticky = {
                event_id for event_id, event in events.items() if event.sticky_duration()
            }
        return [
            StickyRow(
                stream_id=stream_id,
                instance_name=instance_name,
                room_id=room_id,
                event_id=event_id,
                sender=sender,
                expires_at_ms=expires_at_ms,
                deliverable=not json_decoder.decode(metadata).get("soft_failed", False)
                and (not disputed_row or event_id in still_sticky),
            )
            for (
                stream_id,
                instance_name,
                room_id,
                event_id,
                sender,
                expires_at_ms,
                metadata,
                disputed_row,
            ) in found
        ]

    def on_advance(self, callback: Callable[[], None]) -> None:
        self._notifier.add_replication_callback(callback)

    def on_event_changed(self, callback: Callable[[str], None]) -> None:
        # Synapse drops an event from its cache in every process whenever a redaction, a purge or
        # a change of soft-failure makes the cached copy untrue: that is what is needed here too.
        # It does so for each new event as well, and for each new row of the stream, which is read
        # anyway; and that would be a query for each.
        if not self._notes_new_events:
            self._notes_new_events = True
            self._note_persisted_events()
            self._note_new_rows()

        def changed(event_id: str) -> None:
            if event_id != self._persisted_event and not self._takes_new_rows:
                callback(event_id)

        self._after("_invalidate_local_get_event_cache", changed)

    def _note_new_rows(self) -> None:
        original = self._store.process_replication_rows

        @functools.wraps(original)
        def process_replication_rows(stream_name: str, *args: Any, **kwargs: Any) -> None:
            self._takes_new_rows = stream_name == StickyEventsStream.NAME
            try:
                original(stream_name, *args, **kwargs)
            finally:
                self._takes_new_rows = False

        self._store.process_replication_rows = process_replication_rows

    def _note_persisted_events(self) -> None:
        original = self._store._invalidate_caches_for_event

        @functools.wraps(original)
        def invalidate_caches_for_event(
            stream_ordering: int, event_id: str, *args: Any, **kwargs: Any
        ) -> None:
            self._persisted_event = event_id
            try:
                original(stream_ordering, event_id, *args, **kwargs)
            finally:
                self._persisted_event = None

        self._store._invalidate_caches_for_event = invalidate_caches_for_event

    def on_room_purged(self, callback: Callable[[str], None]) -> None:
        self._after("_invalidate_local_get_event_cache_room_id", callback)

    def _after(self, name: str, callback: Callable[[str], None]) -> None:
        original = hooks.attribute(self._store, name)

        def invalidate(changed: Any) -> None:
            original(changed)
            # What an event says that it redacts is anything at all; and what comes after this
            # must come, whatever fails here.
            if not isinstance(changed, str) or "\0" in changed:
                return
            try:
                callback(changed)
            except Exception:
                logger.exception("Could not note that %r changed", changed)

        setattr(self._store, name, invalidate)


def token_of(position: Position) -> MultiWriterStreamToken:
    """The position as Synapse's token."""
    ahead = {w: at for w, at in position.writers.items() if at > position.stream_id}
    return MultiWriterStreamToken(stream=position.stream_id, instance_map=immutabledict(ahead))


def position_of(token: MultiWriterStreamToken) -> Position:
    """Synapse's token in this project's words."""
    return Position(token.stream, token.instance_map)
