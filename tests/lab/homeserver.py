"""One real Synapse process with SQLite or a Postgres, in a temporary folder, on loopback."""

import copy
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
from pathlib import Path
from typing import Any

import requests
from signedjson.key import generate_signing_key, write_signing_keys

from tests.lab import starter
from tests.lab.client import Client
from tests.lab.federation import FederationRequester
from tests.lab.forwarder import Forwarder
from tests.lab.overrides import OVERRIDES
from tests.lab.postgres import Settings, change_in, query_in
from tests.lab.wait import wait_until

MODULE = "synapse_sticky.StickyEventsModule"
PROBED_MODULE = "tests.lab.probe.ProbedModule"
_SECRET = "registration"
# They log by the clock, whatever happens, and would fill what is shown of a failed test.
_CLOCKWORK = (
    "synapse.metrics._gc",
    "synapse.storage.databases.main.event_push_actions",
    "synapse.storage.databases.main.metrics",
    "synapse.util.caches.lrucache",
)
_START_ATTEMPTS = 5
PROBE_PATH = "/_synapse/client/sticky_probe"

_SERVER_LABEL = re.compile(r'(?<={)server_name="[^"]*",?|,server_name="[^"]*"')


class StartError(AssertionError):
    """The server ended before it was ready."""


class Homeserver:
    """A Synapse process.

    Args:
        folder: an empty folder of its own.
        certificate: the TLS certificate and its key, PEM files.
        template: a database with Synapse's schema to begin with, if there is one.
        module: whether the module is loaded.
        probed: whether the module lets the tests look inside (``index_knows``).
        module_name: another class to load as the module.
        config: the module's ``config:``; None leaves it out.
        extra: merged into homeserver.yaml; its ``modules`` are loaded beside the module.
        metrics: whether there is a listener for metrics, at ``metrics_port``.
        forwarded: whether the federation port lies behind a forwarder, so that it can be cut off.
        host: the host in its server name; ACLs tell servers apart by it.
        balanced_by_source: whether one other server's requests all reach the same receiving
            process, if there are several.
    """

    receivers = 1
    """How many processes take other servers' transactions, in turns."""

    def __init__(
        self,
        folder: Path,
        certificate: tuple[Path, Path],
        *,
        template: Path | None = None,
        module: bool = True,
        probed: bool = False,
        module_name: str = MODULE,
        config: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
        metrics: bool = False,
        forwarded: bool = False,
        host: str = "localhost",
        balanced_by_source: bool = False,
    ) -> None:
        self.folder = folder
        self._balanced_by_source = balanced_by_source
        self._host = host
        self.module = module
        self._module_name = PROBED_MODULE if probed else module_name
        self._certificate = certificate
        self._config = config
        self._extra = dict(extra or {})
        self._other_modules = self._extra.pop("modules", [])
        database: Settings = self._extra.get("database", {})
        self._postgres = database if database.get("name") == "psycopg2" else None
        self._metrics = metrics
        self.forwarder = Forwarder() if forwarded else None
        self.process: starter.Process | None = None
        self.log_path = folder / "homeserver.log"
        self._log_start = 0
        self.database_path = folder / "homeserver.db"
        self._ports: list[socket.socket] = []
        # Tests start and end it from several threads.
        self._lock = threading.RLock()
        self.signing_key = generate_signing_key("a_lab")
        with (folder / "signing.key").open("w") as file:
            write_signing_keys(file, [self.signing_key])
        if template is not None:
            shutil.copy(template, self.database_path)
        self._choose_ports()

    # Set-up

    def _choose_ports(self) -> None:
        self._let_go_of_ports()
        self._ports = [_bound() for _ in range(3)]
        self.federation_port, self.client_port, self.metrics_port = (
            port.getsockname()[1] for port in self._ports
        )
        if self.forwarder is not None:
            self.forwarder.target_port = self.federation_port
        public_port = self.forwarder.port if self.forwarder else self.federation_port
        self.name = f"{self._host}:{public_port}"
        self.base_url = f"http://127.0.0.1:{self.client_port}"
        self.write_config()

    def write_config(self, **changes: Any) -> None:
        """Writes homeserver.yaml (as JSON, which YAML reads); ``changes`` are merged into it."""
        log = {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
            "handlers": {
                "file": {
                    "class": "logging.FileHandler",
                    "filename": str(self.log_path),
                    "formatter": "line",
                }
            },
            "root": {"level": "INFO", "handlers": ["file"]},
            "loggers": {
                **{name: {"level": "WARNING"} for name in _CLOCKWORK},
                "synapse_sticky.backoff": {"level": "DEBUG"},
            },
        }
        (self.folder / "log.yaml").write_text(json.dumps(log))
        certificate, key = self._certificate
        config: dict[str, Any] = {
            "server_name": self.name,
            "pid_file": str(self.folder / "homeserver.pid"),
            "listeners": [
                _listener(self.federation_port, "federation", tls=True),
                _listener(self.client_port, "client", tls=False),
            ],
            "database": {"name": "sqlite3", "args": {"database": str(self.database_path)}},
            "log_config": str(self.folder / "log.yaml"),
            "media_store_path": str(self.folder / "media"),
            "signing_key_path": str(self.folder / "signing.key"),
            "tls_certificate_path": str(certificate),
            "tls_private_key_path": str(key),
            "registration_shared_secret": _SECRET,
            "macaroon_secret_key": "macaroon",
            "form_secret": "form",
        }
        for override in OVERRIDES.values():
            config.update(copy.deepcopy(override))
        config["modules"] = list(self._other_modules)
        if self.module:
            with_config = {} if self._config is None else {"config": self._config}
            config["modules"].append({"module": self._module_name, **with_config})
        if self._metrics:
            config["enable_metrics"] = True
            config["listeners"].append(
                {"port": self.metrics_port, "type": "metrics", "bind_addresses": ["127.0.0.1"]}
            )
        _merge(config, self._extra)
        _merge(config, changes)
        (self.folder / "homeserver.yaml").write_text(json.dumps(config, indent=1))

    def configure_module(self, config: dict[str, Any]) -> None:
        """Another configuration for the module, from the next start on."""
        self._config = config
        self.write_config()

    @property
    def settings(self) -> Settings:
        """The ``database:`` section, of one with Postgres."""
        assert self._postgres is not None, f"{self.name} has SQLite"
        return self._postgres

    def use_database(self, settings: Settings) -> None:
        """A Postgres in place of the database, from the next start on."""
        self._postgres = self._extra["database"] = settings
        self.write_config()

    def use_module(self, module_name: str) -> None:
        """Another class to load as the module, from the next start on."""
        self._module_name = module_name
        self.write_config()

    # Control

    def start(self) -> None:
        """Starts the process; ``wait_until_ready`` waits for it."""
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with (self.folder / "stdout").open("ab") as output:
            self.process = starter.start(
                starter.HOMESERVER, ["-c", "homeserver.yaml"], self.folder, output
            )

    def wait_until_ready(self, timeout_s: float = 120) -> None:
        """Waits until the server answers.

        Raises:
            StartError: it ended instead; with what it said.
        """
        process = self._running()

        def ready() -> bool:
            if process.poll() is not None:
                raise StartError(f"{self.name} ended: {self.output()[-4000:]}")
            if not self._listens():
                return False
            try:
                return requests.get(f"{self.base_url}/health", timeout=10).ok
            except (requests.ConnectionError, requests.Timeout):
                return False

        wait_until(ready, f"{self.name} to answer", timeout_s)

    def first_start(self) -> None:
        """Starts and waits; takes other ports if somebody else got these meanwhile."""
        for attempt in range(_START_ATTEMPTS):
            if self.process is None:
                self.start()
            try:
                self.wait_until_ready()
                return
            except StartError:
                if attempt + 1 == _START_ATTEMPTS or "Address already in use" not in self.output():
                    raise
                self.process = None
                for path in (self.folder / "stdout", self.log_path):
                    path.unlink(missing_ok=True)
                self._choose_ports()

    def revive(self) -> None:
        """Starts what has ended, and waits until it answers.

        Raises:
            StartError: it ends again and again.
        """
        with self._lock:
            for attempt in range(_START_ATTEMPTS):
                try:
                    self.wait_until_ready()
                    return
                except StartError:
                    if attempt + 1 == _START_ATTEMPTS:
                        raise
                    self._start_what_has_ended()

    def _start_what_has_ended(self) -> None:
        self.kill()
        self.start()

    def pause(self) -> None:
        """Stops the process where it is; connections stay open."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Ends the process at once, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """Ends the process in good order."""
        process = self._running()
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process = None

    def restart(self) -> None:
        """Starts again, on the same ports and data."""
        if self.process is not None:
            self.stop()
        self.start()
        self.wait_until_ready()

    def close(self) -> None:
        """Ends everything that belongs to the server."""
        self.kill()
        self._let_go_of_ports()
        if self.forwarder is not None:
            self.forwarder.close()

    def _let_go_of_ports(self) -> None:
        for port in self._ports:
            port.close()
        self._ports = []

    def _listens(self) -> bool:
        """Does this process listen to clients, rather than another one that has the port?"""
        log = self.log_path.read_bytes()[self._log_start :] if self.log_path.exists() else b""
        return b"now listening on TCP port %d\n" % self.client_port in log

    def _running(self) -> starter.Process:
        assert self.process is not None, f"{self.name} is not running"
        return self.process

    def running(self) -> list[starter.Process]:
        """Its processes."""
        return [self._running()]

    # Looking inside

    def output(self) -> str:
        """What the process printed, and its log."""
        parts = [self.folder / "stdout", self.log_path]
        return "".join(p.read_text(errors="replace") for p in parts if p.exists())

    def logs(self) -> dict[str, str]:
        """What each process printed and logged."""
        return {self.name: self.output()}

    def log_has(self, text: str) -> bool:
        return text in self.output()

    def metrics(self) -> list[str]:
        """What the listener for metrics says, of each process."""
        url = f"http://127.0.0.1:{self.metrics_port}/_synapse/metrics"
        return [requests.get(url, timeout=60).text]

    def counters(self) -> dict[str, float]:
        """What its processes count, together, by name and labels; without ``server_name``."""
        total: dict[str, float] = {}
        for text in self.metrics():
            for line in text.splitlines():
                if not line.startswith("#"):
                    name, value = line.rsplit(" ", 1)
                    name = _SERVER_LABEL.sub("", name).replace("{}", "")
                    total[name] = total.get(name, 0.0) + float(value)
        return total

    def index_knows(self, event_id: str) -> bool:
        """Whether the module's index has the event, once it is in step with the stream."""
        url = self.base_url + PROBE_PATH

        def in_step() -> dict[str, bool] | None:
            answer = requests.get(url, {"event_id": event_id}, timeout=60).json()
            return answer if answer["in_step"] else None

        answer = wait_until(in_step, "the index to be in step")
        assert answer is not None
        return answer["known"]

    def query(self, sql: str, *args: object) -> list[tuple[Any, ...]]:
        """Reads from the server's database."""
        if self._postgres is not None:
            return query_in(self._postgres, sql, *args)
        connection = sqlite3.connect(f"file:{self.database_path}?mode=ro", uri=True, timeout=30)
        try:
            return connection.execute(sql, args).fetchall()
        finally:
            connection.close()

    def change(self, *statements: str) -> None:
        """Changes the server's database, in one transaction."""
        if self._postgres is not None:
            change_in(self._postgres, *statements)
            return
        connection = sqlite3.connect(self.database_path, timeout=30)
        try:
            with connection:
                for statement in statements:
                    connection.execute(statement)
        finally:
            connection.close()

    # Users and peers

    def user(self, name: str = "user", *, admin: bool = False) -> Client:
        """Registers a user with a name like this."""
        url = f"{self.base_url}/_synapse/admin/v1/register"
        username = f"{name}-{secrets.token_hex(4)}"
        nonce = requests.get(url, timeout=60).json()["nonce"]
        role = "admin" if admin else "notadmin"
        message = "\0".join([nonce, username, "password", role]).encode()
        body = {
            "nonce": nonce,
            "username": username,
            "password": "password",
            "admin": admin,
            "mac": hmac.new(_SECRET.encode(), message, hashlib.sha1).hexdigest(),
        }
        answer = requests.post(url, json=body, timeout=60)
        answer.raise_for_status()
        return Client(self.base_url, answer.json()["user_id"], answer.json()["access_token"])

    def as_seen_by(self, other: "Homeserver") -> FederationRequester:
        """This server's federation API, asked by the other server."""
        return FederationRequester(other.name, other.signing_key, self.name, self.federation_port)


def _listener(port: int, resource: str, *, tls: bool) -> dict[str, Any]:
    return {
        "port": port,
        "type": "http",
        "tls": tls,
        "bind_addresses": ["127.0.0.1"],
        "resources": [{"names": [resource]}],
    }


def _bound() -> socket.socket:
    """Has a port that nobody else is given, also while the server that listens there is down."""
    bound = socket.socket()
    # As Twisted does, which may listen there for that.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", 0))
    return bound


def _merge(into: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


assert os.name == "posix", "the lab needs POSIX signals"
