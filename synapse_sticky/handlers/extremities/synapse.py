"""A room's forward extremities, and Synapse's dummy events."""

from collections.abc import Callable, Collection, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from synapse.event_auth import get_user_power_level
from synapse.handlers.worker_lock import NEW_EVENT_DURING_PURGE_LOCK_NAME
from synapse.module_api.errors import SynapseError
from synapse.types import create_requester

from synapse_sticky.handlers.extremities.senders import Able
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.causes import Cause
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, method, table
from synapse_sticky.homeserver.spec import CREATE, DUMMY, MEMBER, POWER_LEVELS
from synapse_sticky.logs import bounded

if TYPE_CHECKING:
    from synapse.module_api import EventBase, StateMap

logger = bounded(__name__)

_CREATION = "synapse.handlers.message.EventCreationHandler"

SEAMS = (
    Attribute("synapse.config.server.ServerConfig", "dummy_events_threshold"),
    method(STORE, "async get_latest_event_ids_in_room(room_id, /) -> frozenset"),
    method(STORE, "async get_local_users_in_room(room_id, /) -> Sequence"),
    method(STORE, "_invalidate_state_caches(room_id)", is_replaced=True),
    method(HOMESERVER, "get_worker_locks_handler() -> WorkerLocksHandler"),
    method(
        "synapse.handlers.worker_lock.WorkerLocksHandler",
        "acquire_read_write_lock(lock_name, lock_key, /, *, write) -> WaitingLock",
    ),
    method(HOMESERVER, "get_event_creation_handler() -> EventCreationHandler"),
    method("synapse.types", "create_requester(user_id, /, *, authenticated_entity) -> Requester"),
    Attribute(_CREATION, "_rooms_to_exclude_from_dummy_event_insertion"),
    method(
        _CREATION, "async create_event(requester, event_dict, /, *, prev_event_ids) -> tuple[_, _]"
    ),
    table("event_forward_extremities", "event_id text, room_id text"),
    table("events", "event_id text, stream_ordering integer"),
    method("synapse.events.snapshot.UnpersistedEventContextBase", "async persist(event, /)"),
    Attribute("synapse.synapse_rust.events.EventInternalMetadata", "proactively_send"),
    method(
        _CREATION,
        "async handle_new_client_event(requester, events_and_context, /, *, ratelimit, "
        "ignore_shadow_ban)",
    ),
)

_MAX_PREV_EVENTS = 10
"""Synapse makes no event with more."""

_CREATE, _POWER_LEVELS = (CREATE, ""), (POWER_LEVELS, "")


