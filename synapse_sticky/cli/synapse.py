"""Synapse's configuration and database, as a process of Synapse would find them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import yaml
from synapse.config.homeserver import HomeServerConfig
from synapse.module_api.errors import ConfigError

from synapse_sticky.admin.tables import ActionTable
from synapse_sticky.config import LISTED_TWICE, StickyConfig
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.delivery.unignored.tables import UnignoredTable
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.handlers.sliding.tables import PageTable
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.homeserver.database import (
    columns_in,
    connect,
    is_postgres,
    main_database,
    transaction,
)
from synapse_sticky.homeserver.fitting import Columns, misfits, resolve
from synapse_sticky.homeserver.layout import LAYOUTS_TABLE, HasLayout, Migrations, tables_of
from synapse_sticky.homeserver.place import Place, Process
from synapse_sticky.homeserver.process import require_enabled, too_old
from synapse_sticky.homeserver.schema import SEAMS as SCHEMA
from synapse_sticky.homeserver.schema import is_to_be_migrated
from synapse_sticky.homeserver.seams import method
from synapse_sticky.module import StickyEventsModule

SEAMS = (
    method(
        "synapse.config.homeserver.HomeServerConfig",
        "load_config(description, argv_options, /)",
    ),
)

LAYOUTS: Sequence[type[HasLayout]] = (
    *(DeferredTable, NewcomerTable, PageTable, ParkedTable),
    *(UnignoredTable, ActionTable),
)
"""All tables of the module."""

_FORBIDDEN = """
    SELECT relname FROM pg_class WHERE relname = ANY(?) AND pg_table_is_visible(oid) AND NOT (
        has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT')
        AND has_table_privilege(oid, 'UPDATE') AND has_table_privilege(oid, 'DELETE')
    )
"""
_NAMING_WORKERS = (
    *("instance_map", "federation_sender_instances", "pusher_instances"),
    *("run_background_tasks_on", "media_instance_running_background_jobs"),
    *("notify_appservices_from_worker", "update_user_directory_from_worker"),
)
"""The options of Synapse that name workers. Those of ``stream_writers`` are in ``instance_map``."""
_ROLE = "SELECT current_user, current_schema(), has_schema_privilege(current_schema(), 'CREATE')"


def problem_of_version() -> str | None:
    """Why this Synapse is no ground to stand on, if it is none."""
    return too_old()


class Configuration:
    """The configuration of a homeserver, and what its database has.

    sticky: the module's own; None if it is not listed.
    columns: those of the database, once it was read; none if there is no database yet.
    is_to_be_migrated: whether Synapse has yet to make or change tables in it, once it was read.
    problems: why that cannot be known, one line each; it is taken to be so then.

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
        self._options = [_options_in(files) for files in of_each]
        modules = [_of_module(options) for options in self._options]
        self._config, self.sticky = self._configs[0], modules[0]
        if self.sticky is not None:
            require_enabled(self._config)
        self.columns: Columns = {}
        self.is_to_be_migrated = True
        self.problems: list[str] = []
        self._layouts: dict[str, int] = {}
        self._forbidden: set[str] = set()
        self._role = ""

    def places(self) -> list[Place]:
        """The processes. They can be told of a Synapse that has what every duty needs."""
        of_each = zip(self._configs, self._options, strict=True)
        return [Place(config, Process.with_options(options)) for config, options in of_each]

    def not_given(self) -> str | None:
        """Which processes belong to this homeserver and have not been given by a file; None if
        nothing says that there are any."""
        given = {Process.with_options(options).name for options in self._options}
        named = {name for options in self._options for name in _named_in(options)}
        if missing := sorted({"master", *named} - given):
            return ", ".join(missing)
        # Workers that only serve requests need no name in any option.
        has_workers = any(map(_is_with_workers, self._options))
        return "all workers" if has_workers and given == {"master"} else None

    @property
    def server_name(self) -> str:
        """The homeserver's."""
        name: str = self._options[0]["server_name"]
        return name

    @property
    def has_postgres(self) -> bool:
        """Is its database a Postgres? Else it is SQLite."""
        return is_postgres(self._config)

    def transaction(self) -> AbstractContextManager[Any]:
        """A cursor in the database; what it does is committed unless that raises.

        Raises:
            FileNotFoundError: there is no database yet.
        """
        if not self._is_there():
            raise FileNotFoundError("there is no database yet")
        return transaction(self._config, self.server_name)

    def read_database(self) -> str | None:
        """Reads the columns, the layouts of the module's tables, and the privileges on them.

        Gives why Synapse would not start with this database, if so.

        Raises:
            Exception: whatever the database's driver raises.
        """
        if not self._is_there():
            return None
        refusal = None
        with closing(connect(self._config, self.server_name)) as connection:
            cursor = connection.cursor()
            self.columns = columns_in(cursor, is_postgres=self.has_postgres)
            self._look_at_schema(cursor)
            own = [name for name in self.columns if name.startswith("synapse_sticky_")]
            if self.has_postgres:
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

    def _look_at_schema(self, cursor: Any) -> None:
        there = "schema_version" in self.columns
        self.problems = misfits(SCHEMA, self.columns if there else None)
        if not self.problems:
            databases = main_database(self._config).databases
            self.is_to_be_migrated = is_to_be_migrated(
                cursor, self.columns, databases, is_postgres=self.has_postgres
            )

    def _is_there(self) -> bool:
        """Is there a database? To connect to SQLite would make one."""
        if self.has_postgres:
            return True
        return Path(main_database(self._config).config["args"]["database"]).exists()

    def problems_of_tables(self, running: Collection[str]) -> Iterator[str]:
        """What these duties could not do with the module's own tables, one line each."""
        for table in LAYOUTS:
            if not (problem := self._problem_of_tables(table.duty, table.migrations)):
                continue
            # It may be of a part of one.
            if table.duty.partition(" ")[0] in running:
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
    return "worker_app" in _options_in([path])


