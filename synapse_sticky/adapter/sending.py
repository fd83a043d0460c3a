"""Events that this server's users send."""

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from synapse.api.constants import StickyEvent
from synapse.api.errors import LimitExceededError

from synapse_sticky.adapter import hooks
from synapse_sticky.adapter.listeners import serves
from synapse_sticky.adapter.servlets import SynapseServlets
from synapse_sticky.homeserver import LocalSend, Refusal

if TYPE_CHECKING:
    from synapse.server import HomeServer

logger = logging.getLogger(__name__)

Check = Callable[[LocalSend], Awaitable[Refusal | None]]

_SEND_PARAMETERS = (
    "requester",
    "event_dict",
    "prev_event_ids",
    "state_event_ids",
    "ratelimit",
    "txn_id",
    "ignore_shadow_ban",
    "outlier",
    "depth",
    "prev_state_events",
    "delay_id",
)
_DELAY_PARAMETERS = (
    "requester",
    "room_id",
    "event_type",
    "state_key",
    "origin_server_ts",
    "content",
    "delay",
    "sticky_duration_ms",
)


class SynapseSending:
    """Implements ``homeserver.Sending``."""

    def __init__(self, hs: "HomeServer") -> None:
        self._store: Any = hs.get_datastores().main
        self._auth = hs.get_auth()
        self.serves_clients = serves(hs, "client")
        if not self.serves_clients:
            return  # and has no handler of delayed events, nor should it get one
        self._events: Any = hs.get_event_creation_handler()
        self._delayed: Any = hs.get_delayed_events_handler()
        self._replace_send = hooks.replace(
            self._events, "create_and_send_nonmember_event", *_SEND_PARAMETERS
        )
        hooks.method(self._events, "get_event_from_transaction", "requester", "txn_id", "room_id")
        self._replace_delay = hooks.replace(self._delayed, "add", *_DELAY_PARAMETERS)
        self._servlets = SynapseServlets(hs)
        self._servlets.check_parameter()

    def accept_sticky_state(self) -> None:
        self._servlets.accept_sticky_state()

    def limit_sticky(self, check: Check) -> None:
        send_original = self._events.create_and_send_nonmember_event
        delay_original = self._delayed.add

        async def send(requester: Any, event_dict: dict[str, Any], **options: Any) -> Any:
            # A delayed event that is due was accepted when it was scheduled.
            if (
                StickyEvent.EVENT_FIELD_NAME in event_dict
                and options.get("ratelimit", True)
                and options.get("delay_id") is None
            ):
                room_id, txn_id = event_dict["room_id"], options.get("txn_id")
                await self._raise_if_refused(check, requester, room_id, txn_id)
            return await send_original(requester, event_dict, **options)

        async def delay(requester: Any, **options: Any) -> Any:
            if options.get("sticky_duration_ms") is not None:
                await self._raise_if_refused(check, requester, options["room_id"], None)
            return await delay_original(requester, **options)

        self._replace_send(send)
        self._replace_delay(delay)

    async def _raise_if_refused(
        self, check: Check, requester: Any, room_id: str, txn_id: str | None
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
            raise LimitExceededError(
                f"synapse_sticky_{refusal.limit}", retry_after_ms=refusal.retry_after_ms
            )

    async def _is_exempt(self, requester: Any) -> bool:
        user_id = requester.user.to_string()
        if self._store.get_app_service_by_user_id(user_id) is not None:
            return True  # its own user is never limited
        if requester.app_service_id is not None:
            service = self._store.get_app_service_by_id(requester.app_service_id)
            if service is not None and not service.is_rate_limited():
                return True
        override = await self._store.get_ratelimit_for_user(user_id)
        if override is not None and not override.messages_per_second:
            return True
        return await self._auth.is_server_admin(requester)

    async def _is_repeated(self, requester: Any, room_id: str, txn_id: str | None) -> bool:
        if txn_id is None:
            return False
        event = await self._events.get_event_from_transaction(requester, txn_id, room_id)
        return event is not None
