"""A real store with staged PDUs, that counts what is read of it."""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from synapse.app.homeserver import SynapseHomeServer
from synapse.config.homeserver import HomeServerConfig

from synapse_sticky.homeserver import Cursor, Homeserver
from tests.lab.postgres import Postgres
from tests.unit.configuration import configuration
from tests.unit.test_limits_in_synapse import FIELD, Reactor, done, run_synchronously

STAGING = "federation_inbound_events_staging"


class CountingCursor:
    """Hands everything on to a real one."""

    def __init__(self, txn: Cursor, store: "CountingStore") -> None:
        self._txn: Any = txn
        self._store = store

    def execute(self, sql: str, args: Iterable[Any] = ()) -> None:
        self._store.statements.append((sql, [*args]))
        self._txn.execute(sql, [*args])

    def execute_batch(self, sql: str, args: Iterable[Any]) -> None:
        rows = [*args]
        self._store.statements += [(sql, [*row]) for row in rows[:1]]
        self._txn.execute_batch(sql, rows)

    def fetchall(self) -> list[Any]:
        rows = self._txn.fetchall()
        self._store.rows += len(rows)
        return [*rows]

    def fetchone(self) -> Any:
        row = self._txn.fetchone()
        self._store.rows += row is not None
        return row

    def __getattr__(self, name: str) -> Any:
        return getattr(self._txn, name)


class CountingStore(Homeserver):
    """A homeserver whose time is told, and that has counted what its transactions read.

    statements: those that were made, with their arguments.
    rows: how many they gave.
    """

    def __init__(self, hs: SynapseHomeServer) -> None:
        super().__init__(hs.get_module_api())
        self.now = 1_000_000_000
        self.statements: list[tuple[str, list[Any]]] = []
        self.rows = 0

    def now_ms(self) -> int:
        return self.now

    def steady_ms(self) -> int:
        return self.now

    async def transact(self, what: str, function: Any, *args: Any) -> Any:
        def run_txn(txn: Cursor) -> Any:
            return function(CountingCursor(txn, self), *args)

        return await super().transact(what, run_txn)

    def sql(self, sql: str, *args: Any) -> list[Any]:
        """Not counted."""

        def run_txn(txn: Cursor) -> list[Any]:
            txn.execute(sql, args)
            return [*txn.fetchall()] if sql.startswith(("SELECT", "EXPLAIN")) else []

        found: list[Any] = done(super().transact("test", run_txn))
        return found

    def stage(
        self, origin: str, room_id: str, event_ids: Iterable[str], sticky_ms: int = 0
    ) -> None:
        """PDUs of this origin, received now; with ``sticky_ms`` they are sticky for so long."""
        text = self._pdu(sticky_ms)
        self._stage([(origin, room_id, event_id, self.now, text) for event_id in event_ids])

    def stage_chain(
        self, origin: str, room_id: str, event_ids: Iterable[str], sticky_ms: int = 0
    ) -> None:
        """Each on top of the last one, and received a millisecond later."""
        rows, prev_events = [], list[str]()
        for event_id in event_ids:
            text = self._pdu(sticky_ms, prev_events=prev_events)
            rows.append((origin, room_id, event_id, self.now, text))
            prev_events = [event_id]
            self.now += 1
        self._stage(rows)

    def _pdu(self, sticky_ms: int, **fields: Any) -> str:
        sticky = {FIELD: {"duration_ms": sticky_ms}} if sticky_ms else {}
        return json.dumps({"origin_server_ts": self.now, "prev_events": []} | sticky | fields)

    def _stage(self, rows: list[tuple[Any, ...]]) -> None:
        def run_txn(txn: Cursor) -> None:
            txn.execute_batch(
                f"INSERT INTO {STAGING} (origin, room_id, event_id, received_ts, event_json,"
                " internal_metadata) VALUES (?, ?, ?, ?, ?, '{}')",
                rows,
            )

        done(super().transact("test", run_txn))

    def plans(self) -> dict[str, str]:
        """How the database does what it was asked about the staging area since the last time."""
        prefix = "EXPLAIN " if self.is_postgres else "EXPLAIN QUERY PLAN "
        asked = {sql: args for sql, args in self.statements if STAGING in sql}
        return {sql: str(self.sql(prefix + sql, *args)) for sql, args in asked.items()}

    def analyze(self) -> None:
        """Has the database look at what there is. Processed PDUs leave no trace in that."""
        self.sql(f"ANALYZE {STAGING}")

    def reset(self) -> None:
        self.statements.clear()
        self.rows = 0


@contextmanager
def prepared(kind: str, folder: Path) -> Iterator[SynapseHomeServer]:
    """A homeserver on ``sqlite`` or on ``postgres``, for ``CountingStore``."""
    with ExitStack() as stack:
        options = configuration(folder)
        if kind == "postgres":
            options["database"] = stack.enter_context(Postgres()).new_database()
        config = HomeServerConfig()
        config.parse_config_dict(options, "", "")
        reactor: Any = Reactor()  # type: ignore[no-untyped-call]
        hs = SynapseHomeServer("here", config=config, reactor=reactor)
        hs.setup()
        run_synchronously(hs)
        yield hs
        for connection in hs.get_datastores().main.db_pool._db_pool.connections.values():
            connection.close()


def has_no_scan(plans: dict[str, str], is_postgres: bool) -> bool:
    """Is each found by one of Synapse's own indexes?"""
    index = f"{STAGING}_"
    scan = "Seq Scan" if is_postgres else f"SCAN {STAGING}\n"
    return bool(plans) and all(index in plan and scan not in plan for plan in plans.values())
