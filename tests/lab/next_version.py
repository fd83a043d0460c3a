"""A later version of the module, whose tables have one more: for tests only."""

from synapse.module_api import ModuleApi

from synapse_sticky import StickyEventsModule
from synapse_sticky.config import StickyConfig
from synapse_sticky.handlers.deferral.tables import DeferredTable

NEXT_VERSION = "tests.lab.next_version.NextVersion"
_MIGRATION = (
    "CREATE TABLE IF NOT EXISTS synapse_sticky_later (event_id TEXT NOT NULL PRIMARY KEY)",
    "CREATE INDEX IF NOT EXISTS synapse_sticky_later_room ON synapse_sticky_deferred (room_id)",
)


class NextVersion(StickyEventsModule):
    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        migrations = (*DeferredTable.migrations, _MIGRATION)
        setattr(DeferredTable, "migrations", migrations)  # noqa: B010
        super().__init__(config, api)
