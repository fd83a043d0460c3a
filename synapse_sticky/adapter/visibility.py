"""What other servers and local users may see: Synapse's filters in front of what goes out."""

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from synapse.api.constants import Membership
from synapse.events import EventBase
from synapse.events.utils import FilteredEvent
from synapse.types import get_domain_from_id

from synapse_sticky.adapter import hooks
from synapse_sticky.homeserver import ServerVisibility, UserVisibility

if TYPE_CHECKING:
    from synapse.server import HomeServer

logger = logging.getLogger(__name__)

_PARAMETERS = (
    "storage",
    "target_server_name",
    "local_server_name",
    "events",
    "redact",
    "filter_out_erased_senders",
    "filter_out_remote_partial_state_events",
)
USER_FILTER_PARAMETERS = (
    "storage",
    "user_id",
    "events",
    "is_peeking",
    "always_include_ids",
    "filter_send_to_client",
)


class SynapseVisibility:
    """Implements ``homeserver.Visibility``."""

    def __init__(self, hs: "HomeServer") -> None:
        from synapse import notifier
        from synapse.federation.sender import per_destination_queue
        from synapse.handlers import (
            events,
            federation,
            initial_sync,
            pagination,
            relations,
            room,
            search,
            sliding_sync,
            sync,
        )

        # Any, as in all of the adapter: Synapse's cached methods are typed by a plugin that it does
        # not ship.
        self._store: Any = hs.get_datastores().main
        self._server_name = hs.hostname
        hooks.method(self._store, "is_partial_state_room", "room_id")
        # The modules that send events to other servers each import the filter by name.
        self._users = [per_destination_queue, federation]
        for user in self._users:
            hooks.method(user, "filter_events_for_server", *_PARAMETERS)
        # /event, /messages, /context. The sections of sync are filtered where they are made.
        self._history = [events, pagination, room]
        # All that shows events to users, the servers' administrators and mails aside.
        self._shown = [
            *self._history,
            initial_sync,
            notifier,
            relations,
            search,
            sliding_sync,
            sync,
        ]
        for shown in self._shown:
            hooks.method(shown, "filter_and_transform_events_for_client", *USER_FILTER_PARAMETERS)

    def allow_servers(self, allowed: ServerVisibility) -> None:
        for user in self._users:
            original = user.filter_events_for_server

            async def filter_events(
                storage: Any,
                target_server_name: str,
                local_server_name: str,
                events: Sequence[EventBase],
                _original: Any = original,
                **options: bool,
            ) -> list[EventBase]:
                visible: list[EventBase] = await _original(
                    storage, target_server_name, local_server_name, events, **options
                )
                # More than one homeserver may share a process (as in Synapse's own tests).
                if local_server_name != self._server_name:
                    return visible
                hidden = _hidden_from_server(events, visible)
                if options.get("filter_out_remote_partial_state_events"):
                    # Who is joined is not known for sure, and these are not this server's own.
                    hidden = [e for e in hidden if not await self._is_uncertain(e)]
                return await _add_allowed(allowed, target_server_name, events, visible, hidden)

            hooks.replace(user, "filter_events_for_server", *_PARAMETERS)(filter_events)

    async def _is_uncertain(self, event: EventBase) -> bool:
        if get_domain_from_id(event.sender) == self._server_name:
            return False
        return bool(await self._store.is_partial_state_room(event.room_id))

    def hide_from_users(self, hidden: UserVisibility) -> None:
        for shown in self._shown:
            original = shown.filter_and_transform_events_for_client

            @functools.wraps(original)  # whose parameters are looked at again
            async def filter_events(
                storage: Any,
                user_id: str,
                events: list[EventBase],
                *args: Any,
                _original: Any = original,
                **options: Any,
            ) -> list[FilteredEvent]:
                visible: list[FilteredEvent] = await _original(
                    storage, user_id, events, *args, **options
                )
                if storage.main is not self._store:
                    return visible
                # Whoever was joined at the event had it then.
                doubtful = [
                    e.event
                    for e in visible
                    if e.membership != Membership.JOIN and e.event.sticky_duration() is not None
                ]
                if not doubtful:
                    return visible
                hide = await _hidden_from_user(hidden, user_id, doubtful)
                return [e for e in visible if e.event.event_id not in hide]

            hooks.replace(shown, "filter_and_transform_events_for_client", *USER_FILTER_PARAMETERS)(
                filter_events
            )

    def allow_users(self, allowed: UserVisibility) -> None:
        for shown in self._history:
            original = shown.filter_and_transform_events_for_client

            async def filter_events(
                storage: Any,
                user_id: str,
                events: list[EventBase],
                is_peeking: bool = False,
                always_include_ids: frozenset[str] = frozenset(),
                _original: Any = original,
                **options: bool,
            ) -> Any:
                if storage.main is self._store:
                    always_include_ids |= await _sticky_for_user(allowed, user_id, events)
                return await _original(
                    storage, user_id, events, is_peeking, always_include_ids, **options
                )

            hooks.replace(shown, "filter_and_transform_events_for_client", *USER_FILTER_PARAMETERS)(
                filter_events
            )


async def _sticky_for_user(
    allowed: UserVisibility, user_id: str, events: Sequence[EventBase]
) -> set[str]:
    sticky = [event for event in events if event.sticky_duration() is not None]
    if not sticky:
        return set()
    try:
        return await allowed(user_id, sticky)
    except Exception:
        logger.exception("Could not decide which sticky events %s may see, adding none", user_id)
        return set()


async def _hidden_from_user(
    hidden: UserVisibility, user_id: str, events: Sequence[EventBase]
) -> set[str]:
    try:
        return await hidden(user_id, events)
    except Exception:
        logger.exception("Could not decide which sticky events %s may see, showing none", user_id)
        return {event.event_id for event in events}


def _hidden_from_server(
    events: Sequence[EventBase], visible: Sequence[EventBase]
) -> list[EventBase]:
    """The sticky events that history visibility hides, or shows without what makes them so."""
    # An event that is visible comes back as the very same object, a redacted one as a copy.
    by_id = {event.event_id: event for event in visible}
    return [
        e
        for e in events
        if by_id.get(e.event_id) is not e
        and e.sticky_duration() is not None
        and e.rejected_reason is None
        and not e.internal_metadata.policy_server_spammy
    ]


async def _add_allowed(
    allowed: ServerVisibility,
    server: str,
    events: Sequence[EventBase],
    visible: list[EventBase],
    hidden: Sequence[EventBase],
) -> list[EventBase]:
    if not hidden:
        return visible
    try:
        shown = await allowed(server, hidden)
    except Exception:
        logger.exception("Could not decide which sticky events %s may see, showing none", server)
        return visible
    by_id = {event.event_id: event for event in visible}
    by_id.update((e.event_id, e) for e in hidden if e.event_id in shown)
    return [by_id[e.event_id] for e in events if e.event_id in by_id]
