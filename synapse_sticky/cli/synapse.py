"""Synapse's configuration and database, as a process of Synapse would find them."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml
from synapse.config.homeserver import HomeServerConfig
from synapse.module_api.errors import ConfigError

from synapse_sticky.config import LISTED_TWICE, StickyConfig
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.handlers.sliding.tables import PageTable
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.homeserver.database import columns_in, connect, is_postgres, main_database
from synapse_sticky.homeserver.fitting import Columns
from synapse_sticky.homeserver.layout import LAYOUTS_TABLE, Migrations, tables_of
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
_FORBIDDEN = """
    SELECT relname FROM pg_class WHERE relname = ANY(?) AND pg_table_is_visible(oid) AND NOT (
        has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT')
        AND has_table_privilege(oid, 'UPDATE') AND has_table_privilege(oid, 'DELETE')
    )
"""
_ROLE = "SELECT current_user, current_schema(), has_schema_privilege(current_schema(), 'CREATE')"


def problem_of_version() -> str | None:
    """Why this Synapse is no ground to stand on, if it is none."""
    return too_old()


class Configuration:
    """The configuration of a homeserver, and what its database has.

    sticky: the module's own; None if it is not listed.
    columns: those of the database, once it was read; none if there is no database yet.

    Raises:
        ConfigError: Synapse, or the module, refuses the configuration.
        SystemExit: Synapse has printed why it does.
        OSError: a file cannot be read.
        yaml.YAMLError: a file is no YAML.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        workers = [path for path in paths if _is_of_worker(path)]
        shared = [path for path in paths if path not in workers]
        of_each = [[*shared, worker] for worker in workers]
        if shared:
            of_each.insert(0, shared)
        self._configs = [_loaded(files) for files in of_each]
        modules = [_of_module(config) for config in self._configs]
        self._config, self.sticky = self._configs[0], modules[0]
        if self.sticky is not None:
            require_enabled(self._config)
        self.columns: Columns = {}
        self._layouts: dict[str, int] = {}
        self._forbidden: set[str] = set()
        self._role = ""

    def places(self) -> list[Place]:
        """The processes. They can be told of a Synapse that has what every duty needs."""
        return [Place(config) for config in self._configs]

    def read_database(self) -> str | None:
        """Reads the columns, the layouts of the module's tables, and the privileges on them.

        Gives why Synapse would not start with this database, if so.

        Raises:
            Exception: whatever the database's driver raises.
        """
        if not self._is_there():
            return None
        refusal = None
        with closing(connect(self._config)) as connection:
            cursor = connection.cursor()
            self.columns = columns_in(cursor)
            own = [name for name in self.columns if name.startswith("synapse_sticky_")]
            if is_postgres(cursor.database_engine):
                cursor.execute(_FORBIDDEN, (own,))
                self._forbidden = {name for (name,) in cursor.fetchall()}
                cursor.execute(_ROLE)
                self._role, schema, may_create = cursor.fetchone()
                if not may_create:
                    # Synapse has the database create what is not there, and Postgres refuses that
                    # even where all of it is there.
                    refusal = (
                        f"the database user {self._role} may not create tables in the schema"
                        f" {schema}, and Synapse asks for that at each start"
                    )
            if LAYOUTS_TABLE in {*own} - self._forbidden:
                cursor.execute(f"SELECT duty, version FROM {LAYOUTS_TABLE}")
                self._layouts = dict(cursor.fetchall())
        return refusal

    def _is_there(self) -> bool:
        """Is there a database? To connect to SQLite would make one."""
        database = main_database(self._config)
        if database.config["name"] != "sqlite3":
            return True
        return Path(database.config["args"]["database"]).exists()

    def problems_of_tables(self, running: Collection[str]) -> Iterator[str]:
        """What these duties could not do with the module's own tables, one line each."""
        for table in _LAYOUTS:
            if not (problem := self._problem_of_tables(table.duty, table.migrations)):
                continue
            if table.duty in running:
                yield f"{table.duty} would be off: {problem}"
            if table is DeferredTable and "receipt" in running:
                yield f"receipt would count staged events only, not deferred ones: {problem}"

    def _problem_of_tables(self, duty: str, migrations: Migrations) -> str | None:
        there, known = self._layouts.get(duty, 0), len(migrations)
        if there > known:
            return (
                f"the tables of {duty} have layout {there}, this version of synapse-sticky knows"
                f" {known}"
            )
        if forbidden := sorted(self._forbidden & {LAYOUTS_TABLE, *tables_of(migrations)}):
            return f"the database user {self._role} may not read and write {', '.join(forbidden)}"
        return None


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
    parsed: list[Any] = [parsed for _, parsed in config.modules.loaded_modules]
    listed = [found for found in parsed if isinstance(found, StickyConfig)]
    if len(listed) > 1:
        raise ConfigError(LISTED_TWICE)
    return listed[0] if listed else None
