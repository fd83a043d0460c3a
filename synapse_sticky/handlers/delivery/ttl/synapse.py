"""How Synapse shows events to clients: this says how long they are sticky."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from synapse.api.constants import EventUnsignedContentFields
from twisted.internet.defer import CancelledError

from synapse_sticky.handlers.delivery.ttl.handler import LeftMs
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.seams import HOMESERVER, Attribute, method
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_SERIALIZER = "synapse.events.utils.EventClientSerializer"

SEAMS = (
    method(HOMESERVER, "get_event_client_serializer() -> EventClientSerializer"),
    method(_SERIALIZER, "async serialize_event(event, time_now) -> dict", is_replaced=True),
    method(_SERIALIZER, "async serialize_events(events, time_now) -> list", is_replaced=True),
    Attribute("synapse.events.utils.FilteredEvent", "event"),
)

_TTL: str = EventUnsignedContentFields.STICKY_TTL


class SynapseTelling:
    """Implements ``handler.Telling``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver

    def shorten_by(self, left_ms: LeftMs) -> None:
        def make_one(original: Callable[..., Any]) -> Callable[..., Any]:
            async def serialize_event(
                event: Any, time_now: int, *args: Any, **options: Any
            ) -> dict[str, Any]:
                shown: dict[str, Any] = await original(event, time_now, *args, **options)
                await _shorten(left_ms, [event], [shown], time_now)
                return shown

            return serialize_event

        def make_all(original: Callable[..., Any]) -> Callable[..., Any]:
            async def serialize_events(
                events: Sequence[Any], time_now: int, *args: Any, **options: Any
            ) -> list[dict[str, Any]]:
                shown: list[dict[str, Any]] = await original(events, time_now, *args, **options)
                await _shorten(left_ms, events, shown, time_now)
                return shown

            return serialize_events

        serializer = self._homeserver.hs.get_event_client_serializer()
        self._homeserver.replace(serializer, "serialize_event", make_one)
        self._homeserver.replace(serializer, "serialize_events", make_all)


async def _shorten(
    left_ms: LeftMs, events: Iterable[Any], shown: Iterable[dict[str, Any]], now_ms: int
) -> None:
    """Changes what is shown, which Synapse makes anew each time."""
    try:
        told: dict[str, dict[str, Any]] = {
            event.event.event_id: unsigned
            for event, one in zip(events, shown, strict=True)
            if _TTL in (unsigned := one.get("unsigned") or {})
        }
        if not told:
            return
        for event_id, ms in (await left_ms(told.keys(), now_ms)).items():
            if ms <= 0:
                del told[event_id][_TTL]
            elif ms < told[event_id][_TTL]:
                told[event_id][_TTL] = ms
    except CancelledError:
        raise
    except Exception:
        logger.exception("Could not find out how long events are sticky")
