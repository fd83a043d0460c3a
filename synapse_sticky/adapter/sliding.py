"""The section of sticky events in sliding sync."""

from collections.abc import Collection
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from synapse.api.constants import EventTypes, Membership, StickyEvent
from synapse.storage.database import LoggingTransaction, make_in_list_sql_clause
from synapse.storage.engines import PostgresEngine
from synapse.types import (
    MultiWriterStreamToken,
    PersistedEventPosition,
    RoomStreamToken,
    UnresolvedMultiWriterStreamToken,
)

from synapse_sticky.adapter import hooks
from synapse_sticky.adapter.listeners import serves
from synapse_sticky.adapter.stream import position_of, token_of
from synapse_sticky.adapter.visibility import USER_FILTER_PARAMETERS
from synapse_sticky.homeserver import Position, SlidingPage, SlidingPager

if TYPE_CHECKING:
    from synapse.server import HomeServer

_PARAMETERS = (
    "sync_config",
    "sticky_events_request",
    "all_interested_room_ids",
    "to_token",
    "from_token",
)
_ONLY_WRITER = 0
_HOUR_MS = StickyEvent.MAX_DURATION.as_millis()


class SynapseSlidingSync:
    """Puts a pager in the place of Synapse's own section."""

    def __init__(self, hs: "HomeServer") -> None:
        self._serves_clients = serves(hs, "client")
        if not self._serves_clients:
            return
        from synapse.handlers.sliding_sync import extensions
        from synapse.types.handlers.sliding_sync import SlidingSyncResult
        from synapse.types.rest.client import SlidingSyncStickyEventsToken

        self._token: Any = SlidingSyncStickyEventsToken
        hooks.method(self._token, "from_stream_token", "store", "token")
        self._writers = hs.config.worker.writers.events
        self.section = SlidingSyncResult.Extensions.StickyEventsExtension

        class DueSection(self.section):  # type: ignore[misc, name-defined]  # a variable's class
            """A section that goes out at once, even if it is empty."""

            def __bool__(self) -> bool:
                return True

        self.due_section = DueSection
        self._store: Any = hs.get_datastores().main
        self._has_instance_map = isinstance(self._store.database_engine, PostgresEngine)
        self._storage = hs.get_storage_controllers()
        self._clock = hs.get_clock()
        self._sources = hs.get_event_sources()
        self._is_mine_id = hs.is_mine_id
        self._filter = hooks.method(
            extensions, "filter_and_transform_events_for_client", *USER_FILTER_PARAMETERS
        )
        self._handler = hooks.attribute(hs.get_sliding_sync_handler(), "extensions")
        self._replace = hooks.replace(
            self._handler, "get_sticky_events_extension_response", *_PARAMETERS
        )
        hooks.method(
            self._store,
            "get_sliding_sync_membership_changes",
            "user_id",
            "from_key",
            "to_key",
            "excluded_room_ids",
        )

    def page(self, pager: SlidingPager) -> None:
        if not self._serves_clients:
            return
        original = self._handler.get_sticky_events_extension_response

        async def get_sticky_events_extension_response(
            sync_config: Any,
            sticky_events_request: Any,
            all_interested_room_ids: set[str],
            to_token: Any,
            from_token: Any,
        ) -> Any:
            if not sticky_events_request.enabled:
                return None
            joined = await self._store.get_rooms_for_user(sync_config.user.to_string())
            rooms = all_interested_room_ids & joined
            since = None
            if sticky_events_request.since:
                since = await self._read_token(sticky_events_request.since)
                now_token = self._sources.get_current_token().sticky_events_key
                if not since.is_before_or_eq(now_token):
                    # From the future, or this process is behind: Synapse knows what to do.
                    return await original(
                        sync_config=sync_config,
                        sticky_events_request=sticky_events_request,
                        all_interested_room_ids=rooms,
                        to_token=to_token,
                        from_token=from_token,
                    )
            response = _Response(
                self, sync_config, sticky_events_request, rooms, since, to_token, from_token
            )
            return await response.filled(await pager(response))

        self._replace(get_sticky_events_extension_response)

    # Synapse has no numbers for writers on SQLite, where there is only one.

    async def _read_token(self, token: Any) -> MultiWriterStreamToken:
        unresolved = token._unresolved_stream_token
        if self._has_instance_map or set(unresolved.instance_id_to_stream_pos) != {_ONLY_WRITER}:
            return await token.to_stream_token(self._store)
        ahead = {self._writers[0]: unresolved.instance_id_to_stream_pos[_ONLY_WRITER]}
        return token_of(Position(unresolved.stream, ahead))

    async def write_token(self, position: Position) -> Any:
        """Synapse's ``next_batch``."""
        token = token_of(position)
        if self._has_instance_map or not token.instance_map:
            return await self._token.from_stream_token(self._store, token)
        (ahead,) = token.instance_map.values()
        return self._token(
            unresolved_stream_token=UnresolvedMultiWriterStreamToken(
                stream=token.stream, instance_id_to_stream_pos={_ONLY_WRITER: ahead}
            )
        )

    async def newly_joined(
        self, user_id: str, room_ids: AbstractSet[str], after: RoomStreamToken, up_to: Any
    ) -> set[str]:
        """The rooms that the user was not in at ``after``."""
        changes = await self._store.get_sliding_sync_membership_changes(user_id, after, up_to)
        joined = [
            room_id
            for room_id, change in changes.items()
            if change.membership == Membership.JOIN and room_id in room_ids
        ]
        if not joined:
            return set()

        # Synapse counts some changes of a profile among them. The state changes know better.
        def read_txn(txn: LoggingTransaction) -> set[str]:
            clause, args = make_in_list_sql_clause(txn.database_engine, "d.room_id", joined)
            txn.execute(
                f"""
                SELECT d.room_id, d.instance_name, d.stream_id
                FROM current_state_delta_stream AS d
                INNER JOIN room_memberships AS m ON m.event_id = d.event_id
                LEFT JOIN room_memberships AS before ON before.event_id = d.prev_event_id
                WHERE d.type = ? AND d.state_key = ? AND ? < d.stream_id AND d.stream_id <= ?
                    AND m.membership = ? AND COALESCE(before.membership, ?) != ? AND {clause}
                """,
                (
                    *(EventTypes.Member, user_id, after.stream, up_to.get_max_stream_pos()),
                    *(Membership.JOIN, Membership.LEAVE, Membership.JOIN, *args),
                ),
            )
            positions = [(room, PersistedEventPosition(*at)) for room, *at in txn.fetchall()]
            return {
                room_id
                for room_id, at in positions
                if at.persisted_after(after) and not at.persisted_after(up_to)
            }

        return await self._store.db_pool.runInteraction("synapse_sticky_newly_joined", read_txn)

    async def position_an_hour_ago(self) -> RoomStreamToken:
        """Whatever is sticky now came in after this position."""
        first = await self._store.find_first_stream_ordering_after_ts(
            self._clock.time_msec() - _HOUR_MS
        )
        return RoomStreamToken(stream=max(first - 1, 0))

    async def no_longer_partial(
        self, sync_config: Any, room_ids: AbstractSet[str], after: Any, up_to: Any
    ) -> set[str]:
        """The rooms that were kept from the client until their state was whole."""
        first, last = after.un_partial_stated_rooms_key, up_to.un_partial_stated_rooms_key
        if first == last or not room_ids:
            return set()
        from synapse.types.handlers.sliding_sync import RoomSyncConfig

        asked_for = [
            *(sync_config.lists or {}).values(),
            *(sync_config.room_subscriptions or {}).values(),
        ]
        if not any(
            RoomSyncConfig.from_room_config(part).must_await_full_state(self._is_mine_id)
            for part in asked_for
        ):
            return set()
        return await self._store.get_un_partial_stated_rooms_between(first, last, room_ids)

    async def visible(self, user_id: str, event_ids: Collection[str]) -> list[Any]:
        """These events as the user may see them, history visibility aside (C1): not those of users
        whom they ignore (D6), nor what was redacted meanwhile (S5)."""
        events = await self._store.get_events_as_list(event_ids)
        sticky = [event for event in events if event.sticky_duration() is not None]
        return await self._filter(
            self._storage, user_id, sticky, always_include_ids=frozenset(event_ids)
        )


