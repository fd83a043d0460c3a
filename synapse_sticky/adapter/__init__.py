"""The one adapter to Synapse's private parts. Only ``synapse_sticky.module`` imports it."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from synapse.module_api import ModuleApi
from synapse.module_api.errors import ConfigError
from synapse.storage.engines import PostgresEngine
from synapse.storage.engines._base import IsolationLevel
from synapse.util import SYNAPSE_VERSION
from synapse.util.duration import Duration

from synapse_sticky.adapter import hooks
from synapse_sticky.adapter.delivery import SynapseDelivery
from synapse_sticky.adapter.extremities import SynapseExtremities
from synapse_sticky.adapter.federation import SynapseFederation
from synapse_sticky.adapter.inbound import SynapseInbound
from synapse_sticky.adapter.rooms import SynapseRooms
from synapse_sticky.adapter.sending import SynapseSending
from synapse_sticky.adapter.signal import SynapseSignal
from synapse_sticky.adapter.staging import SynapseStaging
from synapse_sticky.adapter.stream import SynapseStickyStream
from synapse_sticky.adapter.visibility import SynapseVisibility
from synapse_sticky.adapter.writer import SynapseStickyWriter
from synapse_sticky.homeserver import (
    Cancellable,
    Cursor,
    Delivery,
    Extremities,
    Federation,
    Inbound,
    Rooms,
    Sending,
    Signal,
    Staging,
    StickyStream,
    StickyWriter,
    Visibility,
)

if TYPE_CHECKING:
    from synapse.server import HomeServer

T = TypeVar("T")

MIGRATION_LOCK = 0x5354_4943_4B59
"""Any number that no other user of the database's advisory locks takes ("STICKY")."""


class SynapseHomeserver:
    """Implements ``homeserver.Homeserver`` on Synapse 1.163 and later.

    Raises:
        ConfigError: the running Synapse lacks what the module stands on, or a private part of it
            is not as expected. The message says which, and what to do.
    """

    def __init__(self, api: ModuleApi) -> None:
        self._api = api
        hs: HomeServer = hooks.attribute(api, "_hs")
        _require_sticky_events(hs)
        self._clock = hs.get_clock()
        self._store: Any = hs.get_datastores().main
        self.server_name = hs.hostname
        self.instance_name = hs.get_instance_name()
        self.stream: StickyStream = SynapseStickyStream(hs)
        self.rooms: Rooms = SynapseRooms(hs)
        self.federation: Federation = SynapseFederation(hs, api)
        self.staging: Staging = SynapseStaging(hs)
        self.visibility: Visibility = SynapseVisibility(hs)
        self.inbound: Inbound = SynapseInbound(hs)
        self.writer: StickyWriter = SynapseStickyWriter(hs)
        self.sending: Sending = SynapseSending(hs)
        self.delivery: Delivery = SynapseDelivery(hs)
        self.extremities: Extremities = SynapseExtremities(hs)

    def now_ms(self) -> int:
        return self._clock.time_msec()

    def in_background(
        self, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> None:
        self._api.run_as_background_process(f"synapse_sticky_{what}", function, *args)

    def call_later(
        self, delay_ms: int, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> Cancellable:
        return self._api.delayed_background_call(
            delay_ms, function, *args, desc=f"synapse_sticky_{what}"
        )

    def new_signal(self) -> Signal:
        return SynapseSignal(self._clock)

    async def sleep_ms(self, delay_ms: int) -> None:
        await self._clock.sleep(Duration(milliseconds=delay_ms))

    async def transact(self, what: str, function: Callable[..., T], *args: Any) -> T:
        return await self._store.db_pool.runInteraction(f"synapse_sticky_{what}", function, *args)

    async def transact_alone(self, what: str, function: Callable[[Cursor], T]) -> T:
        def run_txn(txn: Cursor) -> T:
            # SQLite has one writer at a time anyway.
            if isinstance(self._store.database_engine, PostgresEngine):
                txn.execute("SELECT pg_advisory_xact_lock(?)", (MIGRATION_LOCK,))
            return function(txn)

        return await self._store.db_pool.runInteraction(
            f"synapse_sticky_{what}",
            run_txn,
            # By default a transaction sees what was there before it waited for the lock.
            isolation_level=IsolationLevel.READ_COMMITTED,
        )


def _require_sticky_events(hs: "HomeServer") -> None:
    enabled = getattr(hs.config.experimental, "msc4354_enabled", None)
    if enabled is None or not hasattr(
        hs.get_datastores().main, "get_backlogged_sticky_events_for_destination"
    ):
        raise ConfigError(
            f"synapse-sticky needs Synapse 1.163 or later, this is {SYNAPSE_VERSION}. "
            "Upgrade Synapse, or take the module out of `modules:`."
        )
    if not enabled:
        raise ConfigError(
            "synapse-sticky needs Synapse's own sticky events. Add to homeserver.yaml:\n"
            "experimental_features:\n"
            "  msc4354_enabled: true\n"
            "and restart Synapse, or take the module out of `modules:`.",
            path=("experimental_features", "msc4354_enabled"),
        )
