"""The database of a homeserver of one process: SQLite, or a real Postgres."""

import secrets
import sqlite3
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import attr
import psycopg2

from tests.lab.postgres import Postgres

SQLITE, POSTGRES = "sqlite", "postgres"
ENGINES = (SQLITE, POSTGRES)

PREFIX = "synapse_sticky_"
"""The names of the module's own tables begin with it."""


@attr.s(auto_attribs=True, frozen=True)
class Column:
    """What whoever writes into a table has to know of one of its columns."""

    type: str
    may_be_left_out: bool
    """It may be NULL, or has a default."""


class Database(ABC):
    """A database, whether a homeserver runs on it or not.

    Args:
        settings: Synapse's ``database:`` section.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    @abstractmethod
    def query(self, sql: str, *args: object) -> list[tuple[Any, ...]]:
        """Reads."""

    @abstractmethod
    def run(self, script: str) -> None:
        """Changes the database by any number of statements."""

    @abstractmethod
    def tables(self) -> list[str]:
        """The names of the ordinary tables."""

    @abstractmethod
    def columns(self, table: str) -> dict[str, Column]:
        """The columns of a table, by their names."""

    @abstractmethod
    def key(self, table: str) -> set[str]:
        """The columns of the primary key."""

    def rows(self, table: str) -> list[dict[str, Any]]:
        """All rows of a table, in no order."""
        names = list(self.columns(table))
        values = self.query(f"SELECT {', '.join(names)} FROM {table}")
        return [dict(zip(names, row, strict=True)) for row in values]

    def own_tables(self) -> set[str]:
        """The module's tables."""
        return {name for name in self.tables() if name.startswith(PREFIX)}


class SqliteDatabase(Database):
    """One in a file, which need not be there yet."""

    def __init__(self, path: Path) -> None:
        super().__init__({"name": "sqlite3", "args": {"database": str(path)}})
        self.path = path

    def query(self, sql: str, *args: object) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.path, timeout=30)) as connection:
            return connection.execute(sql, args).fetchall()

    def run(self, script: str) -> None:
        with closing(sqlite3.connect(self.path, timeout=30)) as connection:
            connection.executescript(script)
            connection.commit()

    def tables(self) -> list[str]:
        sql = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE 'CREATE TABLE%'"
        return [name for (name,) in self.query(sql) if not name.startswith("sqlite_")]

    def columns(self, table: str) -> dict[str, Column]:
        sql = 'SELECT name, type, "notnull", dflt_value FROM pragma_table_info(?)'
        return {
            name: Column(kind, not not_null or default is not None)
            for name, kind, not_null, default in self.query(sql, table)
        }

    def key(self, table: str) -> set[str]:
        sql = "SELECT name FROM pragma_table_info(?) WHERE pk > 0"
        return {name for (name,) in self.query(sql, table)}


class PostgresDatabase(Database):
    """One of a Postgres that runs."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        args = settings["args"]
        self._connection = psycopg2.connect(
            host=args["host"], user=args["user"], dbname=args["database"]
        )
        self._connection.autocommit = True

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    def query(self, sql: str, *args: object) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(sql.replace("?", "%s"), args)
            return list(cursor.fetchall())

    def run(self, script: str) -> None:
        with self._connection.cursor() as cursor:
            # A dump sets what is to be so while it is read back.
            cursor.execute(f"{script}\nRESET ALL;")

    def tables(self) -> list[str]:
        sql = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        return [name for (name,) in self.query(sql)]

    def columns(self, table: str) -> dict[str, Column]:
        sql = (
            "SELECT column_name, data_type, is_nullable, column_default"
            " FROM information_schema.columns WHERE table_schema = 'public' AND table_name = ?"
            " ORDER BY ordinal_position"
        )
        return {
            name: Column(kind, nullable == "YES" or default is not None)
            for name, kind, nullable, default in self.query(sql, table)
        }

    def key(self, table: str) -> set[str]:
        sql = (
            "SELECT attname FROM pg_index JOIN pg_attribute"
            " ON attrelid = indrelid AND attnum = ANY(indkey)"
            " WHERE indrelid = ?::regclass AND indisprimary"
        )
        return {name for (name,) in self.query(sql, table)}


@contextmanager
def empty_database(engine: str) -> Iterator[Database]:
    """A new one, which is removed at the end."""
    if engine == POSTGRES:
        with (
            Postgres() as postgres,
            closing(PostgresDatabase(postgres.new_database())) as database,
        ):
            yield database
    else:
        with tempfile.TemporaryDirectory(prefix="sticky-upgrade-") as folder:
            yield SqliteDatabase(Path(folder) / f"{secrets.token_hex(4)}.db")
