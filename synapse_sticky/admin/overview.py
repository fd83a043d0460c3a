"""``GET overview``: how much is sticky, and how much waits (E3)."""

from typing import Any, Protocol

from synapse_sticky.admin.facts import Table
from synapse_sticky.admin.requests import Request
from synapse_sticky.config import FederationConfig
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.layout import versions_txn

MOST_COUNTED = 100_000
"""So far rows are counted; no answer takes longer, however many there are."""


class Counts(Protocol):
    """A table of which a part of the overview is made."""

    def counts_txn(self, txn: Cursor, at_most: int, /) -> dict[str, Any]:
        """The part's entries. It reads no more rows than ``at_most`` of each kind."""


class CountedTable(Table, Counts, Protocol):
    """The same, of a duty."""


class Overview:
    """Counts what the database has. Each process counts the same.

    Args:
        synapses: Synapse's own tables.
        tables: the duties'.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        config: FederationConfig,
        synapses: Counts,
        *tables: CountedTable,
    ) -> None:
        self._homeserver = homeserver
        self._config = config
        self._synapses = synapses
        self._tables = tables

    async def get(self, request: Request) -> dict[str, Any]:
        """The answer. Raises ``SynapseError`` (400) if there is a parameter."""
        request.only()

        def read_txn(txn: Cursor) -> dict[str, Any]:
            versions = versions_txn(txn, is_postgres=self._homeserver.is_postgres)
            found = self._synapses.counts_txn(txn, MOST_COUNTED)
            for table in self._tables:
                if versions.get(table.duty, 0) >= table.layout:
                    found |= table.counts_txn(txn, MOST_COUNTED)
            return found

        return {
            "now_ms": self._homeserver.now_ms(),
            "server_name": self._homeserver.server_name,
            "counted_up_to": MOST_COUNTED,
            "limits": {"mode": self._config.mode.value},
            # What of a duty is not there is not recorded.
            **dict.fromkeys(("deferred", "parked", "newcomers", "actions")),
            **await self._homeserver.transact("admin_overview", read_txn),
        }