def _options_in(paths: Sequence[str]) -> Mapping[str, Any]:
    """The options as they are in the files, and in those of folders."""
    options: dict[str, Any] = {}
    for path in map(Path, paths):
        files = filter(Path.is_file, sorted(path.glob("*.yaml"))) if path.is_dir() else [path]
        for file in files:
            found: Any = yaml.safe_load(file.read_text())
            options.update(found if isinstance(found, dict) else {})
    return options


def _named_in(options: Mapping[str, Any]) -> set[str]:
    """The processes that the options name; the main process has two names."""
    values = [options.get(name) or () for name in _NAMING_WORKERS]
    named = {n for value in values for n in ([value] if isinstance(value, str) else value)}
    return {"master" if name == "main" else name for name in named}


def _is_with_workers(options: Mapping[str, Any]) -> bool:
    """Workers cannot reach the main process without either."""
    return bool(options.get("instance_map") or (options.get("redis") or {}).get("enabled"))


def _loaded(paths: Sequence[str]) -> HomeServerConfig:
    arguments = [part for path in paths for part in ("-c", path)]
    return HomeServerConfig.load_config("synapse-sticky check", arguments)


def _of_module(options: Mapping[str, Any]) -> StickyConfig | None:
    """What Synapse gives to this module, by options that it takes; None if that is not listed."""
    found = [(resolve(entry["module"]), entry) for entry in options.get("modules") or ()]
    listed = [entry for cls, entry in found if _is_this_module(cls)]
    if len(listed) > 1:
        raise ConfigError(LISTED_TWICE)
    return StickyEventsModule.parse_config(listed[0].get("config") or {}) if listed else None


def _is_this_module(cls: object) -> bool:
    return isinstance(cls, type) and issubclass(cls, StickyEventsModule)
