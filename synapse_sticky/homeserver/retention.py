"""Where this server enforces retention, nothing is sticky for longer than it is kept (S2).

Synapse shows its clients nothing that is older than its room's ``max_lifetime`` (MSC1763), and
purges it later. Its rows of sticky events do not go by that. All parts of the module do.

No event is sticky for longer than an hour, so this is about rooms that keep events for less.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from synapse_sticky.homeserver.fitting import misfits
from synapse_sticky.homeserver.process import Cursor, Homeserver
from synapse_sticky.homeserver.seams import STORE, Attribute, attributes, method, table
from synapse_sticky.homeserver.spec import RETENTION
from synapse_sticky.logs import bounded

logger = bounded(__name__)

SEAMS = (
    Attribute("synapse.config.homeserver.HomeServerConfig", "retention"),
    *attributes(
        "synapse.config.retention.RetentionConfig",
        *("retention_enabled", "retention_default_max_lifetime", "retention_allowed_lifetime_max"),
    ),
    method(STORE, "async get_retention_policy_for_room(room_id, /) -> RetentionPolicy"),
    Attribute("synapse.types.RetentionPolicy", "max_lifetime"),
    method(STORE, "async get_events(event_ids, /) -> dict"),
    method(
        STORE,
        "_invalidate_caches_for_event(stream_ordering, event_id, room_id, etype)",
        is_replaced=True,
    ),
    table("events", "event_id text, origin_server_ts integer"),
    table("room_retention", "room_id text, event_id text, max_lifetime integer"),
    table("current_state_events", "room_id text, event_id text, type text, state_key text"),
)

_NO_END_MS = 2**63 - 1

# One row at most, however many events a room has that say so: those with a state key do not count.
_OF_ROOM = f"""(
    SELECT r.max_lifetime FROM current_state_events AS c
    INNER JOIN room_retention AS r ON r.event_id = c.event_id AND r.room_id = c.room_id
    WHERE c.room_id = {{room_id}} AND c.type = '{RETENTION}' AND c.state_key = ''
)"""
_OF_ROW = f"""
    , (SELECT e.origin_server_ts FROM events AS e WHERE e.event_id = se.event_id)
    , {_OF_ROOM.format(room_id="se.room_id")}
"""


class Retention:
    """How long this server keeps a room's events, as far as that matters here.

    is_on: whether it enforces retention at all. If not, nothing here costs anything.
    columns: for a query of sticky events (``se``): what ``row_ends_ms`` needs; empty if it is off.
    """

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        self._default_ms: int | None = None
        self._most_ms: int | None = None
        self.is_on = False
        self.columns = ""
        config: Any = getattr(homeserver.hs.config, "retention", None)
        if not getattr(config, "retention_enabled", False):
            return
        if problems := misfits(SEAMS, homeserver.columns):
            logger.warning("No retention ends a sticky event earlier: %s", "; ".join(problems))
            return
        self.is_on = True
        self.columns = _OF_ROW
        self._default_ms = config.retention_default_max_lifetime
        self._most_ms = config.retention_allowed_lifetime_max

    def row_ends_ms(self, expires_at_ms: int, columns: Sequence[int | None]) -> int:
        """When a row ends, in ms since the epoch.

        Args:
            columns: what the database gave for ``columns``.
        """
        if not columns:
            return expires_at_ms
        sent_ms, policy_ms = columns
        return earlier_end_ms(expires_at_ms, sent_ms, self._lifetime_ms(policy_ms))

    async def ends_ms(self, room_id: str, expires_at_ms: int, sent_ms: int) -> int:
        """When an event ends that would end at ``expires_at_ms``; both in ms since the epoch.

        Args:
            sent_ms: its ``origin_server_ts``.
        """
        if not self.is_on:
            return expires_at_ms
        policy = await self._store.get_retention_policy_for_room(room_id)
        return earlier_end_ms(expires_at_ms, sent_ms, self._lifetime_ms(policy.max_lifetime))

    async def kept(self, event_ids: Collection[str]) -> set[str]:
        """Those of the events that this server still keeps."""
        if not self.is_on:
            return set(event_ids)
        events = await self._store.get_events(event_ids)
        now_ms = self._homeserver.now_ms()
        return {
            event_id
            for event_id, event in events.items()
            if now_ms < await self.ends_ms(event.room_id, _NO_END_MS, event.origin_server_ts)
        }

    def lifetimes_txn(self, txn: Cursor, room_ids: Collection[str]) -> dict[str, int]:
        """The lifetimes of those of the rooms that have one, in ms. One query a room."""
        found = {}
        for room_id in room_ids if self.is_on else ():
            txn.execute(f"SELECT {_OF_ROOM.format(room_id='?')}", (room_id,))
            ((policy_ms,),) = txn.fetchall()
            if (lifetime_ms := self._lifetime_ms(policy_ms)) is not None:
                found[room_id] = lifetime_ms
        return found

    def _lifetime_ms(self, policy_ms: int | None) -> int | None:
        lifetime_ms = self._default_ms if policy_ms is None else policy_ms
        if lifetime_ms is None or self._most_ms is None:
            return lifetime_ms
        return min(lifetime_ms, self._most_ms)

    def on_changed(self, callback: Callable[[str], None]) -> None:
        """Calls back with the ID of a room whose policy may have changed, whichever process has
        persisted that."""
        if not self.is_on:
            return

        def make(original: Callable[..., None]) -> Callable[..., None]:
            def invalidate_caches_for_event(
                stream_ordering: int,
                event_id: str,
                room_id: str,
                etype: str,
                *args: Any,
                **options: Any,
            ) -> None:
                original(stream_ordering, event_id, room_id, etype, *args, **options)
                if etype != RETENTION:
                    return
                try:
                    callback(room_id)
                except Exception:
                    # Synapse has more to do where it calls this.
                    logger.exception("Could not note the retention of %s", room_id)

            return invalidate_caches_for_event

        self._homeserver.replace(self._store, "_invalidate_caches_for_event", make)


def earlier_end_ms(expires_at_ms: int, sent_ms: int | None, lifetime_ms: int | None) -> int:
    """The earlier of both ends, in ms since the epoch. Whoever sets a policy chooses any number."""
    if sent_ms is None or lifetime_ms is None:
        return expires_at_ms
    return min(expires_at_ms, max(sent_ms + lifetime_ms, 0))
