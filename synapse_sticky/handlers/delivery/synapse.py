"""Which sticky events a user's sync is given: Synapse's question to its database."""

from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError

from synapse_sticky.handlers.delivery.pages import Answer, Question
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.access import still_sticky
from synapse_sticky.homeserver.retention import Retention
from synapse_sticky.homeserver.seams import STORE, method
from synapse_sticky.homeserver.tokens import position_of, token_of
from synapse_sticky.logs import bounded

if TYPE_CHECKING:
    from synapse.types import MultiWriterStreamToken

logger = bounded(__name__)

SEAMS = (
    method(
        STORE,
        "async get_sticky_events_in_rooms(room_ids, *, from_token, to_token, now, limit) -> "
        "tuple[_, _]",
        is_replaced=True,
    ),
    method(STORE, "async get_events(event_ids, /) -> dict"),
    method(STORE, "async are_users_erased(user_ids, /) -> Mapping"),
)


class SynapseDelivery:
    """Implements ``handler.Delivery``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        self._kept = Retention(homeserver).kept

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
                    try:
                        after, up_to = position_of(from_token), position_of(to_token)
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
        try:
            # Synapse's own next step is to load these events, so this costs nothing more.
            event_ids = [event_id for ids in by_room.values() for event_id in ids]
            sticky = await still_sticky(self._store, event_ids) & await self._kept(event_ids)
            left = {room_id: [e for e in ids if e in sticky] for room_id, ids in by_room.items()}
            return {room_id: ids for room_id, ids in left.items() if ids}
        except CancelledError:
            raise
        except Exception:
            logger.exception("Could not find the redacted sticky events, leaving that to the guard")
            return by_room
