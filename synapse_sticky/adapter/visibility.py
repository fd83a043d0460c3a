"""What other servers may see: the filter in front of everything that goes out to them."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from synapse.events import EventBase

from synapse_sticky.adapter import hooks
from synapse_sticky.homeserver import ServerVisibility

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


class SynapseVisibility:
    """Implements ``homeserver.Visibility``."""

    def __init__(self, hs: "HomeServer") -> None:
        from synapse.federation.sender import per_destination_queue
        from synapse.handlers import federation

        self._server_name = hs.hostname
        # The modules that send events to other servers each import the filter by name.
        self._users = [per_destination_queue, federation]
        for user in self._users:
            hooks.method(user, "filter_events_for_server", *_PARAMETERS)

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
                return await _add_allowed(allowed, target_server_name, events, visible)

            hooks.replace(user, "filter_events_for_server", *_PARAMETERS)(filter_events)


async def _add_allowed(
    allowed: ServerVisibility,
    server: str,
    events: Sequence[EventBase],
    visible: list[EventBase],
) -> list[EventBase]:
    # An event that is visible comes back as the very same object, a redacted one as a copy.
    by_id = {event.event_id: event for event in visible}
    hidden = [
        e for e in events if by_id.get(e.event_id) is not e and e.sticky_duration() is not None
    ]
    if not hidden:
        return visible
    try:
        shown = await allowed(server, hidden)
    except Exception:
        logger.exception("Could not decide which sticky events %s may see, showing none", server)
        return visible
    by_id.update((e.event_id, e) for e in hidden if e.event_id in shown)
    return [by_id[e.event_id] for e in events if e.event_id in by_id]
