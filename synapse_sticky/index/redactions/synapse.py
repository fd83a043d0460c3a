"""All events of a user that stop being sticky at once: a ban or kick that redacts them (MSC4293),
and the erasure of the user's data (S5).

Such a ban is a row of ``room_ban_redactions``. Synapse writes it after the event, in a transaction
of its own, and tells nobody: the process that persists the room's events drops them from its cache,
all others show what they have in theirs. So that process tells all others, once the row is there.
What a crash leaves out is done at the next start (``index.cut_short``).

An erasure reaches the cache of each process by itself.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from synapse.event_auth import get_user_power_level
from synapse.types.state import StateFilter

from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.homeserver.fitting import misfits
from synapse_sticky.homeserver.process import Homeserver
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, method
from synapse_sticky.homeserver.spec import CREATE, POWER_LEVELS
from synapse_sticky.homeserver.whole import SEAMS as WHOLE
from synapse_sticky.homeserver.whole import is_user_redacted_txn
from synapse_sticky.index.cut_short.synapse import CutShort
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_POOL = "synapse.storage.database.DatabasePool"
_PERSISTING = "synapse.storage.databases.main.events.PersistEventsStore"
_STATE = "synapse.storage.controllers.state.StateStorageController"

SEAMS = {
    "bans": (
        Attribute("synapse.storage.databases.Databases", "databases"),
        method(_POOL, "async simple_upsert(table, keyvalues)", is_replaced=True),
        method(_POOL, "async simple_update(table, keyvalues)", is_replaced=True),
        method(STORE, "_invalidate_local_get_event_cache_room_id(room_id, /)"),
        Attribute("synapse.storage.databases.Databases", "persist_events"),
        method(_PERSISTING, "async _can_sender_redact(event, /) -> bool", is_replaced=True),
        method(HOMESERVER, "get_storage_controllers() -> StorageControllers"),
        Attribute("synapse.storage.controllers.StorageControllers", "state"),
        method(_STATE, "async get_state_for_event(event_id, /, *, state_filter) -> dict"),
        *WHOLE["users"],
    ),
    "erasure": (
        Attribute(STORE, "is_user_erased"),
        Attribute("synapse.util.caches.descriptors.CachedFunction", "invalidate"),
    ),
}
"""By what redacts. Where Synapse does not fit, that one stays where it happens."""

WITHOUT = {
    "bans": "a ban that redacts reaches only the process that persists it",
    "erasure": "sticky events of an erased user are shown until they expire",
}

_TABLE = "room_ban_redactions"
_CREATE, _LEVELS = (CREATE, ""), (POWER_LEVELS, "")
_DECIDING = StateFilter.from_types([_CREATE, _LEVELS])
_TO_REDACT = 50  # by the specification, where the power levels do not say
_BACKOFF = Backoff(1_000, 60_000)
_MOST_UNTOLD = 10_000

Redacted = Callable[[str, str], None]
"""``(room_id, user_id)``: what the user has sent in the room may be redacted, or whole again; in
all rooms if ``room_id`` is empty."""


class _Told:
    """What Synapse takes for a cached function of a module: each process hears when one says that
    an entry of it is not true any more."""

    __name__ = "user_redactions"

    def __init__(self, hear: Redacted) -> None:
        self._hear = hear

    def invalidate(self, keys: tuple[Any, ...]) -> None:
        # What is raised here would reach Synapse's replication.
        try:
            room_id, user_id = keys
            self._hear(room_id, user_id)
        except Exception:
            logger.exception("Could not take in that %r are redacted", keys)

    def invalidate_all(self) -> None:
        """Nobody says that of all."""


class UserRedactions:
    """Tells this process, and from the one that persists them all others."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        self._listeners: list[Redacted] = []
        self._told: Any = _Told(self._hear)
        self._untold: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._telling = Retrying(
            homeserver,
            "tell_redactions",
            "Could not tell the other processes whose events are redacted",
            self._tell,
            _BACKOFF,
        )

    def on_redacted(self, listener: Redacted) -> None:
        """Calls back from now on."""
        self._listeners.append(listener)
        if len(self._listeners) > 1:
            return
        for what, install in (("bans", self._follow_bans), ("erasure", self._follow_erasure)):
            problems = misfits(SEAMS[what], self._homeserver.columns)
            if problems:
                logger.error(
                    "This Synapse does not fit: %s. So %s.", "; ".join(problems), WITHOUT[what]
                )
            else:
                install()

    def _hear(self, room_id: str, user_id: str) -> None:
        if room_id:
            # As Synapse does where it persists the ban.
            self._store._invalidate_local_get_event_cache_room_id(room_id)
        for listener in self._listeners:
            try:
                listener(room_id, user_id)
            except Exception:
                logger.exception("Could not note that events of %s are redacted", user_id)

    # Bans and kicks

    def _follow_bans(self) -> None:
        self._homeserver.api.register_cached_function(self._told)
        if self._homeserver.place.writes:
            for pool in self._homeserver.hs.get_datastores().databases:
                self._homeserver.replace(pool, "simple_upsert", self._telling_of_row)
                self._homeserver.replace(pool, "simple_update", self._ending_once)
            persisting = self._homeserver.hs.get_datastores().persist_events
            self._homeserver.replace(persisting, "_can_sender_redact", self._also_of_left_rooms)
            CutShort(self._homeserver, self.say).begin()

    def say(self, room_id: str, user_id: str) -> None:
        """Tells every process, this one first: the row is there."""
        self._untold[room_id, user_id] = None
        if len(self._untold) > _MOST_UNTOLD:
            logger.error(
                "Too many bans to tell of, leaving out %s", self._untold.popitem(last=False)
            )
        self._telling.wake()

    async def _tell(self) -> None:
        while self._untold:
            # Out before it is told, as there may be another row meanwhile.
            pair, _ = self._untold.popitem(last=False)
            try:
                await self._homeserver.api.invalidate_cache(self._told, pair)
            except Exception:
                self._untold[pair] = None
                raise

    def _telling_of_row(self, original: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
        async def upsert_ban(
            table: str, keyvalues: dict[str, Any], *args: Any, **options: Any
        ) -> Any:
            result = await original(table, keyvalues, *args, **options)
            self._say_of(keyvalues)
            return result

        def simple_upsert(
            table: str, keyvalues: dict[str, Any], *args: Any, **options: Any
        ) -> Awaitable[Any]:
            upsert = upsert_ban if table == _TABLE else original
            return upsert(table, keyvalues, *args, **options)

        return simple_upsert

    def _say_of(self, keyvalues: dict[str, Any]) -> None:
        try:
            self.say(keyvalues["room_id"], keyvalues["user_id"])
        except Exception:
            # What is raised here would reach whoever persists the event.
            logger.exception("Could not tell that %r are redacted", keyvalues)

    def _also_of_left_rooms(self, original: Callable[..., Awaitable[bool]]) -> Callable[..., Any]:
        """A ban may be what has this server leave the room: its user was the last one there. Then
        there is no present state that says whether the ban redacts, but that of before."""

        async def can_sender_redact(event: Any, *args: Any, **options: Any) -> bool:
            try:
                return await original(event, *args, **options)
            except KeyError:
                storage = self._homeserver.hs.get_storage_controllers()
                state = await storage.state.get_state_for_event(
                    event.event_id, state_filter=_DECIDING
                )
                if _CREATE not in state:
                    return False
                levels = state.get(_LEVELS)
                needed = None if levels is None else levels.content.get("redact")
                needed = _TO_REDACT if needed is None else int(needed)
                return get_user_power_level(event.sender, state) >= needed

        return can_sender_redact

    def _ending_once(self, original: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
        """What is sent after the unban or the join that ends a redaction counts (S5). Synapse has
        each later join, as of a new display name, end it once more: what the user has sent in
        between would be redacted."""

        async def simple_update(
            table: str, keyvalues: dict[str, Any], *args: Any, **options: Any
        ) -> Any:
            if table == _TABLE and await self._is_over(keyvalues):
                return 0
            return await original(table, keyvalues, *args, **options)

        return simple_update

    async def _is_over(self, keyvalues: dict[str, Any]) -> bool:
        """Does no redaction of this user in the room go on?"""
        try:
            return not await self._homeserver.transact(
                "is_redacted", is_user_redacted_txn, keyvalues["room_id"], keyvalues["user_id"]
            )
        except Exception:
            logger.exception("Could not find out whether a redaction is over, ending it")
            return False

    # Erasure

    def _follow_erasure(self) -> None:
        def make(original: Callable[..., None]) -> Callable[..., None]:
            def invalidate(key: tuple[Any, ...]) -> None:
                original(key)
                self._told.invalidate(("", *key))

            return invalidate

        self._homeserver.replace(self._store.is_user_erased, "invalidate", make)
