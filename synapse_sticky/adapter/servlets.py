"""The parameter for stickiness, where clients send events (S3)."""

import copy
import re
from typing import TYPE_CHECKING, Any

from synapse.api.constants import EventTypes, StickyEvent
from synapse.api.errors import Codes, SynapseError

from synapse_sticky.adapter import hooks

if TYPE_CHECKING:
    from synapse.server import HomeServer

_PUT_STATE_PARAMETERS = ("request", "room_id", "event_type", "state_key", "txn_id")
_SEND_PARAMETERS = ("request", "requester", "room_id", "event_type", "txn_id")
_NAME = StickyEvent.QUERY_PARAM_NAME
_DIGITS = re.compile(rb"[0-9]{1,16}")
_LARGEST = 2**53 - 1  # of the integers that an event can hold


class SynapseServlets:
    """Synapse's servlets for PUT /send and PUT /state.

    Synapse makes them when it begins to listen, later than the module, so it is their classes that
    are changed.
    """

    def __init__(self, hs: "HomeServer") -> None:
        from synapse.rest.client import room

        self._send = room.RoomSendEventRestServlet
        self._state = room.RoomStateEventRestServlet
        self._events: Any = hs.get_event_creation_handler()
        self._replace_send = hooks.replace(self._send, "_do", *_SEND_PARAMETERS)
        self._replace_put = hooks.replace(self._state, "on_PUT", *_PUT_STATE_PARAMETERS)
        self._replace_deduplicate = hooks.replace(
            self._events, "deduplicate_state_event", "event", "context"
        )

    def check_parameter(self) -> None:
        """Every value that PUT /send cannot take is refused, by name."""
        original = self._send._do

        async def send(servlet: Any, request: Any, *args: Any, **options: Any) -> Any:
            sticky_duration_ms(request)
            return await original(servlet, request, *args, **options)

        self._replace_send(send)

    def accept_sticky_state(self) -> None:
        """PUT /state takes the parameter as well."""
        put_original = self._state.on_PUT
        deduplicate_original = self._events.deduplicate_state_event
        events = self._events

        async def put(
            servlet: Any, request: Any, room_id: str, event_type: str, *args: Any, **options: Any
        ) -> Any:
            duration_ms = sticky_duration_ms(request)
            # More than one homeserver may share a process (as in Synapse's own tests).
            if duration_ms is not None and servlet.event_creation_handler is events:
                if event_type == EventTypes.Member:
                    raise _refusal(f"is not possible for {event_type}")
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


def sticky_duration_ms(request: Any) -> int | None:
    """The parameter's value, None without one.

    Raises:
        SynapseError: 400 M_INVALID_PARAM; it is not an integer from 0 up.
    """
    values = request.args.get(_NAME.encode("ascii"))
    if not values:
        return None
    if not _DIGITS.fullmatch(values[0]) or int(values[0]) > _LARGEST:
        raise _refusal(f"must be an integer from 0 to {_LARGEST}, in ms")
    return int(values[0])


def _refusal(problem: str) -> SynapseError:
    return SynapseError(400, f"Query parameter {_NAME} {problem}", errcode=Codes.INVALID_PARAM)


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
