"""The sticky events stream: Synapse's table, its positions and what changes an event later."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from synapse.api.constants import StickyEvent
from synapse.module_api import EventBase, LoggingTransaction

from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.causes import Cause
from synapse_sticky.homeserver.database import portions
from synapse_sticky.homeserver.fitting import misfits
from synapse_sticky.homeserver.retention import Retention
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, method, table
from synapse_sticky.homeserver.sticky_rows import stream_ids_txn
from synapse_sticky.homeserver.whole import still_whole
from synapse_sticky.index.dropped import then_told
from synapse_sticky.index.key import MOST_READ_BYTES, read_json
from synapse_sticky.index.redactions.synapse import UserRedactions
from synapse_sticky.index.stream import StickyRow
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_IDS = "synapse.storage.util.id_generators.MultiWriterIdGenerator"

SEAMS = {
    "rows": (
        table(
            "sticky_events",
            "stream_id integer, instance_name text, room_id text, event_id text, sender text, "
            "expires_at integer",
        ),
        table("event_json", "event_id text, internal_metadata text, json text"),
        table("redactions", "redacts text"),
        table("room_ban_redactions", "room_id text, user_id text"),
        table("erased_users", "user_id text"),
    ),
    "changes": (
        method(STORE, "_invalidate_local_get_event_cache(event_id)", is_replaced=True),
        method(STORE, "_invalidate_caches_for_event(stream_ordering, event_id)", is_replaced=True),
        method(STORE, "process_replication_rows(stream_name)", is_replaced=True),
    ),
    "purges": (
        method(STORE, "_invalidate_caches_for_room_events(room_id)", is_replaced=True),
        table("sticky_events", "room_id text, event_id text"),
        table("events", "event_id text"),
    ),
    "stream": (
        Attribute("synapse.config.workers.WorkerConfig", "writers"),
        Attribute("synapse.config.workers.WriterLocations", "events"),
        method(STORE, "get_sticky_events_stream_id_generator() -> MultiWriterIdGenerator"),
        method(_IDS, "get_current_token() -> int"),
        method(_IDS, "get_positions() -> dict"),
        method(HOMESERVER, "get_notifier() -> Notifier"),
        method("synapse.notifier.Notifier", "add_replication_callback(cb, /)"),
    ),
    "persisted": (
        method(STORE, "insert_sticky_events_txn(txn, events)", is_replaced=True),
        Attribute("synapse.synapse_rust.events.EventInternalMetadata", "stream_ordering"),
        table("sticky_events", "room_id text, event_stream_ordering integer"),
    ),
}
"""By what is used: the rows, changes of single events, purges, the stream itself; and what
this process persists, without which each row is read after it is persisted."""

_COLUMNS = """
    SELECT se.stream_id, se.instance_name, se.room_id, se.event_id, se.sender, se.expires_at,
        ej.internal_metadata,
        EXISTS (SELECT 1 FROM redactions AS r WHERE r.redacts = se.event_id) OR EXISTS (
            SELECT 1 FROM room_ban_redactions AS b
            WHERE b.room_id = se.room_id AND b.user_id = se.sender
        ),
        EXISTS (SELECT 1 FROM erased_users AS eu WHERE eu.user_id = se.sender),
        {size}, CASE WHEN {size} <= {most} THEN ej.json END {retention}
    FROM sticky_events AS se
    INNER JOIN event_json AS ej ON ej.event_id = se.event_id
