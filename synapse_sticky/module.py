"""The module's entry. Whatever the running Synapse is like, it starts."""

import logging
from typing import Any

from synapse.module_api import ModuleApi
from synapse.module_api.errors import ConfigError

from synapse_sticky.config import StickyConfig, Strict, parse
from synapse_sticky.metrics import Metrics

logger = logging.getLogger(__name__)


class StickyEventsModule:
    """Makes all of MSC4354 work on Synapse >= 1.163.

    Synapse makes one in every process, once its stores and handlers stand and before it listens.
    A part of Synapse that is not as expected switches off the duties that need it (H5).

    Raises:
        ConfigError: the configuration is wrong, Synapse's own part of MSC4354 is missing or off, or
            Synapse does not fit and ``strict`` is set.
    """

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        try:
            # Here, so that a name that Synapse no longer has does not keep the homeserver down.
            from synapse_sticky.wiring import Wiring

            self._wiring = Wiring(config, api)
        except ConfigError:
            raise
        except Exception as e:
            if config.strict is not Strict.NO:
                raise ConfigError(f"synapse-sticky does not fit this Synapse: {e}") from e
            logger.exception("synapse-sticky is off: this Synapse lacks what every duty needs")
            Metrics(api.server_name).set_duties(config.states_if_nothing_fits())

    @staticmethod
    def parse_config(config: dict[str, Any]) -> StickyConfig:
        """Checks the module's ``config:``.

        Raises:
            ConfigError: naming the wrong option and what is allowed.
        """
        return parse(config)
