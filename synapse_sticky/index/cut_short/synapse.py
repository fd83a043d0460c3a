"""Bans that redact and whose process ended too early: before it wrote the row, or told of it (S5).

They are looked for once, as the process that persists their room's events starts: those of the last
hour, as no event from before a later ban is sticky any more.
"""

from collections.abc import Callable
from typing import Any

from synapse_sticky._core import MAX_STICKY_DURATION_MS
from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.homeserver.fitting import misfits
from synapse_sticky.homeserver.process import Cursor, Homeserver
from synapse_sticky.homeserver.seams import STORE, Attribute, method, table
from synapse_sticky.homeserver.whole import still_whole
from synapse_sticky.logs import bounded

logger = bounded(__name__)

SEAMS = (
    Attribute("synapse.storage.databases.Databases", "persist_events"),
    method(
        "synapse.storage.databases.main.events.PersistEventsStore",
        "async _can_sender_redact(event, /) -> bool",
    ),
    Attribute("synapse.config.workers.WorkerConfig", "events_shard_config"),
    method(
        "synapse.config._base.ShardedWorkerHandlingConfig",
        "should_handle(instance_name, key, /) -> bool",
    ),
    method(STORE, "async find_first_stream_ordering_after_ts(ts, /) -> int"),
    method(STORE, "_invalidate_local_get_event_cache_room_id(room_id, /)"),
    table(
        "room_ban_redactions",
        "room_id text, user_id text, redacting_event_id text, redact_end_ordering integer",
    ),
    table(
        "current_state_delta_stream",
        "stream_id integer, room_id text, type text, state_key text, event_id text",
    ),
    table("current_state_events", "event_id text"),
    table("room_memberships", "event_id text, membership text"),
    table("event_json", "event_id text, json text"),
)

_FLAG = "org.matrix.msc4293.redact_events"
_BACKOFF = Backoff(1_000, 60_000)
_MOST = 10_000


class CutShort:
    """Does what a process that persists events left undone."""

    def __init__(self, homeserver: Homeserver, say: Callable[[str, str], None]) -> None:
        """
        Args:
            say: tells every process that a user's events in a room are redacted.
        """
        self._homeserver = homeserver
        self._store = homeserver.store
        self._say = say
        self._looking = Retrying(
            homeserver,
            "cut_short",
            "Could not look for bans that were cut short",
            self._look,
            _BACKOFF,
        )

    def begin(self) -> None:
        """Looks once, until that goes well. Does nothing where Synapse does not redact so."""
        config: Any = self._homeserver.hs.config
        if not getattr(config.experimental, "msc4293_enabled", True):
            return
        if problems := misfits(SEAMS, self._homeserver.columns):
            logger.error(
                "This Synapse does not fit: %s. So a ban that redacts, and is cut short by a crash,"
                " does not redact.",
                "; ".join(problems),
            )
            return
        self._looking.wake()

    async def _look(self) -> None:
        hour_ago_ms = self._homeserver.now_ms() - MAX_STICKY_DURATION_MS
        first = await self._store.find_first_stream_ordering_after_ts(hour_ago_ms)
        shards = self._homeserver.hs.config.worker.events_shard_config
        for room_id, user_id, event_id, row_of in await self._bans_since(first):
            if not shards.should_handle(self._homeserver.instance_name, room_id):
                continue
            if row_of == event_id or await self._write(room_id, user_id, event_id):
                self._say(room_id, user_id)

    async def _bans_since(self, first: int) -> list[tuple[str, str, str, str | None]]:
        """``(room_id, user_id, event_id, event ID of the row)`` of those in force."""

        def read_txn(txn: Cursor) -> list[Any]:
            txn.execute(
                """
                SELECT d.room_id, d.state_key, d.event_id, b.redacting_event_id
                FROM current_state_delta_stream AS d
                INNER JOIN room_memberships AS m ON m.event_id = d.event_id
                INNER JOIN current_state_events AS c ON c.event_id = d.event_id
                INNER JOIN event_json AS ej ON ej.event_id = d.event_id
                LEFT JOIN room_ban_redactions AS b
                    ON b.room_id = d.room_id AND b.user_id = d.state_key
                WHERE d.stream_id >= ? AND d.type = 'm.room.member'
                    AND m.membership IN ('ban', 'leave') AND ej.json LIKE ?
                ORDER BY d.stream_id DESC LIMIT ?
                """,
                (first, f"%{_FLAG}%", _MOST),
            )
            return txn.fetchall()

        return await self._homeserver.transact("bans_cut_short", read_txn)

    async def _write(self, room_id: str, user_id: str, event_id: str) -> bool:
        """Writes the row as Synapse would have. Gives whether it did."""
        event = (await still_whole(self._homeserver, [event_id])).get(event_id)
        if event is None or event.content.get(_FLAG) is not True or event.sender == user_id:
            return False
        persisting: Any = self._homeserver.hs.get_datastores().persist_events
        if not await persisting._can_sender_redact(event):
            return False

        def write_txn(txn: Cursor) -> None:
            txn.execute(
                "INSERT INTO room_ban_redactions"
                " (room_id, user_id, redacting_event_id, redact_end_ordering)"
                " VALUES (?, ?, ?, NULL) ON CONFLICT (room_id, user_id) DO UPDATE"
                " SET redacting_event_id = excluded.redacting_event_id, redact_end_ordering = NULL",
                (room_id, user_id, event_id),
            )

        await self._homeserver.transact("write_ban_cut_short", write_txn)
        self._store._invalidate_local_get_event_cache_room_id(room_id)
        logger.info("%s redacts the events of %s in %s after all", event_id, user_id, room_id)
        return True
