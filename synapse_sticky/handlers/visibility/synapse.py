"""What other servers and local users may see: Synapse's two filters in front of what goes out."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from synapse.api.constants import StickyEvent
from twisted.internet.defer import CancelledError

from synapse_sticky.handlers.visibility.handler import Allowed, HiddenEvent
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.everywhere import replace_everywhere
from synapse_sticky.homeserver.fitting import resolve
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, attributes, method
from synapse_sticky.logs import bounded

if TYPE_CHECKING:
    from synapse.events import EventBase
    from synapse.events.utils import FilteredEvent

logger = bounded(__name__)

_FILTERS = "synapse.visibility"
_METADATA = "synapse.synapse_rust.events.EventInternalMetadata"

SEAMS = (
    method(
        _FILTERS,
        "async filter_and_transform_events_for_client(storage, user_id, events, is_peeking, "
        "always_include_ids) -> list[FilteredEvent]",
        is_replaced=True,
    ),
    method(
        _FILTERS,
        "async filter_events_for_server(storage, target_server_name, local_server_name, events)"
        " -> list[EventBase]",
        is_replaced=True,
    ),
    method(HOMESERVER, "get_storage_controllers() -> StorageControllers"),
    Attribute("synapse.events.utils.FilteredEvent", "event"),
    method(_METADATA, "is_outlier()"),
    *attributes(_METADATA, "policy_server_spammy", "spam_checker_spammy"),
    method(STORE, "async is_partial_state_room(room_id, /) -> bool"),
)

_PLAIN = (
    # What exports a user's data for administrators, and what writes mails. If Synapse could not
    # send mails for want of a library, and could later: a mail would say what its reader's client
    # says.
    *("synapse.handlers.admin", "synapse.push.mailer"),
    # /sync and sliding sync have sections for sticky events, which Synapse fills whatever the
    # history visibility. Their timelines show nobody what was before their join.
    *("synapse.handlers.sync", "synapse.handlers.sliding_sync"),
    "synapse.handlers.sliding_sync.extensions",
)
"""The modules that go on with Synapse's own filter for users."""

# What the filters, which all homeservers of a process share, ask of one of them.
_TO_USERS = "_synapse_sticky_allowed_to_users"
_TO_SERVERS = "_synapse_sticky_allowed_to_servers"

_FIELD = StickyEvent.EVENT_FIELD_NAME
_FAILED = "Could not decide which sticky events %s may see, adding none"


class SynapseVisibility:
    """Implements ``handler.Visibility``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        self._storage = homeserver.hs.get_storage_controllers()

    def allow(self, *, servers: Allowed | None, users: Allowed | None) -> None:
        makes: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {}
        if users is not None:
            makes["filter_and_transform_events_for_client"] = _with_allowed_to_users
        if servers is not None:
            makes["filter_events_for_server"] = _with_allowed_to_servers
        replace_everywhere(resolve(_FILTERS), makes, plain=_PLAIN)
        if users is not None:
            self._homeserver.enter(self._storage, _TO_USERS, users)
        if servers is not None:

            async def of_certain(server: str, hidden: Sequence["EventBase"]) -> set[str]:
                certain = [event for event in hidden if not await self._is_uncertain(event)]
                return await servers(server, [_in_our_words(event) for event in certain])

            self._homeserver.enter(self._storage, _TO_SERVERS, of_certain)

    async def _is_uncertain(self, event: "EventBase") -> bool:
        """Is it not known for sure who is joined, and the event not this server's own?"""
        if event.sender.partition(":")[2] == self._homeserver.server_name:
            return False
        return bool(await self._store.is_partial_state_room(event.room_id))


def _in_our_words(event: "EventBase") -> HiddenEvent:
    return HiddenEvent(
        event_id=event.event_id,
        room_id=event.room_id,
        sender=event.sender,
        sticky_field=event.get(_FIELD),
        origin_server_ts=event.origin_server_ts,
    )


def _with_allowed_to_users(original: Callable[..., Any]) -> Callable[..., Any]:
    # That a user peeks, or had left by a position in the past, changes nothing: who is joined at
    # this moment may see these events.
    async def filter_and_transform_events_for_client(
        storage: Any,
        user_id: str,
        events: list["EventBase"],
        is_peeking: bool = False,
        always_include_ids: frozenset[str] = frozenset(),
        *args: Any,
        **options: Any,
    ) -> list["FilteredEvent"]:
        visible: list[FilteredEvent] = await original(
            storage, user_id, events, is_peeking, always_include_ids, *args, **options
        )
        allowed_to: Allowed | None = getattr(storage, _TO_USERS, None)
        if allowed_to is None or len(visible) == len(events):
            return visible
        try:
            hidden = _hidden_from_user(events, visible, always_include_ids)
            if not hidden:
                return visible
            allowed = await allowed_to(user_id, [_in_our_words(event) for event in hidden])
            found = [event for event in hidden if event.event_id in allowed]
            if not found:
                return visible
            # Only these are filtered once more: by whom the user ignores, and in what form they
            # come.
            more = await original(
                storage, user_id, found, is_peeking, always_include_ids | allowed, *args, **options
            )
            shown = {filtered.event.event_id: filtered for filtered in (*visible, *more)}
        except CancelledError:
            raise
        except Exception:
            logger.exception(_FAILED, user_id)
            return visible
        return [shown[event.event_id] for event in events if event.event_id in shown]

    return filter_and_transform_events_for_client


def _hidden_from_user(
    events: Sequence["EventBase"],
    visible: Sequence["FilteredEvent"],
    always_include_ids: frozenset[str],
) -> list["EventBase"]:
    """The sticky events that are filtered out, without outliers, which Synapse cannot include."""
    shown = {filtered.event.event_id for filtered in visible}
    return [
        event
        for event in events
        if event.event_id not in shown
        and event.event_id not in always_include_ids
        and event.sticky_duration() is not None
        and not event.internal_metadata.is_outlier()
    ]


def _with_allowed_to_servers(original: Callable[..., Any]) -> Callable[..., Any]:
    async def filter_events_for_server(
        storage: Any,
        target_server_name: str,
        local_server_name: str,
        events: Sequence["EventBase"],
        *args: Any,
        **options: Any,
    ) -> list["EventBase"]:
        visible: list[EventBase] = await original(
            storage, target_server_name, local_server_name, events, *args, **options
        )
        allowed_to = getattr(storage, _TO_SERVERS, None)
        if allowed_to is None:
            return visible
        try:
            hidden = _hidden_from_server(events, visible)
            if not hidden:
                return visible
            allowed = await allowed_to(target_server_name, hidden)
        except CancelledError:
            raise
        except Exception:
            logger.exception(_FAILED, target_server_name)
            return visible
        by_id = {event.event_id: event for event in visible}
        by_id.update((e.event_id, e) for e in hidden if e.event_id in allowed)
        return [by_id[e.event_id] for e in events if e.event_id in by_id]

    return filter_events_for_server


def _hidden_from_server(
    events: Sequence["EventBase"], visible: Sequence["EventBase"]
) -> list["EventBase"]:
    """The sticky events that are filtered out, or shown without what makes them so."""
    # An event that is visible comes back as the very same object, a redacted one as a copy.
    by_id = {event.event_id: event for event in visible}
    return [
        event
        for event in events
        if by_id.get(event.event_id) is not event
        and event.sticky_duration() is not None
        and event.rejected_reason is None
        and not event.internal_metadata.policy_server_spammy
        and not event.internal_metadata.spam_checker_spammy
    ]
