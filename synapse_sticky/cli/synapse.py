"""Synapse's configuration and database, as a process of Synapse would find them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from synapse.config.homeserver import HomeServerConfig

from synapse_sticky.config import StickyConfig
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.handlers.sliding.tables import PageTable
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.homeserver.database import columns_in, connect, is_postgres, main_database
from synapse_sticky.homeserver.fitting import Columns
from synapse_sticky.homeserver.place import Place
from synapse_sticky.homeserver.process import require_enabled, too_old
from synapse_sticky.homeserver.seams import Attribute, method

SEAMS = (
    method(
        "synapse.config.homeserver.HomeServerConfig",
        "load_config(description, argv_options, /)",
    ),
    Attribute("synapse.config.homeserver.HomeServerConfig", "modules"),
    Attribute("synapse.config.modules.ModulesConfig", "loaded_modules"),
)

_LAYOUTS = (DeferredTable, NewcomerTable, PageTable, ParkedTable)


def problem_of_version() -> str | None:
    """Why this Synapse is no ground to stand on, if it is none."""
    return too_old()


class Configuration:
    """The configuration of a homeserver, and what its database has.

    sticky: the module's own; None if it is not listed.
    places: the main process, and one for each worker's file.
    columns: those of the database, once it was read; None if there is no database yet.

    Raises:
        ConfigError: Synapse, or the module, refuses the configuration.
        OSError: a file cannot be read.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        workers = [path for path in paths if _is_of_worker(path)]
        shared = [path for path in paths if path not in workers]
        self._config = _loaded(shared)
        require_enabled(self._config)
        self.sticky = _of_module(self._config)
        self.places = [Place(self._config)]
        self.places += [Place(_loaded([*shared, worker])) for worker in workers]
        self.columns: Columns | None = None
        self._layouts: dict[str, int] = {}
        self._forbidden: list[str] = []
        self._may_create = True

    def read_database(self) -> None:
        """Reads the columns, the layouts of the module's tables, and the privileges on them.

        Raises:
            Exception: whatever the database's driver raises.
        """
        if not self._is_there():
            return
        connection = connect(self._config)
        try:
            cursor = connection.cursor()
            self.columns = columns_in(cursor)
            own = [name for name in self.columns if name.startswith("synapse_sticky_")]
            if is_postgres(cursor.database_engine):
                cursor.execute(_FORBIDDEN, (own,))
                self._forbidden = sorted(name for (name,) in cursor.fetchall())
                cursor.execute("SELECT has_schema_privilege(current_schema(), 'CREATE')")
                self._may_create = bool(cursor.fetchone()[0])
            if _LAYOUTS_TABLE in set(own) - set(self._forbidden):
                cursor.execute(f"SELECT duty, version FROM {_LAYOUTS_TABLE}")
                self._layouts = dict(cursor.fetchall())
        finally:
            connection.close()

    def _is_there(self) -> bool:
        """Is there a database? To connect to SQLite would make one."""
        database = main_database(self._config)
        if database.config["name"] != "sqlite3":
            return True
        return Path(database.config["args"]["database"]).exists()

    def problems_of_tables(self) -> list[str]:
        """What is wrong with the module's own tables, one line each."""
        return [*self._problems_of_layouts(), *self._problems_of_privileges()]

    def _problems_of_layouts(self) -> Iterator[str]:
        for table in _LAYOUTS:
            there, known = self._layouts.get(table.duty, 0), len(table.migrations)
            if there > known:
                yield (
                    f"the tables of {table.duty} have layout {there}, this version of"
                    f" synapse-sticky knows {known}: {table.duty} would be off"
                )

    def _problems_of_privileges(self) -> Iterator[str]:
        for name in self._forbidden:
            yield f"Synapse's user of the database may not read and write the table {name}"
        if not self._may_create:
            yield (
                "Synapse's user of the database may not make tables in its schema: a duty whose"
                " tables are not there is off"
            )


_LAYOUTS_TABLE = "synapse_sticky_layouts"
_FORBIDDEN = """
    SELECT relname FROM pg_class WHERE relname = ANY(?) AND pg_table_is_visible(oid) AND NOT (
        has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT')
        AND has_table_privilege(oid, 'UPDATE') AND has_table_privilege(oid, 'DELETE')
    )
"""


def _is_of_worker(path: str) -> bool:
    """Is the file a worker's own? A folder of files, which Synapse takes as well, is none."""
    if Path(path).is_dir():
        return False
    found: Any = yaml.safe_load(Path(path).read_text())
    return isinstance(found, dict) and "worker_app" in found


def _loaded(paths: Sequence[str]) -> HomeServerConfig:
    arguments = [part for path in paths for part in ("-c", path)]
    return HomeServerConfig.load_config("synapse-sticky check", arguments)


def _of_module(config: HomeServerConfig) -> StickyConfig | None:
    for _, parsed in config.modules.loaded_modules:
        if isinstance(parsed, StickyConfig):
            return parsed
    return None
