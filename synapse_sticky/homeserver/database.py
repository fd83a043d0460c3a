"""Synapse's database, as far as it can be known before Synapse uses it: its kind, its columns."""

import logging
import sqlite3
from typing import TYPE_CHECKING, Any

from synapse_sticky.homeserver.fitting import Columns, kind_of_column, misfits, resolve
from synapse_sticky.homeserver.seams import Attribute, attributes, method

if TYPE_CHECKING:
    from synapse.config.homeserver import HomeServerConfig

logger = logging.getLogger(__name__)

_DATABASE = "synapse.storage.database"
_ENGINES = "synapse.storage.engines"
_CONNECTION = "synapse.config.database.DatabaseConnectionConfig"

SEAMS = (
    method(
        _DATABASE,
        "make_conn(*, db_config, engine, default_txn_name, server_name) -> "
        "LoggingDatabaseConnection",
    ),
    method(_ENGINES, "create_engine(database_config, /) -> BaseDatabaseEngine"),
    Attribute("synapse.config.homeserver.HomeServerConfig", "database"),
    Attribute("synapse.config.homeserver.HomeServerConfig", "server"),
    Attribute("synapse.config.server.ServerConfig", "server_name"),
    Attribute("synapse.config.database.DatabaseConfig", "databases"),
    Attribute(_CONNECTION, "config"),
    Attribute(_CONNECTION, "databases"),
    *attributes("synapse.storage.database.LoggingDatabaseConnection", "cursor", "close"),
    Attribute("synapse.storage.engines._base.BaseDatabaseEngine", "module"),
)

_POSTGRES = """
    SELECT c.relname, a.attname, format_type(a.atttypid, NULL)
    FROM pg_attribute AS a INNER JOIN pg_class AS c ON c.oid = a.attrelid
    WHERE a.attnum > 0 AND NOT a.attisdropped AND pg_table_is_visible(c.oid)
        AND c.relkind IN ('r', 'p') AND c.relnamespace != 'pg_catalog'::regnamespace
"""
_SQLITE = """
    SELECT t.name, c.name, c.type
    FROM sqlite_master AS t INNER JOIN pragma_table_info(t.name) AS c WHERE t.type = 'table'
"""


def read_columns(config: "HomeServerConfig") -> Columns | None:
    """The columns of all tables in Synapse's main database; None if they cannot be read.

    It takes a connection of its own, for one query, before the process has any other work.
    """
    if problems := misfits(SEAMS):
        logger.warning("Not checking the database's columns: %s", "; ".join(problems))
        return None
    try:
        connection = connect(config)
        try:
            return columns_in(connection.cursor())
        finally:
            connection.close()
    except Exception:
        logger.warning("Not checking the database's columns", exc_info=True)
        return None


def main_database(config: "HomeServerConfig") -> Any:
    """The configuration of the database that has Synapse's main tables."""
    (database,) = (d for d in config.database.databases if "main" in d.databases)
    return database


def connect(config: "HomeServerConfig") -> Any:
    """A new connection to Synapse's main database; its cursors take ``?`` for parameters.

    Raises:
        Exception: whatever the database's driver raises if it cannot be reached.
    """
    database = main_database(config)
    create_engine = resolve(f"{_ENGINES}.create_engine")
    return resolve(f"{_DATABASE}.make_conn")(
        db_config=database,
        engine=create_engine(database.config),
        default_txn_name="synapse_sticky_check",
        server_name=config.server.server_name,
    )


def columns_in(cursor: Any) -> Columns:
    """What ``read_columns`` reads, by a cursor of ``connect``."""
    cursor.execute(_POSTGRES if is_postgres(cursor.database_engine) else _SQLITE)
    found: dict[str, dict[str, str]] = {}
    for table, column, declared in cursor.fetchall():
        found.setdefault(table, {})[column] = kind_of_column(declared)
    return found


def is_postgres(engine: Any) -> bool:
    """Is it Synapse's engine for Postgres? There is only one other."""
    return engine.module is not sqlite3