class SynapseExtremities:
    """Implements ``handler.Extremities`` and ``senders.DummyEvents``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._hs = homeserver.hs
        self._store = homeserver.store
        self.threshold = self._hs.config.server.dummy_events_threshold

    async def count(self, room_id: str) -> int:
        return len(await self._store.get_latest_event_ids_in_room(room_id))

    def on_state_changed(self, callback: Callable[[str], None]) -> None:
        # Synapse drops what it has cached of a room's current state in every process, whenever that
        # changes: nothing has to be read for it.
        def noting_changes(original: Callable[..., None]) -> Callable[..., None]:
            def invalidate_state_caches(room_id: str, *args: Any, **options: Any) -> None:
                original(room_id, *args, **options)
                try:
                    callback(room_id)
                except Exception:
                    logger.exception("Could not note that the state of %s changed", room_id)

            return invalidate_state_caches

        self._homeserver.replace(self._store, "_invalidate_state_caches", noting_changes)

    # Dummy events

    async def able(self, room_id: str) -> Able:
        state = await self._homeserver.api.get_room_state(room_id, [_CREATE, _POWER_LEVELS])
        users = able_among(await self._store.get_local_users_in_room(room_id), state)
        power_levels = state.get(_POWER_LEVELS)
        event_id = power_levels.event_id if power_levels else None
        return Able(users, hash((event_id, frozenset(users))))

    async def send(self, room_id: str, user_id: str) -> str | None:
        """As Synapse sends one, but as this user only."""
        creation = self._creation
        requester = create_requester(user_id, authenticated_entity=self._homeserver.server_name)
        content = {"type": DUMMY, "content": {}, "room_id": room_id, "sender": user_id}
        try:
            async with self._hs.get_worker_locks_handler().acquire_read_write_lock(
                NEW_EVENT_DURING_PURGE_LOCK_NAME, room_id, write=False
            ):
                event, unpersisted = await creation.create_event(
                    requester, content, prev_event_ids=await self._to_merge(room_id, user_id)
                )
                context = await unpersisted.persist(event)
                event.internal_metadata.proactively_send = False
                await creation.handle_new_client_event(
                    requester, [(event, context)], ratelimit=False, ignore_shadow_ban=True
                )
        except Exception as e:
            if _passes(e):
                raise
            return f"{type(e).__name__}: {e}"
        return None

    async def _to_merge(self, room_id: str, user_id: str) -> list[str]:
        """The forward extremities that the user's dummy event is to refer to.

        The event is allowed by the state that these have. Synapse would take any ten, and might
        leave out those that have the change of power levels, or the join, which allows it.
        """
        keys = [_POWER_LEVELS, (MEMBER, user_id)]
        state = await self._homeserver.api.get_room_state(room_id, keys)
        clause, args = self._homeserver.in_list("e.event_id", [e.event_id for e in state.values()])

        def read_txn(txn: Cursor) -> list[str]:
            txn.execute(
                "SELECT e.event_id FROM event_forward_extremities AS f"
                " INNER JOIN events AS e ON e.event_id = f.event_id WHERE f.room_id = ?"
                f" ORDER BY CASE WHEN {clause} THEN 0 ELSE 1 END, e.stream_ordering DESC LIMIT ?",
                (room_id, *args, _MAX_PREV_EVENTS),
            )
            return [event_id for (event_id,) in txn.fetchall()]

        return await self._homeserver.transact("to_merge", read_txn)

    def left_out_since_ms(self, room_id: str) -> int | None:
        since_ms = self._left_out.get(room_id)
        ago_ms = -1 if since_ms is None else self._homeserver.now_ms() - since_ms
        # What is ahead was noted before the clock was set back.
        return self._homeserver.steady_ms() - ago_ms if ago_ms >= 0 else None

    def leave_out(self, room_id: str) -> None:
        self._left_out[room_id] = self._homeserver.now_ms()

    def leave_in(self, room_id: str) -> None:
        self._left_out.pop(room_id, None)

    @property
    def _creation(self) -> Any:
        return self._hs.get_event_creation_handler()

    @property
    def _left_out(self) -> dict[str, int]:
        # Synapse forgets what is in it after a week.
        rooms: dict[str, int] = self._creation._rooms_to_exclude_from_dummy_event_insertion
        return rooms


def _passes(error: Exception) -> bool:
    """Has it failed for a cause that is not the room's or the sender's?"""
    if isinstance(error, SynapseError):
        # Conflict: the room's state has become complete meanwhile.
        return error.code >= 500 or error.code == HTTPStatus.CONFLICT
    # Not the driver's errors only: Twisted has one of its own for a connection that is lost.
    return Cause.of_database(error) is not None


def able_among(members: Collection[str], state: "StateMap[EventBase]") -> Sequence[str]:
    """Those of the members who may send a dummy event, most power first.

    Args:
        state: the room's create event and power levels, as far as there are any.
    """
    create, power_levels = state.get(_CREATE), state.get(_POWER_LEVELS)
    if create is None:
        return ()
    creators = [create.sender, create.content.get("creator")]
    if isinstance(more := create.content.get("additional_creators"), list | tuple):
        creators += more
    named = {user_id for user_id in creators if isinstance(user_id, str)}
    if power_levels and isinstance(users := power_levels.content.get("users"), Mapping):
        named.update(users)
    surplus = {m: found for m in members if m in named and (found := _surplus(m, state)) >= 0}
    able = sorted(surplus, key=lambda m: -surplus[m])
    # All whom the state does not name have the same power.
    others = [m for m in members if m not in named]
    if others and _surplus(others[0], state) >= 0:
        able += others
    return able


def _surplus(user_id: str, state: "StateMap[EventBase]") -> int:
    """By how much the user's power exceeds what a dummy event needs; negative if it does not."""
    try:
        return get_user_power_level(user_id, state) - _needed(state.get(_POWER_LEVELS))
    except (TypeError, ValueError, AttributeError):
        # Synapse cannot read these power levels either, and lets no event pass.
        return -1


def _needed(power_levels: "EventBase | None") -> int:
    """The power that a dummy event needs, which has no state key."""
    content: Mapping[str, Any] = {} if power_levels is None else power_levels.content
    level = content.get("events", {}).get(DUMMY)
    return int(content.get("events_default", 0) if level is None else level)
