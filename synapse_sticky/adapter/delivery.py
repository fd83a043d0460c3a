"""Which sticky events a user's sync is given: Synapse's question to its database."""

import logging
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any

from synapse.storage.util import id_generators
from synapse.types import MultiWriterStreamToken, StreamToken

from synapse_sticky.adapter import hooks
from synapse_sticky.adapter.listeners import serves
from synapse_sticky.adapter.sliding import SynapseSlidingSync
from synapse_sticky.adapter.stream import position_of
from synapse_sticky.homeserver import DeliverySource, SlidingPager

if TYPE_CHECKING:
    from synapse.server import HomeServer

logger = logging.getLogger(__name__)

_SYNC_PARAMETERS = ("sync_config", "since_token", "full_state")
_BY_ROOM_PARAMETERS = ("sync_result_builder", "now_token", "since_token")
_PARAMETERS = ("room_ids", "from_token", "to_token", "now", "limit")


class SynapseDelivery:
    """Implements ``homeserver.Delivery``."""

    def __init__(self, hs: "HomeServer") -> None:
        self._store: Any = hs.get_datastores().main
        self._replace = hooks.replace(self._store, "get_sticky_events_in_rooms", *_PARAMETERS)
        # Where a page that is full ends.
        self._end_of_page = hooks.method(
            id_generators,
            "advance_multiwriter_sharded_token_after_partial_read",
            "from_token_exclusive",
            "to_token_inclusive",
            "last_read_stream_id",
        )
        self._sliding_sync = SynapseSlidingSync(hs)
        if serves(hs, "client"):
            self._keep_redacted_out(hs)
            self._skip_if_nothing_is_new(hs)

    def _keep_redacted_out(self, hs: "HomeServer") -> None:
        # An event can be redacted between being found sticky and being loaded (S5).
        handler = hs.get_sync_handler()
        replace = hooks.replace(handler, "current_sync_for_user", *_SYNC_PARAMETERS)
        original = handler.current_sync_for_user

        async def current_sync_for_user(*args: Any, **options: Any) -> Any:
            result = await original(*args, **options)
            for room in result.joined:
                if room.sticky:
                    room.sticky[:] = [
                        shown for shown in room.sticky if shown.event.sticky_duration() is not None
                    ]
            return result

        replace(current_sync_for_user)

    def _skip_if_nothing_is_new(self, hs: "HomeServer") -> None:
        # Synapse would measure how long finding nothing takes, which takes longer than finding it.
        handler = hs.get_sync_handler()
        replace = hooks.replace(handler, "sticky_events_by_room", *_BY_ROOM_PARAMETERS)
        original = handler.sticky_events_by_room

        async def sticky_events_by_room(
            sync_result_builder: Any,
            now_token: StreamToken,
            since_token: StreamToken | None = None,
        ) -> tuple[StreamToken, dict[str, list[str]]]:
            since = since_token and since_token.sticky_events_key
            if now_token.sticky_events_key == since:
                return now_token, {}
            return await original(sync_result_builder, now_token, since_token)

        replace(sticky_events_by_room)

    def answer_from(
        self, source: DeliverySource, catch_up: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        original = self._store.get_sticky_events_in_rooms

        async def get_sticky_events_in_rooms(
            room_ids: Collection[str],
            *,
            from_token: MultiWriterStreamToken,
            to_token: MultiWriterStreamToken,
            now: int,
            limit: int | None,
        ) -> tuple[MultiWriterStreamToken, dict[str, list[str]]]:
            # A client may have a token from the future, or this process be behind.
            if limit == 0 or to_token.is_before_or_eq(from_token):
                return from_token, {}
            if not room_ids:
                return from_token.copy_and_advance(to_token), {}
            question = (room_ids, position_of(from_token), position_of(to_token), now, limit)
            answer = None
            try:
                answer = source(*question)
                if answer is None and catch_up is not None:
                    # Many are often woken by the same event: one of them reads it for all.
                    await catch_up()
                    answer = source(*question)
            except Exception:
                logger.exception("The index failed, asking the database")
            if answer is None:
                reached, by_room = await original(
                    room_ids, from_token=from_token, to_token=to_token, now=now, limit=limit
                )
                return reached, await self._without_redacted(by_room)
            by_room, count, last_stream_id = answer
            if count == limit:
                reached = self._end_of_page(
                    from_token_exclusive=from_token,
                    to_token_inclusive=to_token,
                    last_read_stream_id=last_stream_id,
                )
            elif from_token.is_before_or_eq(to_token):
                reached = to_token  # as copy_and_advance would find out, in more time
            else:
                reached = from_token.copy_and_advance(to_token)
            return reached, by_room

        self._replace(get_sticky_events_in_rooms)

    async def _without_redacted(self, by_room: dict[str, list[str]]) -> dict[str, list[str]]:
        # Synapse's table keeps the row of an event that is redacted later (S5). Its own next step
        # is to load these events, so this costs nothing more.
        events = await self._store.get_events([e for ids in by_room.values() for e in ids])
        sticky = {e for e, event in events.items() if event.sticky_duration() is not None}
        left = {room_id: [e for e in ids if e in sticky] for room_id, ids in by_room.items()}
        return {room_id: ids for room_id, ids in left.items() if ids}

    def page_sliding_sync(self, page: SlidingPager) -> None:
        self._sliding_sync.page(page)
