"""The module in a Synapse that is not as it should be: for tests of the start only."""

from typing import Any

from synapse.module_api import ModuleApi
from synapse.storage.databases.main import DataStore

from synapse_sticky import StickyEventsModule
from synapse_sticky.config import StickyConfig


class InOlderSynapse(StickyEventsModule):
    """Synapse before 1.163 does not know the option."""

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        del api._hs.config.experimental.msc4354_enabled
        super().__init__(config, api)


class InChangedSynapse(StickyEventsModule):
    """A later Synapse might have another signature."""

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        store: Any = DataStore
        store.insert_sticky_events_txn = lambda self, txn: None
        super().__init__(config, api)
