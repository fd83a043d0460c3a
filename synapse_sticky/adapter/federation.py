"""Sending to other servers: Synapse's per-destination queues and its backlog of sticky events."""

import inspect
import logging
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from synapse.api.errors import (
    FederationDeniedError,
    HttpResponseException,
    RequestSendFailed,
)
from synapse.api.urls import FEDERATION_V1_PREFIX
from synapse.module_api.callbacks.federation import (
    FederatedEventDeliveryMethod,
    FederationEventDeliveryEvent,
)
from synapse.types import RoomID
from synapse.util.retryutils import NotRetryingDestination

from synapse_sticky.adapter import hooks
from synapse_sticky.homeserver import BacklogSource, Cursor, Possession

if TYPE_CHECKING:
    from synapse.module_api import ModuleApi
    from synapse.server import HomeServer

logger = logging.getLogger(__name__)

_ASK_TIMEOUT_MS = 10_000


class SynapseFederation:
    """Implements ``homeserver.Federation``."""

    def __init__(self, hs: "HomeServer", api: "ModuleApi") -> None:
        self._hs = hs
        self._api = api
        self._store: Any = hs.get_datastores().main
        self._instance_name = hs.get_instance_name()
        self._shards = hs.config.worker.federation_shard_config
        self.sends = hs.should_send_federation()
        self._clock = hs.get_clock()
        self._client: Any = hs.get_federation_http_client()
        parameters = inspect.signature(hooks.attribute(self._client, "get_json")).parameters
        if "ignore_backoff" not in parameters:
            raise hooks.HookMismatchError(self._client, "get_json", "takes no ignore_backoff")
        hooks.method(
            self._store, "get_backlogged_sticky_events_for_destination", "destination", "limit"
        )
        if self.sends:
            self._sender: Any = hs.get_federation_sender()
            hooks.method(self._sender, "_get_per_destination_queue", "destination")
            self._check_queue()

    @staticmethod
    def _check_queue() -> None:
        from synapse.federation.sender import per_destination_queue

        queue = hooks.attribute(per_destination_queue, "PerDestinationQueue")
        hooks.method(queue, "attempt_new_transaction")
        tracker = hooks.attribute(per_destination_queue, "StickyEventBacklogTracker")
        hooks.method(tracker, "notify_potential_new_backlog")

    def handles(self, destination: str) -> bool:
        return (
            self.sends
            and destination != self._hs.hostname
            and self._shards.should_handle(self._instance_name, destination)
            and self._hs.config.federation.is_domain_allowed_according_to_federation_whitelist(
                destination
            )
        )

    def wake(self, destination: str) -> None:
        queue = self._sender._get_per_destination_queue(destination)
        if queue is not None:
            queue._sticky_event_backlog_tracker.notify_potential_new_backlog()
            queue.attempt_new_transaction()

    async def retry_at_ms(self, destination: str) -> int:
        timings = await self._store.get_destination_retry_timings(destination)
        return timings.retry_last_ts + timings.retry_interval if timings else 0

    async def has_event(self, destination: str, event_id: str) -> Possession:
        if await self.retry_at_ms(destination) > self._clock.time_msec():
            return Possession.UNREACHABLE
        path = f"{FEDERATION_V1_PREFIX}/event/{urllib.parse.quote(event_id, safe='')}"
        try:
            # Asking in vain must not back the destination off: nothing else would go there either.
            answer = await self._client.get_json(
                destination, path=path, timeout=_ASK_TIMEOUT_MS, ignore_backoff=True
            )
        except HttpResponseException as e:
            if e.code == 404:
                return Possession.LACKS
            # 429 and 5xx pass with time; any other answer is the newcomer's last word.
            temporary = e.code == 429 or e.code >= 500
            return Possession.UNREACHABLE if temporary else Possession.REFUSES
        except (RequestSendFailed, NotRetryingDestination, FederationDeniedError):
            return Possession.UNREACHABLE
        except Exception:
            # Whatever the answer was, it was none.
            logger.exception("Could not ask %s for %s", destination, event_id)
            return Possession.UNREACHABLE
        pdus = answer.get("pdus") if isinstance(answer, dict) else None
        return Possession.HAS if isinstance(pdus, list) and pdus else Possession.LACKS

    def on_acknowledged(
        self, callback: Callable[[str, Sequence[tuple[str, str]]], Awaitable[None]]
    ) -> None:
        async def delivered(delivery: FederationEventDeliveryEvent) -> None:
            if delivery.method is not FederatedEventDeliveryMethod.SEND:
                return
            try:
                await callback(
                    delivery.server_name, [(e.room_id, e.event_id) for e in delivery.events]
                )
            except Exception:
                # Else Synapse would take the transaction for failed. The events are sent again.
                logger.exception("Could not note what %s acknowledged", delivery.server_name)

        self._api.register_federation_callbacks(on_event_delivered_over_federation=delivered)

    def on_caught_up(self, callback: Callable[[str], None]) -> None:
        self._after("mark_backlogged_sticky_events_after_catchup_transaction", callback)

    def on_noted(self, callback: Callable[[str], None]) -> None:
        self._after("set_destination_last_successful_stream_ordering", callback)

    def _after(self, name: str, callback: Callable[[str], None]) -> None:
        original = hooks.attribute(self._store, name)

        async def do(destination: str, *args: Any, **options: Any) -> None:
            await original(destination, *args, **options)
            try:
                callback(destination)
            except Exception:
                # Else Synapse would take the transaction for failed.
                logger.exception("Could not go on with the newcomer %s", destination)

        setattr(self._store, name, do)

    def serve_backlog_from(self, source: BacklogSource) -> None:
        original = self._store.get_backlogged_sticky_events_for_destination

        async def select(destination: str, *, limit: int = 50) -> tuple[Any, Any, Any] | None:
            try:
                batch = await source(destination, limit)
            except Exception:
                logger.exception(
                    "No batch of sticky events for %s, leaving it to Synapse", destination
                )
                return await original(destination, limit=limit)
            if batch is None:
                return None
            return RoomID.from_string(batch.room_id), batch.position, batch.event_ids

        hooks.replace(
            self._store, "get_backlogged_sticky_events_for_destination", "destination", "limit"
        )(select)

    def backlog_txn(self, txn: Cursor, destination: str) -> list[tuple[str, int]]:
        txn.execute(
            "SELECT room_id, sticky_events_stream_position"
            " FROM destination_rooms_sticky_events_backlog WHERE destination = ?",
            (destination,),
        )
        return [(room_id, position) for room_id, position in txn.fetchall()]

    def lower_backlog_txn(self, txn: Cursor, destination: str, room_id: str, position: int) -> None:
        txn.execute(
            "INSERT INTO destination_rooms_sticky_events_backlog AS noted"
            " (destination, room_id, sticky_events_stream_position) VALUES (?, ?, ?)"
            " ON CONFLICT (destination, room_id) DO UPDATE"
            " SET sticky_events_stream_position = EXCLUDED.sticky_events_stream_position"
            " WHERE EXCLUDED.sticky_events_stream_position < noted.sticky_events_stream_position",
            (destination, room_id, position),
        )

    def clear_backlog_txn(self, txn: Cursor, destination: str, room_id: str, position: int) -> None:
        txn.execute(
            "DELETE FROM destination_rooms_sticky_events_backlog"
            " WHERE destination = ? AND room_id = ? AND sticky_events_stream_position >= ?",
            (destination, room_id, position),
        )