class _Response:
    """Implements ``homeserver.SlidingRequest``, and gathers the response to it."""

    def __init__(
        self,
        sliding_sync: SynapseSlidingSync,
        sync_config: Any,
        request: Any,
        room_ids: AbstractSet[str],
        since: MultiWriterStreamToken | None,
        to_token: Any,
        from_token: Any,
    ) -> None:
        self._sliding_sync = sliding_sync
        self._store = sliding_sync._store
        self._sync_config = sync_config
        self._user_id: str = sync_config.user.to_string()
        self._to_token = to_token
        self._from_token = from_token.stream_token if from_token else None
        self._now_ms: int = sliding_sync._clock.time_msec()
        self._parts: list[tuple[int, dict[str, list[str]]]] = []
        device_id: str = sync_config.requester.device_id or ""
        self.connection = (self._user_id, device_id, sync_config.conn_id or "")
        self.room_ids = room_ids
        self.limit: int = min(request.limit, StickyEvent.MAX_EVENTS_IN_SYNC)
        self.since = None if since is None else position_of(since)
        self.up_to = position_of(to_token.sticky_events_key)

    async def newly_joined_rooms(self) -> AbstractSet[str]:
        up_to = self._to_token.room_key
        if self._from_token is None:
            # A new connection that goes on from an old position.
            after = await self._sliding_sync.position_an_hour_ago()
            return await self._sliding_sync.newly_joined(self._user_id, self.room_ids, after, up_to)
        after = self._from_token.room_key
        joined = await self._sliding_sync.newly_joined(self._user_id, self.room_ids, after, up_to)
        return joined | await self._sliding_sync.no_longer_partial(
            self._sync_config, self.room_ids, self._from_token, self._to_token
        )

    async def read(
        self, room_ids: Collection[str], after: Position, up_to: Position, limit: int | None
    ) -> tuple[int, Position]:
        reached, by_room = await self._store.get_sticky_events_in_rooms(
            room_ids,
            from_token=token_of(after),
            to_token=token_of(up_to),
            now=self._now_ms,
            limit=limit,
        )
        if by_room:
            self._parts.append((after.stream_id, by_room))
        return sum(map(len, by_room.values())), position_of(reached)

    async def filled(self, page: SlidingPage) -> Any:
        """Synapse's own response object."""
        by_room: dict[str, list[str]] = {}
        for _, part in sorted(self._parts, key=lambda part: part[0]):
            for room_id, event_ids in part.items():
                by_room.setdefault(room_id, []).extend(event_ids)
        rooms = {}
        if by_room:
            event_ids = [event_id for ids in by_room.values() for event_id in ids]
            visible = {
                shown.event.event_id: shown
                for shown in await self._sliding_sync.visible(self._user_id, event_ids)
            }
            for room_id, ids in by_room.items():
                if shown := [visible[event_id] for event_id in ids if event_id in visible]:
                    rooms[room_id] = shown
        next_batch = await self._sliding_sync.write_token(page.next_batch)
        section = self._sliding_sync.due_section if page.is_due else self._sliding_sync.section
        return section(room_id_to_sticky_events=rooms, next_batch=next_batch)
