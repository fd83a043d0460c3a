"""Merging a room's forward extremities with Synapse's dummy events."""

from synapse.handlers.worker_lock import NEW_EVENT_DURING_PURGE_LOCK_NAME

from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, method

SEAMS = (
    Attribute("synapse.config.server.ServerConfig", "dummy_events_threshold"),
    method(STORE, "async get_latest_event_ids_in_room(room_id, /) -> frozenset"),
    method(HOMESERVER, "get_worker_locks_handler() -> WorkerLocksHandler"),
    method(
        "synapse.handlers.worker_lock.WorkerLocksHandler",
        "acquire_read_write_lock(lock_name, lock_key, /, *, write) -> WaitingLock",
    ),
    method(HOMESERVER, "get_event_creation_handler() -> EventCreationHandler"),
    method(
        "synapse.handlers.message.EventCreationHandler",
        "async _send_dummy_event_for_room(room_id, /) -> bool",
    ),
)


class SynapseExtremities:
    """Implements ``handler.Extremities``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._hs = homeserver.hs
        self._store = homeserver.store
        self.threshold = self._hs.config.server.dummy_events_threshold

    async def count(self, room_id: str) -> int:
        return len(await self._store.get_latest_event_ids_in_room(room_id))

    async def merge(self, room_id: str) -> bool:
        async with self._hs.get_worker_locks_handler().acquire_read_write_lock(
            NEW_EVENT_DURING_PURGE_LOCK_NAME, room_id, write=False
        ):
            return await self._hs.get_event_creation_handler()._send_dummy_event_for_room(room_id)
