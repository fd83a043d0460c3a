"""Clients are told until when this server keeps an event, where that is earlier (S2, S4, D9).

Synapse itself tells them when the event would end. A client would show it until then, though no
other client gets it any more. Nothing is done where this server does not enforce retention.

Fails open: clients are told what Synapse tells them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from synapse.api.constants import EventUnsignedContentFields
from twisted.internet.defer import CancelledError

from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.retention import Retention
from synapse_sticky.homeserver.seams import HOMESERVER, Attribute, method
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_SERIALIZER = "synapse.events.utils.EventClientSerializer"

SEAMS = (
    method(HOMESERVER, "get_event_client_serializer() -> EventClientSerializer"),
    method(_SERIALIZER, "async serialize_event(event, time_now)", is_replaced=True),
    method(_SERIALIZER, "async serialize_events(events, time_now)", is_replaced=True),
    Attribute("synapse.events.utils.FilteredEvent", "event"),
)

_TTL: str = EventUnsignedContentFields.STICKY_TTL


class KeptTtl:
    """Shortens what is left of sticky events, in each process."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._retention = Retention(homeserver)

    def install(self) -> None:
        """Takes effect from the next answer on, where this server enforces retention."""
        if not self._retention.is_on:
            return
        serializer: Any = self._homeserver.hs.get_event_client_serializer()
        self._homeserver.replace(serializer, "serialize_event", self._of_one)
        self._homeserver.replace(serializer, "serialize_events", self._of_many)

    def _of_one(self, original: Callable[..., Any]) -> Callable[..., Any]:
        async def serialize_event(event: Any, time_now: int, *args: Any, **options: Any) -> Any:
            serialized = await original(event, time_now, *args, **options)
            await self._shorten([event], [serialized], time_now)
            return serialized

        return serialize_event

    def _of_many(self, original: Callable[..., Any]) -> Callable[..., Any]:
        async def serialize_events(events: Any, time_now: int, *args: Any, **options: Any) -> Any:
            serialized = await original(events, time_now, *args, **options)
            await self._shorten(events, serialized, time_now)
            return serialized

        return serialize_events

    async def _shorten(self, events: Sequence[Any], serialized: Sequence[Any], now_ms: int) -> None:
        try:
            for shown, content in zip(events, serialized, strict=True):
                unsigned = content.get("unsigned")
                if unsigned is None or _TTL not in unsigned:
                    continue
                event = shown.event
                ends_ms = await self._retention.ends_ms(
                    event.room_id, now_ms + unsigned[_TTL], event.origin_server_ts
                )
                if now_ms < ends_ms:
                    unsigned[_TTL] = ends_ms - now_ms
                else:
                    del unsigned[_TTL]
        except CancelledError:
            raise
        except Exception:
            logger.exception("Could not say how long events are still sticky")
