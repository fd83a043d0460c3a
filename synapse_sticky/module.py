"""The module's entry: configuration, and which handler runs in which process."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from synapse.module_api import ModuleApi

from synapse_sticky.adapter import SynapseHomeserver
from synapse_sticky.config import Mode, StickyConfig, parse
from synapse_sticky.handlers.deferral import DeferralHandler
from synapse_sticky.handlers.delivery import DeliveryHandler
from synapse_sticky.handlers.extremities import ExtremitiesHandler
from synapse_sticky.handlers.joins import JoinsHandler
from synapse_sticky.handlers.receipt import ReceiptHandler
from synapse_sticky.handlers.sending import SendingHandler
from synapse_sticky.handlers.sliding import SlidingHandler
from synapse_sticky.handlers.staging import StagingHandler
from synapse_sticky.handlers.visibility import VisibilityHandler
from synapse_sticky.index import IndexFollower
from synapse_sticky.limits import LimitReport
from synapse_sticky.storage import NewerLayoutError, Storage

logger = logging.getLogger(__name__)

_RETRY_MS = 5_000


class StickyEventsModule:
    """Makes MSC4354 work wholly on Synapse >= 1.163.

    Synapse makes one in every process, once its stores and handlers stand and before it listens.

    Raises:
        ConfigError: this Synapse cannot carry the module, or the configuration is wrong.
    """

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        homeserver = SynapseHomeserver(api)
        self._homeserver = homeserver
        self._storage = storage = Storage(homeserver)
        self._follower = follower = IndexFollower(homeserver)
        report = LimitReport(homeserver.now_ms)
        DeliveryHandler(homeserver, follower).start()
        SlidingHandler(homeserver, storage).start()
        duties = ["index", "delivery"]
        # What needs the module's own tables. Until they are there, Synapse does as it does
        # without the module.
        starts: list[Callable[[], Awaitable[None]]] = []

        if config.joins.enabled and homeserver.federation.sends:
            starts.append(JoinsHandler(homeserver, storage, follower, config.joins).start)
            duties.append("joins")
        if config.staging.keep_sticky:
            staging = StagingHandler(homeserver, storage)
            staging.start()
            duties.append("staging")
        VisibilityHandler(homeserver, follower).start(config.visibility)
        duties.append("visibility")
        limited = config.federation.mode is not Mode.OFF
        if limited and homeserver.inbound.receives:
            starts.append(ReceiptHandler(homeserver, storage, config.federation, report).start)
            duties.append("receipt")
        if homeserver.writer.writes:
            # Without limits too: something may wait from when there were some.
            starts.append(DeferralHandler(homeserver, storage, config.federation, report).start)
            duties += ["deferral"] if limited else []
        if config.local.per_user is not None and homeserver.sending.serves_clients:
            SendingHandler(homeserver, config.local, report).start()
            duties.append("sending")

        if config.dummy_events.enabled and homeserver.extremities.merges:
            ExtremitiesHandler(homeserver, follower, config.dummy_events).start()
            duties.append("extremities")
        if config.state_events and homeserver.sending.serves_clients:
            homeserver.sending.accept_sticky_state()
            duties.append("state_events")

        if config.staging.keep_sticky:
            starts.append(staging.begin)  # last: what is processed then is under the limits
        follower.start()
        if starts:
            homeserver.in_background("start", self._start, starts)
        logger.info("synapse-sticky runs in %s: %s", homeserver.instance_name, ", ".join(duties))

    async def _start(self, starts: list[Callable[[], Awaitable[None]]]) -> None:
        waiting = [self._storage.migrate, *starts]
        while waiting:
            try:
                await waiting[0]()
            except NewerLayoutError as e:
                logger.error("No pushing to newcomers and no limits on other servers: %s", e)
                return
            except Exception:
                logger.exception("Could not start, trying again in %d ms", _RETRY_MS)
                await self._homeserver.sleep_ms(_RETRY_MS)
            else:
                del waiting[0]

    @staticmethod
    def parse_config(config: dict[str, Any]) -> StickyConfig:
        """Checks the module's ``config:``.

        Raises:
            ConfigError: naming the wrong option and what is allowed.
        """
        return parse(config)
