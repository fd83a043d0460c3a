"""Sending to other servers: Synapse's per-destination queues and its backlog of sticky events."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from synapse.module_api import RoomID
from synapse.module_api.callbacks.federation import (
    FederatedEventDeliveryMethod,
    FederationEventDeliveryEvent,
)

from synapse_sticky.handlers.joins.backlog.synapse import SynapseBacklog
from synapse_sticky.handlers.joins.federation import BacklogSource, LeftToSynapseError
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.retention import Retention
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, attributes, method
from synapse_sticky.homeserver.whole import still_whole
from synapse_sticky.logs import bounded

if TYPE_CHECKING:
    from synapse_sticky.homeserver.rooms import Rooms

logger = bounded(__name__)

_CAUGHT_UP_TO = "new_last_successfully_sent_stream_ordering"

_SENDER = "synapse.federation.sender"
_QUEUE = f"{_SENDER}.per_destination_queue.PerDestinationQueue"
_TRACKER = f"{_SENDER}.per_destination_queue.StickyEventBacklogTracker"
_TRANSPORT = "synapse.federation.transport.client.TransportLayerClient"

SEAMS = (
    method(HOMESERVER, "get_federation_sender() -> AbstractFederationSender"),
    Attribute("synapse.config.homeserver.HomeServerConfig", "federation"),
    Attribute("synapse.config.workers.WorkerConfig", "federation_shard_config"),
    method(
        "synapse.config._base.ShardedWorkerHandlingConfig",
        "should_handle(instance_name, key, /) -> bool",
    ),
    Attribute("synapse.config.federation.FederationConfig", "federation_domain_whitelist"),
    method(
        f"{_SENDER}.FederationSender",
        "_get_per_destination_queue(destination, /) -> PerDestinationQueue | None",
    ),
    method(_QUEUE, "attempt_new_transaction()"),
    Attribute(_QUEUE, "_sticky_event_backlog_tracker"),
    method(_TRACKER, "notify_potential_new_backlog()"),
    method(HOMESERVER, "get_federation_transport_client() -> TransportLayerClient"),
    method(_TRANSPORT, "async send_transaction(transaction)", is_replaced=True),
    *attributes("synapse.federation.units.Transaction", "destination", "pdus"),
    method(
        STORE,
        "async get_destination_retry_timings(destination, /) -> DestinationRetryTimings | None",
    ),
    *attributes(
        "synapse.storage.databases.main.transactions.DestinationRetryTimings",
        *("retry_last_ts", "retry_interval"),
    ),
    method(
        STORE,
        "async get_backlogged_sticky_events_for_destination(destination, *, limit) -> "
        "tuple[_, _, _] | None",
        is_replaced=True,
    ),
    method(
        STORE,
        "async mark_backlogged_sticky_events_sent(destination, room_id, "
        "max_sent_sticky_events_stream_position)",
        is_replaced=True,
    ),
    method(
        STORE,
        "async mark_backlogged_sticky_events_after_catchup_transaction(destination, *, "
        f"{_CAUGHT_UP_TO})",
        is_replaced=True,
    ),
    method(
        STORE,
        "async set_destination_last_successful_stream_ordering(destination)",
        is_replaced=True,
    ),
    method(STORE, "async get_partial_state_servers_at_join(room_id, /) -> AbstractSet | None"),
    method(HOMESERVER, "get_notifier() -> Notifier"),
    method("synapse.notifier.Notifier", "notify_remote_server_up(server, /)", is_replaced=True),
)


class SynapseFederation(SynapseBacklog):
    """Implements ``federation.Federation``."""

    def __init__(self, homeserver: Homeserver, rooms: "Rooms") -> None:
        super().__init__(homeserver)
        self._rooms = rooms
        self._retention = Retention(homeserver)
        config = homeserver.hs.config
        self._shards = config.worker.federation_shard_config
        self._federation_config: Any = config.federation

    def handles(self, destination: str) -> bool:
        return (
            destination != self._homeserver.server_name
            and self._shards.should_handle(self._homeserver.instance_name, destination)
            and self._is_whitelisted(destination)
        )

    def _is_whitelisted(self, destination: str) -> bool:
        whitelist = self._federation_config.federation_domain_whitelist
        return whitelist is None or destination in whitelist

    def wake(self, destination: str) -> None:
        sender: Any = self._homeserver.hs.get_federation_sender()
        queue = sender._get_per_destination_queue(destination)
        if queue is not None:
            queue._sticky_event_backlog_tracker.notify_potential_new_backlog()
            queue.attempt_new_transaction()

    async def retry_at_ms(self, destination: str) -> int:
        timings = await self._store.get_destination_retry_timings(destination)
        return timings.retry_last_ts + timings.retry_interval if timings else 0

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
                # Else Synapse would take the transaction for failed. The events are resent.
                logger.exception("Could not take in what %s acknowledged", delivery.server_name)

        self._homeserver.api.register_federation_callbacks(
            on_event_delivered_over_federation=delivered
        )

    def on_refused(self, callback: Callable[[str, set[str], list[str]], Awaitable[None]]) -> None:
        def make(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def send(transaction: Any, *args: Any, **options: Any) -> Any:
                answer = await original(transaction, *args, **options)
                try:
                    refused = _refused(answer)
                    if refused:
                        rooms = {pdu.get("room_id", "") for pdu in transaction.pdus}
                        await callback(transaction.destination, rooms, refused)
                except Exception:
                    # Else Synapse would take the transaction for failed.
                    logger.exception("Could not take in what %s refused", transaction.destination)
                return answer

            return send

        client = self._homeserver.hs.get_federation_transport_client()
        self._homeserver.replace(client, "send_transaction", make)

    def on_reachable(self, callback: Callable[[str], None]) -> None:
        def make(original: Callable[..., None]) -> Callable[..., None]:
            def notify_remote_server_up(server: str, *args: Any, **options: Any) -> None:
                original(server, *args, **options)
                try:
                    callback(server)
                except Exception:
                    logger.exception("Could not look after the pushes to %s", server)

            return notify_remote_server_up

        notifier = self._homeserver.hs.get_notifier()
        self._homeserver.replace(notifier, "notify_remote_server_up", make)

    def on_skipped(self, callback: Callable[[str], None]) -> None:
        def make(original: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
            then_called = _then_called(original, callback)

            async def mark(
                destination: str,
                *args: Any,
                new_last_successfully_sent_stream_ordering: Any,
                **options: Any,
            ) -> None:
                up_to = new_last_successfully_sent_stream_ordering
                # Synapse asks for the events before the one that it caught up to. That one is
                # skipped, too, where Synapse sent later events of the room in its place. Events
                # that Synapse did send are left out in any case.
                options[_CAUGHT_UP_TO] = up_to + 1 if isinstance(up_to, int) else up_to
                await then_called(destination, *args, **options)

            return mark

        name = "mark_backlogged_sticky_events_after_catchup_transaction"
        self._homeserver.replace(self._store, name, make)

    def on_catch_up_recorded(self, callback: Callable[[str], None]) -> None:
        name = "set_destination_last_successful_stream_ordering"
        make = partial(_then_called, callback=callback)
        self._homeserver.replace(self._store, name, make)

    def serve_backlog_from(self, source: BacklogSource) -> None:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            async def select(
                destination: str, *args: Any, limit: int = 50, **options: Any
            ) -> tuple[Any, Any, Any] | None:
                try:
                    batch = await source(destination, limit)
                except LeftToSynapseError:
                    found = await original(destination, *args, limit=limit, **options)
                    return await self._kept(found)
                except Exception:
                    logger.exception(
                        "No batch of sticky events for %s, leaving it to Synapse", destination
                    )
                    found = await original(destination, *args, limit=limit, **options)
                    return await self._kept(found)
                if batch is None:
                    return None
                return RoomID.from_string(batch.room_id), batch.position, batch.event_ids

            return select

        name = "get_backlogged_sticky_events_for_destination"
        self._homeserver.replace(self._store, name, make)
        name = "mark_backlogged_sticky_events_sent"
        self._homeserver.replace(self._store, name, self.leaving_out_deleted_rooms)

    async def _kept(self, found: tuple[Any, Any, Any] | None) -> tuple[Any, Any, Any] | None:
        """What Synapse has selected, without events that this server does not keep any more, and
        without those that are redacted by what the database says: Synapse asks its cache (S5)."""
        if found is None:
            return None
        room_id, position, event_ids = found
        if self._retention.is_on:
            kept = await self._retention.kept(event_ids)
            event_ids = [event_id for event_id in event_ids if event_id in kept]
        whole = await still_whole(self._homeserver, event_ids)
        return room_id, position, [event_id for event_id in event_ids if event_id in whole]

    async def may_receive(self, room_id: str, destination: str) -> bool:
        if not self._is_whitelisted(destination):
            return False
        if not await self._rooms.is_joined(room_id, self._homeserver.server_name):
            return False
        is_there = await self.is_there(room_id, destination)
        return is_there and await self._rooms.acl_allows(room_id, destination)

    async def is_there(self, room_id: str, destination: str) -> bool:
        if await self._rooms.has_member_of(room_id, destination):
            return True
        # While the room's state is partial, those whom /send_join named count as joined.
        servers = await self._store.get_partial_state_servers_at_join(room_id)
        return servers is not None and destination in servers


def _then_called(
    original: Callable[..., Awaitable[None]], callback: Callable[[str], None]
) -> Callable[..., Awaitable[None]]:
    """The original for a destination, which the callback is called with afterwards."""

    async def do(destination: str, *args: Any, **options: Any) -> None:
        await original(destination, *args, **options)
        try:
            callback(destination)
        except Exception:
            # Else Synapse would take the transaction for failed.
            logger.exception("Could not update the pushes to %s", destination)

    return do


def _refused(answer: Any) -> list[str]:
    """The events that an answer to ``/send`` names with an error, as Synapse reads it."""
    results = answer.get("pdus") if isinstance(answer, dict) else None
    if not isinstance(results, dict):
        return []
    return [e for e, said in results.items() if not isinstance(said, dict) or "error" in said]