"""


_SIZE_ON_SQLITE = "LENGTH(CAST(ej.json AS BLOB))"
_FIELD: str = StickyEvent.EVENT_FIELD_NAME


class SynapseStickyStream:
    """Implements ``index.Stream``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        self._retention = Retention(homeserver)
        size = "OCTET_LENGTH(ej.json)" if homeserver.is_postgres else _SIZE_ON_SQLITE
        self._columns = _COLUMNS.format(
            size=size, most=MOST_READ_BYTES, retention=self._retention.columns
        )
        self._own_senders = f"%:{homeserver.server_name}"
        # What is called back with the IDs of events that have changed, and of purged rooms.
        self._of_events: list[Callable[[str], None]] = []
        self._of_rooms: list[Callable[[str], None]] = []
        self._persisted_event: str | None = None
        self._takes_new_rows = False
        self._user_redactions = UserRedactions(homeserver)

    # Who asks for rows needs nothing of this.
    @cached_property
    def writers(self) -> Sequence[str]:
        found: Sequence[str] = self._homeserver.hs.config.worker.writers.events
        return found

    def positions(self) -> dict[str, int]:
        # As a token says it, which takes longer to make; and each event comes by here.
        writers, ids = self.writers, self._ids
        up_to = ids.get_current_token()
        if len(writers) == 1:
            # Its own is the same, unless a process with another configuration still writes. Then
            # the database answers.
            return {writers[0]: up_to}
        found = ids.get_positions()
        return {writer: max(found.get(writer, up_to), up_to) for writer in writers}

    @cached_property
    def _ids(self) -> Any:
        return self._store.get_sticky_events_stream_id_generator()

    async def rows(self, *, after: int, up_to: int, limit: int) -> list[StickyRow]:
        return await self._rows(
            "WHERE ? < se.stream_id AND se.stream_id <= ? AND ? < se.expires_at "
            "ORDER BY se.stream_id LIMIT ?",
            (after, up_to, self._homeserver.now_ms(), limit),
        )

    async def rows_of(self, event_ids: Collection[str]) -> list[StickyRow]:
        def read_txn(txn: Cursor) -> dict[str, int]:
            return stream_ids_txn(self._homeserver, txn, event_ids)

        return await self.rows_at(await self._homeserver.transact("find_rows", read_txn))

    async def rows_at(self, stream_ids: Mapping[str, int]) -> list[StickyRow]:
        rows = []
        for portion in portions(stream_ids.values()):
            clause, args = self._homeserver.in_list("se.stream_id", portion)
            rows += await self._rows(f"WHERE {clause}", args)
        return [row for row in rows if row.event_id in stream_ids]

    async def rows_in_room(self, room_id: str, *, after: int, limit: int) -> list[StickyRow]:
        return await self._rows(
            "WHERE se.room_id = ? AND ? < se.stream_id AND ? < se.expires_at "
            "ORDER BY se.stream_id LIMIT ?",
            (room_id, after, self._homeserver.now_ms(), limit),
        )

    async def rows_in_rooms(
        self, portion: Collection[str], *, after: int, up_to: int, now_ms: int, limit: int
    ) -> list[StickyRow]:
        clause, args = self._homeserver.in_list("se.room_id", portion)
        return await self._rows(
            f"WHERE {clause} AND ? < se.stream_id AND se.stream_id <= ? AND ? < se.expires_at "
            "ORDER BY se.stream_id LIMIT ?",
            (*args, after, up_to, now_ms, limit),
        )

    async def last_rows(self, room_id: str) -> dict[str, int]:
        def read_txn(txn: Cursor) -> dict[str, int]:
            txn.execute(
                "SELECT instance_name, MAX(stream_id) FROM sticky_events"
                " WHERE room_id = ? AND ? < expires_at AND sender LIKE ? GROUP BY instance_name",
                (room_id, self._homeserver.now_ms(), self._own_senders),
            )
            return dict(txn.fetchall())

        return await self._homeserver.transact("last_rows", read_txn)

    async def _rows(self, where: str, args: Sequence[Any]) -> list[StickyRow]:
        def read_txn(txn: Cursor) -> list[tuple[Any, ...]]:
            return self._read_txn(txn, where, args)

        found = await self._homeserver.transact("read_rows", read_txn)

        # A redaction counts only where Synapse itself applies it: it may be invalid.
        disputed = [row[3] for row in found if row[7] and not row[8]]
        whole = await still_whole(self._homeserver, disputed)
        still_sticky = {event_id for event_id, event in whole.items() if event.sticky_duration()}
        return [
            self._row_of(row, not row[8] and (not row[7] or row[3] in still_sticky))
            for row in found
        ]

    def _read_txn(self, txn: Cursor, where: str, args: Sequence[Any]) -> list[tuple[Any, ...]]:
        txn.execute(self._columns + where, args)
        # Here, as this thread holds nobody up.
        return [(*row[:10], *read_json(row[10], _FIELD), *row[11:]) for row in txn.fetchall()]

    async def rooms_of(self, user_id: str) -> list[str]:
        def read_txn(txn: Cursor) -> list[str]:
            # There is no index by sender.
            txn.execute(
                "SELECT DISTINCT room_id FROM sticky_events WHERE sender = ? AND ? < expires_at",
                (user_id, self._homeserver.now_ms()),
            )
            return [room_id for (room_id,) in txn.fetchall()]

        return await self._homeserver.transact("rooms_of_sender", read_txn)

    def _row_of(self, row: tuple[Any, ...], is_sticky: bool) -> StickyRow:
        stream_id, instance_name, room_id, event_id, sender, expires_at_ms, metadata = row[:7]
        size_bytes, key, newness_ms = row[9:12]
        ends_ms = self._retention.row_ends_ms(expires_at_ms, row[12:])
        is_soft_failed = json.loads(metadata).get("soft_failed", False)
        is_deliverable = is_sticky and not is_soft_failed
        place = (stream_id, instance_name, room_id, event_id, sender, ends_ms, is_deliverable)
        return StickyRow(*place, key, newness_ms, size_bytes)

    def on_persisted(self, callback: Callable[[Collection[StickyRow]], None]) -> None:
        if misfits(SEAMS["persisted"], self._homeserver.columns):
            return

        def persisted(rows: list[StickyRow]) -> None:
            # What is raised here would reach whoever persists the events.
            try:
                callback(rows)
            except Exception:
                logger.exception("Could not note %d new sticky events", len(rows))

        def make(original: Callable[..., None]) -> Callable[..., None]:
            def insert_sticky_events_txn(
                txn: LoggingTransaction, events: list[EventBase], *args: Any, **options: Any
            ) -> None:
                if not any(event.sticky_duration() for event in events):
                    original(txn, events, *args, **options)
                    return
                rows: list[StickyRow] = []
                # The original has the positions become visible, in the same way: after this.
                txn.call_after(persisted, rows)
                original(txn, events, *args, **options)
                rows += self._entered_txn(txn, events)

            return insert_sticky_events_txn

        self._homeserver.replace(self._store, "insert_sticky_events_txn", make)

    def _entered_txn(self, txn: Cursor, events: Sequence[EventBase]) -> list[StickyRow]:
        """The rows that these events have got, but for those that a redaction may concern."""
        in_list = self._homeserver.in_list
        try:
            # There is an index by both.
            in_rooms, rooms = in_list("se.room_id", list({event.room_id for event in events}))
            orderings = [event.internal_metadata.stream_ordering for event in events]
            at_these, found_at = in_list("se.event_stream_ordering", orderings)
            found = self._read_txn(txn, f"WHERE {in_rooms} AND {at_these}", (*rooms, *found_at))
            found = [row for row in found if not row[7] and not row[8]]
            return [self._row_of(row, is_sticky=True) for row in found]
        except Exception as e:
            if Cause.of_database(e) is not None:
                raise  # the transaction is no good any more, and Synapse may try it again
            logger.exception("Could not note %d new sticky events", len(events))
            return []

    def on_advance(self, callback: Callable[[], None]) -> None:
        def advanced() -> None:
            # Synapse calls this where it persists events, too, and others after it.
            try:
                callback()
            except Exception:
                logger.exception("Could not note that a stream has advanced")

        self._homeserver.hs.get_notifier().add_replication_callback(advanced)

    def on_event_changed(self, callback: Callable[[str], None]) -> None:
        # Synapse drops an event from its cache in every process whenever a redaction, a purge or
        # a change of soft-failure makes the cached copy untrue: that is what is needed here too.
        # It does so for each new event as well, and for each new row of the stream, which is read
        # anyway; and that would be a query for each.
        if not self._of_events:
            self._homeserver.replace(self._store, "process_replication_rows", self._noting_new_rows)
            self._homeserver.replace(
                self._store, "_invalidate_caches_for_event", self._noting_persisted_event
            )
            made = partial(then_told, listeners=self._of_events, is_known=self._is_known)
            self._homeserver.replace(self._store, "_invalidate_local_get_event_cache", made)
        self._of_events.append(callback)

    def _is_known(self, event_id: str) -> bool:
        return event_id == self._persisted_event or self._takes_new_rows

    def _noting_new_rows(self, original: Callable[..., None]) -> Callable[..., None]:
        from synapse_sticky.homeserver.stream import NAME

        def process_replication_rows(stream_name: str, *args: Any, **options: Any) -> None:
            self._takes_new_rows = stream_name == NAME
            try:
                original(stream_name, *args, **options)
            finally:
                self._takes_new_rows = False

        return process_replication_rows

    def _noting_persisted_event(self, original: Callable[..., None]) -> Callable[..., None]:
        def invalidate_caches_for_event(
            stream_ordering: int, event_id: str, *args: Any, **options: Any
        ) -> None:
            self._persisted_event = event_id
            try:
                original(stream_ordering, event_id, *args, **options)
            finally:
                self._persisted_event = None

        return invalidate_caches_for_event

    def on_room_purged(self, callback: Callable[[str], None]) -> None:
        # Not the store's function by which it drops a room's events from its cache: a ban that
        # redacts calls that one, too, and concerns one user only.
        if not self._of_rooms:
            made = partial(then_told, listeners=self._of_rooms)
            self._homeserver.replace(self._store, "_invalidate_caches_for_room_events", made)
        self._of_rooms.append(callback)

    def on_retention_changed(self, callback: Callable[[str], None]) -> None:
        self._retention.on_changed(callback)

    async def forget_gone(self, room_id: str) -> None:
        def delete_txn(txn: Cursor) -> None:
            txn.execute(
                "DELETE FROM sticky_events WHERE room_id = ? AND NOT EXISTS"
                " (SELECT 1 FROM events AS e WHERE e.event_id = sticky_events.event_id)",
                (room_id,),
            )

        await self._homeserver.transact("forget_gone", delete_txn)

    def on_user_redacted(self, callback: Callable[[str, str], None]) -> None:
        self._user_redactions.on_redacted(callback)
