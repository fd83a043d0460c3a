"""The module in a Synapse that is not as it should be: for tests of the start only."""

import inspect
from typing import Any

from synapse.module_api import ModuleApi
from synapse.storage.databases.main import DataStore

from synapse_sticky import StickyEventsModule
from synapse_sticky.config import StickyConfig


class InOlderSynapse(StickyEventsModule):
    """Synapse before 1.163 has no backlog of sticky events."""

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        store: Any = DataStore
        name = "get_backlogged_sticky_events_for_destination"
        delattr(next(cls for cls in store.__mro__ if name in vars(cls)), name)
        super().__init__(config, api)


class InChangedSynapse(StickyEventsModule):
    """A later Synapse, whose own calls fit it, might have another signature."""

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        store: Any = DataStore
        original = store.insert_sticky_events_txn

        def insert_sticky_events_txn(self: Any, *args: Any) -> None:
            original(self, *args)

        changed: Any = insert_sticky_events_txn
        changed.__signature__ = inspect.signature(lambda self, txn: None)
        store.insert_sticky_events_txn = changed
        super().__init__(config, api)


class InExtendedSynapse(StickyEventsModule):
    """A later Synapse might take one more argument, which may be left out."""

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        store: Any = DataStore
        original = store.insert_sticky_events_txn

        def insert_sticky_events_txn(self: Any, txn: Any, events: Any, more: bool = False) -> None:
            original(self, txn, events)

        store.insert_sticky_events_txn = insert_sticky_events_txn
        super().__init__(config, api)
