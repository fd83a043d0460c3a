"""Which sticky events a user's sync is given: Synapse's question to its database."""

import logging
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any

import attr
from twisted.internet.defer import CancelledError

from synapse_sticky.handlers.delivery.handler import Answer, Question
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, Method, attributes
from synapse_sticky.index.synapse import position_of, token_of

if TYPE_CHECKING:
    from synapse.types import MultiWriterStreamToken

logger = logging.getLogger(__name__)

_SYNC = "synapse.handlers.sync"

SEAMS = (
    Method(
        STORE,
        "get_sticky_events_in_rooms",
        1,
        ("from_token", "to_token", "now", "limit"),
        is_async=True,
        is_replaced=True,
    ),
    Method(STORE, "get_events", 1, is_async=True),
    Method(STORE, "get_rooms_for_user", 1, is_async=True),
    Method(HOMESERVER, "get_sync_handler"),
    Method(f"{_SYNC}.SyncHandler", "wait_for_sync_for_user", 3, is_async=True, is_replaced=True),
    Attribute(f"{_SYNC}.SyncConfig", "user"),
    Attribute(f"{_SYNC}.SyncResult", "joined"),
    *attributes(f"{_SYNC}.JoinedSyncResult", "room_id", "sticky"),
    Attribute("synapse.events.utils.FilteredEvent", "event"),
)


class SynapseDelivery:
    """Implements ``handler.Delivery``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store

    def answer_from(self, source: Callable[[Question], Awaitable[Answer | None]]) -> None:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            async def get_sticky_events_in_rooms(
                room_ids: Collection[str],
                *,
                from_token: "MultiWriterStreamToken",
                to_token: "MultiWriterStreamToken",
                now: int,
                limit: int | None,
                **options: Any,
            ) -> "tuple[MultiWriterStreamToken, dict[str, list[str]]]":
                answer = None
                if not options:  # else more is asked than is known here
                    after, up_to = position_of(from_token), position_of(to_token)
                    try:
                        answer = await source(Question(room_ids, after, up_to, now, limit))
                    except CancelledError:
                        raise
                    except Exception:
                        logger.exception("The index failed, asking the database")
                if answer is not None:
                    by_room, reached = answer
                    # Most syncs end at one of the two that Synapse has a token of.
                    if reached is after:
                        return from_token, by_room
                    return to_token if reached is up_to else token_of(reached), by_room
                reached_token, by_room = await original(
                    room_ids,
                    from_token=from_token,
                    to_token=to_token,
                    now=now,
                    limit=limit,
                    **options,
                )
                return reached_token, await self._without_redacted(by_room)

            return get_sticky_events_in_rooms

        self._homeserver.replace(self._store, "get_sticky_events_in_rooms", make)

    async def _without_redacted(self, by_room: dict[str, list[str]]) -> dict[str, list[str]]:
        # Synapse's table keeps the row of an event that is redacted later (S5). Its own next step
        # is to load these events, so this costs nothing more.
        sticky = await self._still_sticky([e for ids in by_room.values() for e in ids])
        left = {room_id: [e for e in ids if e in sticky] for room_id, ids in by_room.items()}
        return {room_id: ids for room_id, ids in left.items() if ids}

    async def _still_sticky(self, event_ids: Collection[str]) -> set[str]:
        events = await self._store.get_events(event_ids)
        return {e for e, event in events.items() if event.sticky_duration() is not None}

    def check_sections(self) -> None:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            # Synapse answers a request that is repeated with the same result, from a cache that is
            # inside of this function: whose user may have left meanwhile, and which is not changed.
            async def wait_for_sync_for_user(
                requester: Any, sync_config: Any, *args: Any, **options: Any
            ) -> Any:
                result = await original(requester, sync_config, *args, **options)
                if not any(room.sticky for room in result.joined):
                    return result
                joined = await self._store.get_rooms_for_user(sync_config.user.to_string())
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


def _with_section(room: Any, event_ids: Collection[str]) -> Any:
    left = [shown for shown in room.sticky if shown.event.event_id in event_ids]
    return room if len(left) == len(room.sticky) else attr.evolve(room, sticky=left)
