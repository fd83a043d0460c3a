"""Starts homeservers, and ends all of them."""

import datetime
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.lab.homeserver import Homeserver
from tests.lab.peer import Peer
from tests.lab.postgres import Postgres
from tests.lab.workers import Valkey, WorkerHomeserver


class Lab:
    """A temporary folder with homeservers in it. Use it in a ``with`` statement.

    Args:
        workers: whether the first server with the module has many processes, of those that are
            started together (the first one, if none has it).
    """

    def __init__(self, *, workers: bool = False) -> None:
        self._workers = workers
        self._databases: dict[Homeserver, Postgres] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="sticky-lab-"))
        self.servers_started: list[Homeserver] = []
        self._certificate = _make_certificate(self.folder)
        self._template: Path | None = None

    def __enter__(self) -> "Lab":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all servers and removes the folder."""
        self.close_servers(self.servers_started)
        shutil.rmtree(self.folder, ignore_errors=True)

    def close_servers(self, servers: list[Homeserver]) -> None:
        """Ends these servers and removes their folders."""
        for server in list(servers):
            server.close()
            if (postgres := self._databases.pop(server, None)) is not None:
                postgres.close()
            shutil.rmtree(server.folder, ignore_errors=True)
            self.servers_started.remove(server)

    def make(self, **options: Any) -> Homeserver:
        """A server that is not started yet; the options are Homeserver's."""
        folder = self.folder / secrets.token_hex(6)
        folder.mkdir()
        server = Homeserver(folder, self._certificate, template=self._template, **options)
        self.servers_started.append(server)
        return server

    def make_workers(self, **options: Any) -> WorkerHomeserver:
        """The same with many processes, on a Postgres and a Valkey of their own."""
        extra = dict(options.pop("extra", None) or {})
        # Its processes have as many connections as one Postgres likes to give.
        postgres = None
        database = extra.pop("database", None)
        if database is None:
            postgres = Postgres()
            database = postgres.new_database()
        folder = self.folder / secrets.token_hex(6)
        folder.mkdir()
        server = WorkerHomeserver(
            folder,
            self._certificate,
            database=database,
            valkey=Valkey(folder),
            extra=extra,
            **options,
        )
        self.servers_started.append(server)
        if postgres is not None:
            self._databases[server] = postgres
        return server

    def postgres_of(self, server: WorkerHomeserver) -> Postgres:
        """What ``make_workers`` started for the server."""
        return self._databases[server]

    def servers(self, *options: dict[str, Any]) -> list[Homeserver]:
        """Starts one server for each of the options, side by side."""
        self.prepare()
        with_module = [n for n, option in enumerate(options) if option.get("module", True)]
        of_many = (with_module or [0])[:1] if self._workers else []
        servers: list[Homeserver] = [
            self.make_workers(**option) if number in of_many else self.make(**option)
            for number, option in enumerate(options)
        ]
        for server in servers:
            server.start()
        for server in servers:
            server.first_start()
        return servers

    def peer(self) -> Peer:
        """A federating server of the lab's own. Close it yourself."""
        return Peer(self._certificate)

    def prepare(self) -> None:
        """Makes a database with Synapse's schema once, as making one takes seconds."""
        if self._template is not None:
            return
        server = self.make(module=False)
        server.first_start()
        server.stop()
        template = self.folder / "template.db"
        shutil.copy(server.database_path, template)
        self._template = template
        self.close_servers([server])


@contextmanager
def busy_cores(count: int = 2) -> Iterator[None]:
    """Other programs keep this many cores busy meanwhile."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def _make_certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = folder / "tls.crt", folder / "tls.key"
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate_path, key_path
