"""Who gets the sticky sections of /sync and sliding sync: who is joined at that moment (D8); and
what: nothing that has expired or was redacted by then (S4, S5). Synapse may have made them earlier.

Each of the two is guarded on two layers: where its section is made, and in the response. Either
suffices, so that a Synapse that has changed on one of them is guarded all the same. Fails closed: a
section that cannot be checked fails the request, and the client asks again.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import timedelta
from typing import Any, Protocol

import attr
from synapse.module_api import Requester, UserID
from twisted.internet.defer import CancelledError

from synapse_sticky.homeserver.fitting import misfits
from synapse_sticky.homeserver.process import Homeserver
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, Seam, attributes, method
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_SYNC = "synapse.handlers.sync"
_SLIDING = "synapse.handlers.sliding_sync"
_TYPES = "synapse.types.handlers.sliding_sync"
_EXTENSIONS = f"{_TYPES}.SlidingSyncResult.Extensions"

_MS = timedelta(milliseconds=1)

_JOINED = method(STORE, "async get_rooms_for_user(user_id, /) -> frozenset")
_ERASED = method(STORE, "async are_users_erased(user_ids, /) -> Mapping")

LAYERS: Mapping[str, tuple[str, str]] = {
    "delivery": ("sync_section", "sync_response"),
    "sliding": ("sliding_section", "sliding_response"),
}
"""By the duty whose sections they guard: the layers, of which one suffices."""

SEAMS: Mapping[str, tuple[Seam, ...]] = {
    "sync_section": (
        _JOINED,
        method(HOMESERVER, "get_sync_handler() -> SyncHandler"),
        method(
            f"{_SYNC}.SyncHandler",
            "async _generate_room_entry(sync_result_builder, room_builder, *, sticky_event_ids)",
            is_replaced=True,
        ),
        Attribute(f"{_SYNC}.SyncResultBuilder", "sync_config"),
        Attribute(f"{_SYNC}.RoomSyncResultBuilder", "room_id"),
        Attribute(f"{_SYNC}.SyncConfig", "user"),
    ),
    "sync_response": (
        _JOINED,
        method(HOMESERVER, "get_sync_handler() -> SyncHandler"),
        method(
            f"{_SYNC}.SyncHandler",
            "async wait_for_sync_for_user(requester, sync_config) -> SyncResult",
            is_replaced=True,
        ),
        method(STORE, "async get_events(event_ids, /) -> dict"),
        _ERASED,
        Attribute(f"{_SYNC}.SyncConfig", "user"),
        Attribute(f"{_SYNC}.SyncResult", "joined"),
        *attributes(f"{_SYNC}.JoinedSyncResult", "room_id", "sticky"),
        Attribute("synapse.events.utils.FilteredEvent", "event"),
    ),
    "sliding_section": (
        _JOINED,
        method(HOMESERVER, "get_sliding_sync_handler() -> SlidingSyncHandler"),
        Attribute(f"{_SLIDING}.SlidingSyncHandler", "extensions"),
        method(
            f"{_SLIDING}.extensions.SlidingSyncExtensionHandler",
            "async get_sticky_events_extension_response(*, sync_config, all_interested_room_ids) "
            "-> StickyEventsExtension | None",
            is_replaced=True,
        ),
        method(STORE, "async get_events(event_ids, /) -> dict"),
        _ERASED,
        Attribute(f"{_TYPES}.SlidingSyncConfig", "requester"),
        Attribute(f"{_EXTENSIONS}.StickyEventsExtension", "room_id_to_sticky_events"),
        Attribute("synapse.events.utils.FilteredEvent", "event"),
    ),
    "sliding_response": (
        _JOINED,
        method(HOMESERVER, "get_sliding_sync_handler() -> SlidingSyncHandler"),
        method(
            f"{_SLIDING}.SlidingSyncHandler",
            "async wait_for_sync_for_user(requester, sync_config) -> tuple[_, _]",
            is_replaced=True,
        ),
        Attribute(f"{_TYPES}.SlidingSyncResult", "extensions"),
        Attribute(_EXTENSIONS, "sticky_events"),
        Attribute(f"{_EXTENSIONS}.StickyEventsExtension", "room_id_to_sticky_events"),
        method(STORE, "async get_events(event_ids, /) -> dict"),
        _ERASED,
        Attribute("synapse.events.utils.FilteredEvent", "event"),
    ),
}


def fitting_layers(duty: str) -> tuple[list[str], list[str]]:
    """The layers that fit, of which one suffices, and what the running Synapse lacks on others."""
    by_layer = {layer: misfits(SEAMS[layer]) for layer in LAYERS[duty]}
    fitting = [layer for layer, problems in by_layer.items() if not problems]
    return fitting, [problem for problems in by_layer.values() for problem in problems]


async def still_sticky(
    store: Any, event_ids: Collection[str], now_ms: int | None = None
) -> set[str]:
    """Those of the events that were not redacted meanwhile, nor their senders' data erased (S5);
    ``store`` is the main data store. With ``now_ms`` those that have expired by their own account
    are left out as well (S4).

    Synapse's table keeps the row of an event that is redacted later.
    """
    events = await store.get_events(event_ids)
    sticky = {e: event.sender for e, event in events.items() if _is_sticky(event, now_ms)}
    erased = await store.are_users_erased({*sticky.values()}) if sticky else {}
    return {event_id for event_id, sender in sticky.items() if not erased.get(sender)}


def _is_sticky(event: Any, now_ms: int | None) -> bool:
    duration = event.sticky_duration()
    if duration is None:
        return False
    return now_ms is None or now_ms < event.origin_server_ts + duration / _MS


class HasExpiry(Protocol):
    """A row of the sticky events stream."""

    @property
    def expires_at_ms(self) -> int: ...


RowsOf = Callable[[Collection[str]], Awaitable[Mapping[str, HasExpiry]]]
"""Event IDs to the rows of those that are deliverable, expired or not."""


class Access:
    """Guards the sections, in a process that serves clients.

    rows_of: None if nobody can say; then an event expires when its sender's server says.
    """

    def __init__(self, homeserver: Homeserver, rows_of: RowsOf | None = None) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        self._rows_of = rows_of

    def guard(self, duty: str) -> tuple[bool, list[str]]:
        """Guards the sections of this duty from the next sync on, on each layer that fits.

        Gives whether any does, and what the running Synapse lacks on others. If none does, the
        sections are as Synapse makes them.
        """
        layers, problems = fitting_layers(duty)
        is_guarded = False
        for layer in layers:
            mark = self._homeserver.mark()
            try:
                guard: Callable[[], None] = getattr(self, f"_guard_{layer}")
                guard()
                is_guarded = True
            except Exception as e:
                self._homeserver.undo_to(mark)
                problems.append(f"{type(e).__name__}: {e}")
        if is_guarded and problems:
            logger.warning("Only one layer guards the sections: %s", "; ".join(problems))
        return is_guarded, problems

    async def _joined(self, user: UserID) -> frozenset[str]:
        joined: frozenset[str] = await self._store.get_rooms_for_user(user.to_string())
        return joined

    async def _still_sticky(self, event_ids: Collection[str]) -> set[str]:
        """Those of the events that are neither redacted nor expired at this moment."""
        now_ms = self._homeserver.now_ms()
        sticky = await still_sticky(self._store, event_ids)
        if self._rows_of is None or not sticky:
            return await still_sticky(self._store, sticky, now_ms)
        try:
            rows = await self._rows_of(sticky)
        except CancelledError:
            raise
        except Exception:
            logger.exception("Could not find the expired sticky events, going by what they say")
            return await still_sticky(self._store, sticky, now_ms)
        return {e for e in sticky if e in rows and now_ms < rows[e].expires_at_ms}

    # /sync

    def _guard_sync_section(self) -> None:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            async def _generate_room_entry(
                sync_result_builder: Any,
                room_builder: Any,
                *args: Any,
                sticky_event_ids: list[str],
                **options: Any,
            ) -> None:
                if sticky_event_ids:
                    joined = await self._joined(sync_result_builder.sync_config.user)
                    if room_builder.room_id not in joined:
                        sticky_event_ids = []
                await original(
                    sync_result_builder,
                    room_builder,
                    *args,
                    sticky_event_ids=sticky_event_ids,
                    **options,
                )

            return _generate_room_entry

        handler = self._homeserver.hs.get_sync_handler()
        self._homeserver.replace(handler, "_generate_room_entry", make)

    def _guard_sync_response(self) -> None:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            # Synapse answers a request that is repeated with the same result, from a cache that is
            # inside of this function: whose user may have left meanwhile, and which is not changed.
            async def wait_for_sync_for_user(
                requester: Any, sync_config: Any, *args: Any, **options: Any
            ) -> Any:
                result = await original(requester, sync_config, *args, **options)
                if not any(room.sticky for room in result.joined):
                    return result
                joined = await self._joined(sync_config.user)
                # Nor does anybody get what was redacted meanwhile, or has expired (S4, S5).
                sticky = await self._still_sticky(
                    [shown.event.event_id for room in result.joined for shown in room.sticky]
                )
                rooms = [
                    _with_section(room, sticky if room.room_id in joined else ())
                    for room in result.joined
                ]
                return attr.evolve(result, joined=rooms)

            return wait_for_sync_for_user

        handler = self._homeserver.hs.get_sync_handler()
        self._homeserver.replace(handler, "wait_for_sync_for_user", make)

    # Sliding sync

    def _guard_sliding_section(self) -> None:
        def make(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def get_sticky_events_extension_response(
                *, sync_config: Any, all_interested_room_ids: set[str], **options: Any
            ) -> Any:
                user = sync_config.requester.user
                rooms = all_interested_room_ids & await self._joined(user)
                section = await original(
                    sync_config=sync_config, all_interested_room_ids=rooms, **options
                )
                return await self._as_of_now(user, section)

            return get_sticky_events_extension_response

        extensions = self._homeserver.hs.get_sliding_sync_handler().extensions
        self._homeserver.replace(extensions, "get_sticky_events_extension_response", make)

    def _guard_sliding_response(self) -> None:
        def make(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def wait_for_sync_for_user(
                requester: Requester, sync_config: Any, *args: Any, **options: Any
            ) -> Any:
                result, did_wait = await original(requester, sync_config, *args, **options)
                section = result.extensions.sticky_events
                as_of_now = await self._as_of_now(requester.user, section)
                if as_of_now is not section:
                    extensions = attr.evolve(result.extensions, sticky_events=as_of_now)
                    result = attr.evolve(result, extensions=extensions)
                return result, did_wait

            return wait_for_sync_for_user

        handler = self._homeserver.hs.get_sliding_sync_handler()
        self._homeserver.replace(handler, "wait_for_sync_for_user", make)

    async def _as_of_now(self, user: UserID, section: Any) -> Any:
        """The section without rooms that the user has left meanwhile, and without events that were
        redacted or have expired."""
        if not section or not section.room_id_to_sticky_events:
            return section
        before = section.room_id_to_sticky_events
        joined = await self._joined(user)
        sticky = await self._still_sticky(
            [shown.event.event_id for events in before.values() for shown in events]
        )
        rooms = {}
        for room_id, events in before.items():
            left = [shown for shown in events if shown.event.event_id in sticky]
            if left and room_id in joined:
                rooms[room_id] = left
        if sum(map(len, rooms.values())) == sum(map(len, before.values())):
            return section
        return attr.evolve(section, room_id_to_sticky_events=rooms)


def _with_section(room: Any, event_ids: Collection[str]) -> Any:
    left = [shown for shown in room.sticky if shown.event.event_id in event_ids]
    return room if len(left) == len(room.sticky) else attr.evolve(room, sticky=left)
