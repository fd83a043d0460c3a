"""Synapse's database, as far as it can be known before Synapse uses it: its kind, its columns."""

import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from synapse_sticky.homeserver.fitting import Columns, kind_of_column, misfits, resolve
from synapse_sticky.homeserver.seams import Attribute, attributes, method

if TYPE_CHECKING:
    from synapse.config.homeserver import HomeServerConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")

AT_ONCE = 500
"""So many values a statement names. SQLite takes 32,766 arguments and fails with one more."""

_DATABASE = "synapse.storage.database"
_ENGINES = "synapse.storage.engines"
_CONNECTION = "synapse.config.database.DatabaseConnectionConfig"

KIND = (
    Attribute("synapse.config.homeserver.HomeServerConfig", "database"),
    Attribute("synapse.config.database.DatabaseConfig", "databases"),
    *attributes(_CONNECTION, "config", "databases"),
)
"""What says which database there is, and of which kind."""

SEAMS = (
    *KIND,
    method(
        _DATABASE,
        "make_conn(*, db_config, engine, default_txn_name, server_name) -> "
        "LoggingDatabaseConnection",
    ),
    method(_ENGINES, "create_engine(database_config, /) -> BaseDatabaseEngine"),
    *attributes("synapse.storage.database.LoggingDatabaseConnection", "cursor", "commit", "close"),
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


def read_columns(config: "HomeServerConfig", server_name: str) -> tuple[Columns | None, list[str]]:
    """The columns of all tables in Synapse's main database; None if they cannot be read, and why,
    one line each.

    It takes a connection of its own, for one query, before the process has any other work.
    """
    if problems := misfits(SEAMS):
        logger.warning("Not checking the database's columns: %s", "; ".join(problems))
        return None, problems
    try:
        with closing(connect(config, server_name)) as connection:
            return columns_in(connection.cursor(), is_postgres=is_postgres(config)), []
    except Exception as e:
        logger.warning("Not checking the database's columns", exc_info=True)
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        return None, [f"the columns of the database cannot be read: {reason}"]


def main_database(config: "HomeServerConfig") -> Any:
    """The configuration of the database that has Synapse's main tables."""
    (database,) = (d for d in config.database.databases if "main" in d.databases)
    return database


def is_postgres(config: "HomeServerConfig") -> bool:
    """Is Synapse's main database a Postgres? Else it is SQLite: there is only one other."""
    return bool(main_database(config).config["name"] != "sqlite3")


def connect(config: "HomeServerConfig", server_name: str) -> Any:
    """A new connection to Synapse's main database; its cursors take ``?`` for parameters.

    Raises:
        Exception: whatever the database's driver raises if it cannot be reached.
    """
    return _connect(main_database(config), server_name)


@contextmanager
def transaction(config: "HomeServerConfig", server_name: str) -> Iterator[Any]:
    """A cursor of ``connect``. What it does is committed at the end, or not at all if that raises.

    Raises:
        Exception: whatever the database's driver raises.
    """
    with closing(connect(config, server_name)) as connection:
        yield connection.cursor()
        connection.commit()


def new_columns() -> Columns:
    """The columns of the tables that the running Synapse makes: those of a new database in memory.

    A database that Synapse has yet to migrate has these afterwards.

    Raises:
        Exception: this Synapse cannot make the tables.
    """
    # Synapse makes its tables at once where they are in memory.
    in_memory = {"name": "sqlite3", "args": {"database": ":memory:"}}
    database = SimpleNamespace(config=in_memory)
    with closing(_connect(database, "synapse_sticky_check")) as connection:
        return columns_in(connection.cursor(), is_postgres=False)


def _connect(database: Any, server_name: str) -> Any:
    create_engine = resolve(f"{_ENGINES}.create_engine")
    return resolve(f"{_DATABASE}.make_conn")(
        db_config=database,
        engine=create_engine(database.config),
        default_txn_name="synapse_sticky_check",
        server_name=server_name,
    )


def columns_in(cursor: Any, *, is_postgres: bool) -> Columns:
    """What ``read_columns`` reads, by a cursor of ``connect``."""
    cursor.execute(_POSTGRES if is_postgres else _SQLITE)
    found: dict[str, dict[str, str]] = {}
    for table, column, declared in cursor.fetchall():
        found.setdefault(table, {})[column] = kind_of_column(declared)
    return found


def portions(values: Iterable[T], most: int = AT_ONCE) -> Iterator[list[T]]:
    """The values, so many at a time: for statements about any number of them (H3)."""
    left = iter(values)
    while portion := list(islice(left, most)):
        yield portion


class NamesValues(Protocol):
    """Says "the column is one of these" in SQL."""

    def in_list(self, column: str, values: Collection[object]) -> tuple[str, list[Any]]: ...


def found_txn(
    names: NamesValues, txn: Any, select: str, column: str, values: Iterable[object]
) -> set[Any]:
    """What a query for one column finds, for any number of values (H3).

    Args:
        names: the homeserver.
        select: the query, up to its last WHERE or AND.
        column: which is to be one of the values.
    """
    found = set()
    for portion in portions(values):
        clause, args = names.in_list(column, portion)
        txn.execute(f"{select} {clause}", args)
        found |= {one for (one,) in txn.fetchall()}
    return found
