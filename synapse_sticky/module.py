"""The module's entry: configuration, and which handler runs in which process."""

import logging
from typing import Any

from synapse.module_api import ModuleApi

from synapse_sticky.adapter import SynapseHomeserver
from synapse_sticky.config import StickyConfig, parse
from synapse_sticky.handlers.joins import JoinsHandler
from synapse_sticky.handlers.staging import StagingHandler
from synapse_sticky.handlers.visibility import VisibilityHandler
from synapse_sticky.index import IndexFollower
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
        self._storage = Storage(homeserver)
        self._follower = follower = IndexFollower(homeserver)
        duties = ["index"]

        self._joins: JoinsHandler | None = None
        if config.joins.enabled and homeserver.federation.sends:
            self._joins = JoinsHandler(homeserver, self._storage, follower, config.joins)
            duties.append("joins")
        if config.staging.keep_sticky:
            StagingHandler(homeserver).start()
            duties.append("staging")
        if config.visibility.servers:
            VisibilityHandler(homeserver, follower).start()
            duties.append("visibility")

        follower.start()
        if self._joins is not None:
            homeserver.in_background("start_joins", self._start_joins, self._joins)
        logger.info("synapse-sticky runs in %s: %s", homeserver.instance_name, ", ".join(duties))

    async def _start_joins(self, joins: JoinsHandler) -> None:
        """Until this is done, Synapse sends as it does without the module."""
        while True:
            try:
                await self._storage.migrate()
                await joins.start()
            except NewerLayoutError as e:
                logger.error("No pushing to newcomers: %s", e)
            except Exception:
                logger.exception("Could not start the joins, trying again in %d ms", _RETRY_MS)
                await self._homeserver.sleep_ms(_RETRY_MS)
                continue
            return

    @staticmethod
    def parse_config(config: dict[str, Any]) -> StickyConfig:
        """Checks the module's ``config:``.

        Raises:
            ConfigError: naming the wrong option and what is allowed.
        """
        return parse(config)
