"""The section of sticky events in sliding sync."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from synapse.types import UnresolvedMultiWriterStreamToken
from synapse.types.handlers.sliding_sync import SlidingSyncResult
from synapse.types.rest.client import SlidingSyncStickyEventsToken

from synapse_sticky.handlers.sliding.handler import SlidingPage
from synapse_sticky.handlers.sliding.joined.synapse import SynapseJoinedRooms
from synapse_sticky.handlers.sliding.pages import Shown
from synapse_sticky.handlers.sliding.request import (
    MOST_IN_SECTION,
    SlidingRequest,
    Unignored,
    storable,
)
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.access import still_sticky
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, attributes, method
from synapse_sticky.homeserver.sections import together
from synapse_sticky.homeserver.tokens import position_of, token_of
from synapse_sticky.index import Position

_SLIDING_SYNC = "synapse.handlers.sliding_sync"
_EXTENSIONS = f"{_SLIDING_SYNC}.extensions.SlidingSyncExtensionHandler"
_TYPES = "synapse.types.handlers.sliding_sync"
_TOKEN = "synapse.types.rest.client.SlidingSyncStickyEventsToken"  # noqa: S105  # a class
_REQUEST = "synapse.types.rest.client.SlidingSyncBody.Extensions.StickyEventsExtension"

SEAMS = (
    method(HOMESERVER, "get_sliding_sync_handler() -> SlidingSyncHandler"),
    Attribute(f"{_SLIDING_SYNC}.SlidingSyncHandler", "extensions"),
    method(
        _EXTENSIONS,
        "async get_sticky_events_extension_response(*, sync_config, sticky_events_request, "
        "all_interested_room_ids, to_token, from_token) -> StickyEventsExtension | None",
        is_replaced=True,
    ),
    *attributes(_REQUEST, "enabled", "limit", "since"),
    *attributes(f"{_TYPES}.SlidingSyncConfig", "requester", "conn_id"),
    Attribute(f"{_TYPES}.SlidingSyncResult.Extensions", "StickyEventsExtension"),
    *attributes(
        f"{_TYPES}.SlidingSyncResult.Extensions.StickyEventsExtension",
        *("room_id_to_sticky_events", "next_batch"),
    ),
    method(_TOKEN, "async from_stream_token(store, token, /) -> SlidingSyncStickyEventsToken"),
    method(_TOKEN, "async to_stream_token(store, /) -> MultiWriterStreamToken"),
    Attribute(_TOKEN, "_unresolved_stream_token"),
    *attributes(
        "synapse.types.UnresolvedMultiWriterStreamToken", "stream", "instance_id_to_stream_pos"
    ),
    Attribute("synapse.types.SlidingSyncStreamToken", "stream_token"),
    *attributes("synapse.types.StreamToken", "room_key", "sticky_events_key"),
    Attribute("synapse.config.workers.WorkerConfig", "writers"),
    Attribute("synapse.config.workers.WriterLocations", "events"),
    method(HOMESERVER, "get_storage_controllers() -> StorageControllers"),
    method(
        "synapse.visibility",
        "async filter_and_transform_events_for_client(storage, user_id, events, /, *, "
        "always_include_ids) -> list[FilteredEvent]",
    ),
    Attribute("synapse.events.utils.FilteredEvent", "event"),
    method(STORE, "async get_events(event_ids, /) -> dict"),
    method(STORE, "async are_users_erased(user_ids, /) -> Mapping"),
    method(STORE, "get_sticky_events_stream_token() -> MultiWriterStreamToken"),
    method(
        STORE,
        "async get_sticky_events_in_rooms(room_ids, /, *, from_token, to_token, now, limit) "
        "-> tuple[_, _]",
    ),
)

_ONLY_WRITER = 0
_Section = SlidingSyncResult.Extensions.StickyEventsExtension


class _DueSection(_Section):
    """A section that goes out at once, even if it is empty."""

    def __bool__(self) -> bool:
        return True


class SynapseSliding:
    """Implements ``handler.SlidingSync``: puts a pager in the place of Synapse's own section."""

    def __init__(self, homeserver: Homeserver, unignored: Unignored | None = None) -> None:
        self._homeserver = homeserver
        self.unignored = unignored
        self._store = homeserver.store
        self._storage = homeserver.hs.get_storage_controllers()
        self.writers: Sequence[str] = homeserver.hs.config.worker.writers.events
        self.joined = SynapseJoinedRooms(homeserver, self.writers)

    def page(self, pager: Callable[[SlidingRequest], Awaitable[SlidingPage]]) -> None:
        def make(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def get_sticky_events_extension_response(
                sync_config: Any,
                sticky_events_request: Any,
                all_interested_room_ids: set[str],
                to_token: Any,
                from_token: Any,
                **options: Any,
            ) -> Any:
                if not sticky_events_request.enabled:
                    return None
                since = None
                if sticky_events_request.since:
                    since = await self._read_token(sticky_events_request.since)
                now = position_of(self._store.get_sticky_events_stream_token())
                if since is not None and not since.is_before_or_at(now):
                    # From the future, or this process is behind: Synapse knows what to do.
                    return await original(
                        sync_config=sync_config,
                        sticky_events_request=sticky_events_request,
                        all_interested_room_ids=all_interested_room_ids,
                        to_token=to_token,
                        from_token=from_token,
                        **options,
                    )
                response = _Response(
                    self,
                    sync_config,
                    sticky_events_request,
                    all_interested_room_ids,
                    since,
                    to_token,
                    from_token,
                )
                return await response.filled(await pager(response))

            return get_sticky_events_extension_response

        extensions = self._homeserver.hs.get_sliding_sync_handler().extensions
        self._homeserver.replace(extensions, "get_sticky_events_extension_response", make)

    # Synapse has no numbers for writers on SQLite, where there is only one.

    async def _read_token(self, token: Any) -> Position:
        unresolved = token._unresolved_stream_token
        ahead = unresolved.instance_id_to_stream_pos
        # Postgres gives nobody this number: such a token is from before the move there.
        if set(ahead) != {_ONLY_WRITER}:
            return position_of(await token.to_stream_token(self._store))
        return Position(unresolved.stream, {self.writers[0]: ahead[_ONLY_WRITER]})

    async def write_token(self, position: Position) -> SlidingSyncStickyEventsToken:
        """Synapse's ``next_batch``."""
        token = token_of(position)
        if self._homeserver.is_postgres or not token.instance_map:
            return await SlidingSyncStickyEventsToken.from_stream_token(self._store, token)
        (ahead,) = token.instance_map.values()
        return SlidingSyncStickyEventsToken(
            unresolved_stream_token=UnresolvedMultiWriterStreamToken(
                stream=token.stream, instance_id_to_stream_pos={_ONLY_WRITER: ahead}
            )
        )

    async def visible(self, user_id: str, event_ids: Collection[str]) -> list[Any]:
        """These events as the user may see them, history visibility aside (C1): not those of users
        whom they ignore (D6), nor what was redacted or erased meanwhile (S5)."""
        # It is replaced there.
        from synapse.visibility import filter_and_transform_events_for_client

        left = await still_sticky(self._store, event_ids)
        events = await self._store.get_events(event_ids)
        sticky = [event for event_id, event in events.items() if event_id in left]
        return await filter_and_transform_events_for_client(
            self._storage, user_id, sticky, always_include_ids=frozenset(event_ids)
        )


class _Response:
    """Implements ``handler.SlidingRequest``, and gathers the response to it."""

    def __init__(
        self,
        sliding: SynapseSliding,
        sync_config: Any,
        request: Any,
        room_ids: AbstractSet[str],
        since: Position | None,
        to_token: Any,
        from_token: Any,
    ) -> None:
        self._sliding = sliding
        self._store = sliding._store
        self._sync_config = sync_config
        self._user_id: str = sync_config.requester.user.to_string()
        self._to_token = to_token
        self._now_ms = sliding._homeserver.now_ms()
        self._parts: list[tuple[int, dict[str, list[str]]]] = []
        self._of_senders: dict[str, list[str]] = {}
        device_id: str = sync_config.requester.device_id or ""
        self.connection = (self._user_id, device_id, storable(sync_config.conn_id or ""))
        self.room_ids = room_ids
        self.limit: int = min(request.limit, MOST_IN_SECTION)
        self.since = since
        self.up_to = position_of(to_token.sticky_events_key)
        shown_by = sliding.joined.shown_by
        self.shown = shown_by(to_token)
        self.shown_before = shown_by(from_token.stream_token) if from_token else None

    async def newly_joined_rooms(self, after: Shown | None) -> AbstractSet[str]:
        rooms, joined = self._sliding.joined, set[str]()
        asked = (self._user_id, self.room_ids)
        if after is None:
            joined = await rooms.joined_within_the_hour(*asked, self._to_token.room_key)
            after = self.shown_before
        if after is None:
            return joined
        joined |= await rooms.joined_after(*asked, after.rooms, self._to_token.room_key)
        return joined | await rooms.no_longer_partial(
            self._sync_config, self.room_ids, after.whole, self.shown.whole
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

    async def unignored_users(self, after: Shown | None) -> AbstractSet[str]:
        unignored = self._sliding.unignored
        if unignored is None:
            return set()
        since = None if after is None else after.ignoring
        return await unignored.senders(self._user_id, since, self.shown.ignoring)

    async def read_of(
        self, senders: Collection[str], room_ids: Collection[str], after: Position, up_to: Position
    ) -> int:
        if self._sliding.unignored is None:
            return 0
        found = await self._sliding.unignored.events_of(senders, room_ids, after, up_to)
        self._of_senders = together(self._of_senders, found)
        return sum(map(len, found.values()))

    async def filled(self, page: SlidingPage) -> Any:
        """Synapse's own response object."""
        by_room: dict[str, list[str]] = {}
        for _, part in sorted(self._parts, key=lambda part: part[0]):
            for room_id, event_ids in part.items():
                by_room.setdefault(room_id, []).extend(event_ids)
        # What was to be known first may follow at once where it is in the stream.
        by_room = {room_id: [*dict.fromkeys(ids[::-1])][::-1] for room_id, ids in by_room.items()}
        by_room = together(by_room, self._of_senders)
        rooms = {}
        if by_room:
            event_ids = [event_id for ids in by_room.values() for event_id in ids]
            visible = {
                shown.event.event_id: shown
                for shown in await self._sliding.visible(self._user_id, event_ids)
            }
            for room_id, ids in by_room.items():
                if shown := [visible[event_id] for event_id in ids if event_id in visible]:
                    rooms[room_id] = shown
        next_batch = await self._sliding.write_token(page.next_batch)
        section = _DueSection if page.is_due else _Section
        return section(room_id_to_sticky_events=rooms, next_batch=next_batch)
