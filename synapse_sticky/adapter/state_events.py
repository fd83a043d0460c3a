"""Sticky state events: the parameter of PUT /send on PUT /state as well."""

import copy
from typing import TYPE_CHECKING, Any

from synapse.api.constants import EventTypes, StickyEvent
from synapse.api.errors import Codes, SynapseError
from synapse.http.servlet import parse_integer

from synapse_sticky.adapter import hooks

if TYPE_CHECKING:
    from synapse.server import HomeServer

_PUT_PARAMETERS = ("request", "room_id", "event_type", "state_key", "txn_id")


class SynapseStateEvents:
    """Has Synapse's servlet for PUT /state take the parameter."""

    def __init__(self, hs: "HomeServer") -> None:
        from synapse.rest.client.room import RoomStateEventRestServlet

        self._servlet = RoomStateEventRestServlet
        self._events: Any = hs.get_event_creation_handler()
        # Synapse makes its servlets when it begins to listen, later than the module.
        self._replace_put = hooks.replace(self._servlet, "on_PUT", *_PUT_PARAMETERS)
        self._replace_deduplicate = hooks.replace(
            self._events, "deduplicate_state_event", "event", "context"
        )

    def accept_sticky(self) -> None:
        put_original = self._servlet.on_PUT
        deduplicate_original = self._events.deduplicate_state_event
        events = self._events

        async def put(
            servlet: Any, request: Any, room_id: str, event_type: str, *args: Any, **options: Any
        ) -> Any:
            duration_ms = parse_integer(request, StickyEvent.QUERY_PARAM_NAME)
            if duration_ms is not None and servlet.event_creation_handler is events:
                if event_type == EventTypes.Member:
                    raise SynapseError(
                        400,
                        f"{StickyEvent.QUERY_PARAM_NAME} is not possible for {event_type}",
                        errcode=Codes.INVALID_PARAM,
                    )
                # The servlet itself serves other requests meanwhile.
                servlet = copy.copy(servlet)
                servlet.event_creation_handler = _StickyEvents(events, duration_ms)
                servlet.delayed_events_handler = _StickyDelayedEvents(
                    servlet.delayed_events_handler, duration_ms
                )
            return await put_original(servlet, request, room_id, event_type, *args, **options)

        async def deduplicate_state_event(event: Any, context: Any) -> Any:
            # The same state again is sticky for longer, so it is no repetition.
            if event.sticky_duration() is not None:
                return None
            return await deduplicate_original(event, context)

        self._replace_put(put)
        self._replace_deduplicate(deduplicate_state_event)


class _StickyEvents:
    """Creates events that are sticky."""

    def __init__(self, events: Any, duration_ms: int) -> None:
        self._events = events
        self._field = {"duration_ms": duration_ms}

    async def create_and_send_nonmember_event(
        self, requester: Any, event_dict: dict[str, Any], **options: Any
    ) -> Any:
        event_dict = {**event_dict, StickyEvent.EVENT_FIELD_NAME: self._field}
        return await self._events.create_and_send_nonmember_event(requester, event_dict, **options)


class _StickyDelayedEvents:
    """Schedules events that will be sticky."""

    def __init__(self, delayed_events: Any, duration_ms: int) -> None:
        self._delayed_events = delayed_events
        self._duration_ms = duration_ms

    async def add(self, requester: Any, **options: Any) -> Any:
        return await self._delayed_events.add(
            requester, **{**options, "sticky_duration_ms": self._duration_ms}
        )
