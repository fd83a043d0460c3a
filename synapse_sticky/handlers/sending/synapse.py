"""Events that this server's users send: Synapse's two servlets, and what these call."""

import copy
import functools
import re
from collections.abc import Awaitable, Callable
from typing import Any

from synapse.api.constants import StickyEvent
from synapse.module_api import Requester
from synapse.module_api.errors import Codes, SynapseError

from synapse_sticky.handlers.sending.handler import Check, LocalSend
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.calls import in_place_of
from synapse_sticky.homeserver.process import replace_shared
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, attributes, method
from synapse_sticky.homeserver.spec import MEMBER
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_EVENTS = "synapse.handlers.message.EventCreationHandler"
_DELAYED = "synapse.handlers.delayed_events.DelayedEventsHandler"
_SEND_SERVLET = "synapse.rest.client.room.RoomSendEventRestServlet"
_STATE_SERVLET = "synapse.rest.client.room.RoomStateEventRestServlet"

_HANDLER = method(HOMESERVER, "get_event_creation_handler() -> EventCreationHandler")

SEAMS = {
    "limit": (
        _HANDLER,
        method(
            _EVENTS,
            "async create_and_send_nonmember_event(requester, event_dict, *, ratelimit, txn_id, "
            "delay_id) -> tuple[_, _]",
            is_replaced=True,
        ),
        method(
            _EVENTS,
            "async get_event_id_from_transaction(requester, txn_id, room_id, /) -> str | None",
        ),
        method(HOMESERVER, "get_delayed_events_handler() -> DelayedEventsHandler"),
        method(
            _DELAYED,
            "async add(requester, *, room_id, sticky_duration_ms) -> str",
            is_replaced=True,
        ),
        method(HOMESERVER, "get_auth() -> Auth"),
        method("synapse.api.auth.base.BaseAuth", "async is_server_admin(requester, /) -> bool"),
        method(STORE, "get_app_service_by_user_id(user_id, /) -> ApplicationService | None"),
        method(STORE, "get_app_service_by_id(as_id, /) -> ApplicationService | None"),
        method("synapse.appservice.ApplicationService", "is_rate_limited() -> bool"),
        method(STORE, "async get_ratelimit_for_user(user_id, /) -> RatelimitOverride | None"),
        Attribute("synapse.storage.databases.main.room.RatelimitOverride", "messages_per_second"),
    ),
    "parameter": (
        _HANDLER,
        method(_SEND_SERVLET, "async _do(request) -> tuple[_, _]", is_replaced=True),
        Attribute(_SEND_SERVLET, "event_creation_handler"),
    ),
    "state_events": (
        _HANDLER,
        method(
            _STATE_SERVLET,
            "async on_PUT(request, room_id, event_type) -> tuple[_, _]",
            is_replaced=True,
        ),
        *attributes(_STATE_SERVLET, "event_creation_handler", "delayed_events_handler"),
        method(
            _EVENTS,
            "async create_and_send_nonmember_event(requester, event_dict) -> tuple[_, _]",
            is_replaced=True,
        ),
        method(_DELAYED, "async add(requester, *, sticky_duration_ms) -> str", is_replaced=True),
        method(_EVENTS, "async deduplicate_state_event(event)", is_replaced=True),
    ),
}

# What the servlets, whose classes all homeservers of a process share, do for one of them.
_CHECKS_PARAMETER = "_synapse_sticky_checks_parameter"
_ACCEPTS_STICKY_STATE = "_synapse_sticky_accepts_sticky_state"

_FIELD = StickyEvent.EVENT_FIELD_NAME
_PARAMETER = StickyEvent.QUERY_PARAM_NAME
_MAX_DURATION_MS = 2**53 - 1  # the largest integer that an event can hold


