"""The module, with shorter delays between its tries: for tests only."""

from synapse.module_api import ModuleApi

from synapse_sticky import StickyEventsModule
from synapse_sticky.config import StickyConfig
from synapse_sticky.handlers.staging.parking import unknown

IMPATIENT_MODULE = "tests.lab.impatient.ImpatientModule"


class ImpatientModule(StickyEventsModule):
    """Where nobody knows whether a cause passes, it tries again after one and three seconds."""

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        setattr(unknown, "AFTER_MS", (1_000, 3_000))  # noqa: B010
        super().__init__(config, api)
