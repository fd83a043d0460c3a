"""Merging a room's forward extremities with Synapse's dummy events."""

from typing import TYPE_CHECKING, Any

from synapse.handlers.worker_lock import NEW_EVENT_DURING_PURGE_LOCK_NAME

from synapse_sticky.adapter import hooks

if TYPE_CHECKING:
    from synapse.server import HomeServer


class SynapseExtremities:
    """Implements ``homeserver.Extremities``."""

    def __init__(self, hs: "HomeServer") -> None:
        # As where and whether Synapse does the same, every five minutes.
        self.merges = bool(
            hs.config.worker.run_background_tasks
            and hs.config.server.cleanup_extremities_with_dummy_events
        )
        self.threshold: int = hs.config.server.dummy_events_threshold
        self._store: Any = hs.get_datastores().main
        self._locks = hs.get_worker_locks_handler()
        hooks.method(self._store, "get_latest_event_ids_in_room", "room_id")
        self._send_dummy_event = hooks.method(
            hs.get_event_creation_handler(),
            "_send_dummy_event_for_room",
            "room_id",
            "proactively_send",
        )

    async def count(self, room_id: str) -> int:
        return len(await self._store.get_latest_event_ids_in_room(room_id))

    async def merge(self, room_id: str) -> bool:
        async with self._locks.acquire_read_write_lock(
            NEW_EVENT_DURING_PURGE_LOCK_NAME, room_id, write=False
        ):
            return await self._send_dummy_event(room_id)