class SynapseSending:
    """Implements ``handler.Sending``, in a process that serves clients."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        self._events: Any = homeserver.hs.get_event_creation_handler()

    def check_parameter(self) -> None:
        """From now on PUT /send refuses each value of the parameter that it cannot use, with an
        error that names the parameter (S3)."""
        from synapse.rest.client.room import RoomSendEventRestServlet

        self._homeserver.enter(self._events, _CHECKS_PARAMETER, True)
        # Synapse makes the servlets when it begins to listen, later than the module.
        replace_shared(RoomSendEventRestServlet, "_do", _checking_parameter)

    def accept_sticky_state(self) -> None:
        """From now on PUT /state has the parameter as well (S3)."""
        from synapse.rest.client.room import RoomStateEventRestServlet

        self._homeserver.enter(self._events, _ACCEPTS_STICKY_STATE, True)
        replace_shared(RoomStateEventRestServlet, "on_PUT", _accepting_sticky_state)
        self._homeserver.replace(self._events, "deduplicate_state_event", _but_for_sticky)

    def limit_sticky(self, check: Check) -> None:
        def make_send(original: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
            async def send_sticky(
                requester: Requester,
                event_dict: dict[str, Any],
                *args: Any,
                ratelimit: bool = True,
                txn_id: str | None = None,
                delay_id: str | None = None,
                **options: Any,
            ) -> Any:
                # A delayed event that is due was accepted when it was scheduled.
                if ratelimit and delay_id is None:
                    room_id = event_dict["room_id"]
                    await self._raise_if_refused(check, requester, room_id, txn_id)
                options |= {"ratelimit": ratelimit, "txn_id": txn_id, "delay_id": delay_id}
                return await original(requester, event_dict, *args, **options)

            send_sticky_by_name = in_place_of(original, send_sticky)

            def create_and_send_nonmember_event(
                requester: Requester, event_dict: dict[str, Any], *args: Any, **options: Any
            ) -> Awaitable[Any]:
                send = send_sticky_by_name if _FIELD in event_dict else original
                return send(requester, event_dict, *args, **options)

            return create_and_send_nonmember_event

        def make_add(original: Callable[..., Any]) -> Callable[..., Any]:
            async def add(
                requester: Requester,
                *args: Any,
                room_id: str,
                sticky_duration_ms: int | None = None,
                **options: Any,
            ) -> Any:
                if sticky_duration_ms is not None:
                    await self._raise_if_refused(check, requester, room_id, None)
                options |= {"room_id": room_id, "sticky_duration_ms": sticky_duration_ms}
                return await original(requester, *args, **options)

            return add

        replace = self._homeserver.replace
        replace(self._events, "create_and_send_nonmember_event", make_send)
        replace(self._homeserver.hs.get_delayed_events_handler(), "add", make_add)

    async def _raise_if_refused(
        self, check: Check, requester: Requester, room_id: str, txn_id: str | None
    ) -> None:
        request = LocalSend(
            requester.user.to_string(),
            functools.partial(self._is_exempt, requester),
            functools.partial(self._is_repeated, requester, room_id, txn_id),
        )
        try:
            refusal = await check(request)
        except Exception:
            logger.exception("Could not check a sticky event of %s, sending it", request.user_id)
            return
        if refusal is not None:
            raise refusal.error("local")

    async def _is_exempt(self, requester: Requester) -> bool:
        user_id = requester.user.to_string()
        if self._store.get_app_service_by_user_id(user_id) is not None:
            return True  # Synapse never limits an application service's own user
        if requester.app_service_id is not None:
            service = self._store.get_app_service_by_id(requester.app_service_id)
            if service is not None and not service.is_rate_limited():
                return True
        override = await self._store.get_ratelimit_for_user(user_id)
        if override is not None and not override.messages_per_second:
            return True
        # Not `api.is_user_admin`: with delegated authentication, the access token says who is.
        auth: Any = self._homeserver.hs.get_auth()
        is_admin: bool = await auth.is_server_admin(requester)
        return is_admin

    async def _is_repeated(self, requester: Requester, room_id: str, txn_id: str | None) -> bool:
        if txn_id is None:
            return False
        sent = await self._events.get_event_id_from_transaction(requester, txn_id, room_id)
        return sent is not None


def _checking_parameter(original: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    def _do(self: Any, request: Any, *args: Any, **options: Any) -> Awaitable[Any]:
        if getattr(self.event_creation_handler, _CHECKS_PARAMETER, False):
            sticky_duration_ms(request)
        return original(self, request, *args, **options)

    return _do


def _accepting_sticky_state(original: Callable[..., Any]) -> Callable[..., Any]:
    async def on_PUT(  # noqa: N802  # as Synapse calls it
        servlet: Any, request: Any, room_id: str, event_type: str, *args: Any, **options: Any
    ) -> Any:
        accepts = getattr(servlet.event_creation_handler, _ACCEPTS_STICKY_STATE, False)
        duration_ms = sticky_duration_ms(request) if accepts else None
        if duration_ms is not None:
            if event_type == MEMBER:
                raise _invalid(f"is not possible for {event_type}")
            # The servlet itself serves other requests meanwhile.
            servlet = copy.copy(servlet)
            servlet.event_creation_handler = _StickyEvents(
                servlet.event_creation_handler, duration_ms
            )
            servlet.delayed_events_handler = _StickyDelayedEvents(
                servlet.delayed_events_handler, duration_ms
            )
        return await original(servlet, request, room_id, event_type, *args, **options)

    return on_PUT


def _but_for_sticky(original: Callable[..., Any]) -> Callable[..., Any]:
    async def deduplicate_state_event(event: Any, *args: Any, **options: Any) -> Any:
        # The same state once more is sticky for longer, so it is no duplicate.
        if event.sticky_duration() is not None:
            return None
        return await original(event, *args, **options)

    return deduplicate_state_event


def sticky_duration_ms(request: Any) -> int | None:
    """The value of the request's parameter for stickiness in ms, None without one (S3).

    Raises:
        SynapseError: 400 ``M_INVALID_PARAM``; the value is not an integer that an event can hold.
    """
    values = request.args.get(_PARAMETER.encode("ascii"))
    if not values:
        return None
    if not re.fullmatch(rb"[0-9]{1,16}", values[0]) or int(values[0]) > _MAX_DURATION_MS:
        raise _invalid(f"must be an integer from 0 to {_MAX_DURATION_MS}, in ms")
    return int(values[0])


def _invalid(problem: str) -> SynapseError:
    return SynapseError(400, f"Query parameter {_PARAMETER} {problem}", Codes.INVALID_PARAM)


class _StickyEvents:
    """Creates events that are sticky."""

    def __init__(self, events: Any, duration_ms: int) -> None:
        self._events = events
        self._field = {"duration_ms": duration_ms}

    async def create_and_send_nonmember_event(
        self, requester: Requester, event_dict: dict[str, Any], *args: Any, **options: Any
    ) -> Any:
        event_dict = {**event_dict, _FIELD: self._field}
        return await self._events.create_and_send_nonmember_event(
            requester, event_dict, *args, **options
        )


class _StickyDelayedEvents:
    """Schedules events that will be sticky."""

    def __init__(self, delayed_events: Any, duration_ms: int) -> None:
        self._delayed_events = delayed_events
        self._duration_ms = duration_ms

    async def add(self, requester: Requester, *args: Any, **options: Any) -> Any:
        options["sticky_duration_ms"] = self._duration_ms
        return await self._delayed_events.add(requester, *args, **options)
