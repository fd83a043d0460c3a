"""Starts Synapse with the module that is installed, and sends a sticky event.

It is run by the Python of a clean environment, with nothing but what is installed there: it imports
the standard library, and Synapse's own key maker. Synapse is configured by the lines that the
README of the installed module shows, and has to run with all duties. Prints one line if all is
well; otherwise it ends with what Synapse said.

With an argument, a JSON object, there is a worker as well, which persists the events and answers
/sync. It has ``database`` (a Postgres) and ``redis``, Synapse's sections of these names.

With the argument ``refused`` the module must not be there, and the line is what Synapse says then.
"""

import hashlib
import hmac
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from importlib.metadata import metadata, version
from pathlib import Path
from typing import Any, NoReturn

_SECRET = "registration"
WORKER = "persister1"
LACKS = "ModuleNotFoundError: No module named 'synapse_sticky'"
"""How Synapse ends where the module is configured but not installed; docs/install.md says it."""
_MODULE_ALONE = "modules: [{module: synapse_sticky.StickyEventsModule}]\n"
_ATTEMPTS = 3
_PATIENCE_S = 120


class TakenError(Exception):
    """Somebody else got the port meanwhile."""


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


class Server:
    """One Synapse, in a folder of its own, on ports that the system gives.

    Args:
        folder: an empty one.
        lines: what an administrator adds to homeserver.yaml for the module.
        shared: what its worker and the main process share; without it there is no worker.
    """

    def __init__(self, folder: Path, lines: str, shared: dict[str, Any] | None = None) -> None:
        self.log = folder / "output"
        self.config = folder / "homeserver.yaml"
        self._folder = folder
        self._port = self._sync_port = free_port()
        self._write_config(lines, shared)
        self.processes: list[subprocess.Popen[bytes]] = []
        self._has_worker = shared is not None

    def start(self) -> None:
        """Starts the main process."""
        self.processes.append(self._started("homeserver", self.config.name))

    def _started(self, app: str, *files: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-m", f"synapse.app.{app}"]
        command += [word for file in files for word in ("-c", file)]
        with self.log.open("ab") as output:
            return subprocess.Popen(command, cwd=self._folder, stdout=output, stderr=output)

    def _write_worker(self) -> None:
        socket_of_it = {"path": str(self._folder / WORKER), "type": "http"}
        worker = {
            "worker_app": "synapse.app.generic_worker",
            "worker_name": WORKER,
            "worker_log_config": "log.yaml",
            "worker_pid_file": "worker.pid",
            "worker_listeners": [
                _listener(self._sync_port, "client"),
                {**socket_of_it, "resources": [{"names": ["replication"]}]},
            ],
        }
        (self._folder / "worker.yaml").write_text(json.dumps(worker))

    def _write_config(self, lines: str, shared: dict[str, Any] | None) -> None:
        from signedjson.key import generate_signing_key, write_signing_keys

        with (self._folder / "signing.key").open("w") as file:
            write_signing_keys(file, [generate_signing_key("a_key")])
        log = {
            "version": 1,
            "handlers": {"all": {"class": "logging.StreamHandler"}},
            "root": {"level": "INFO", "handlers": ["all"]},
        }
        (self._folder / "log.yaml").write_text(json.dumps(log))
        config: dict[str, Any] = {
            "server_name": f"localhost:{self._port}",
            "listeners": [_listener(self._port, "client", "federation")],
            "database": {"name": "sqlite3", "args": {"database": "homeserver.db"}},
            "log_config": "log.yaml",
            "pid_file": "homeserver.pid",
            "media_store_path": "media",
            "signing_key_path": "signing.key",
            "registration_shared_secret": _SECRET,
            "macaroon_secret_key": "macaroon",
            "form_secret": "form",
            "trusted_key_servers": [],
            "report_stats": False,
        }
        if shared:
            main = {"path": str(self._folder / "main"), "type": "http"}
            config["listeners"] += [{**main, "resources": [{"names": ["replication"]}]}]
            config |= {
                **shared,
                "worker_replication_secret": "replication",
                "instance_map": {
                    name: {"path": str(self._folder / name)} for name in ("main", WORKER)
                },
                "stream_writers": {"events": [WORKER]},
            }
        before = "".join(f"{name}: {json.dumps(value)}\n" for name, value in config.items())
        self.config.write_text(before + lines)

    def request(
        self, method: str, path: str, body: object = None, token: str = "", *, sync: bool = False
    ) -> Any:
        """The answer to a request, as JSON; of the worker if it is ``sync`` and there is one."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = f"http://127.0.0.1:{self._sync_port if sync else self._port}{path}"
        asked = urllib.request.Request(url, data, headers, method=method)
        # Whatever proxy there may be is not for loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(asked, timeout=60) as answer:
            return json.loads(answer.read())

    def wait_until_ready(self) -> None:
        """Waits until it answers; the worker is started then, as the main process makes the tables.

        Raises:
            TakenError: a port was taken.
        """
        self._wait(sync=False)
        if self._has_worker:
            self._sync_port = free_port()
            self._write_worker()
            self.processes.append(self._started("generic_worker", "homeserver.yaml", "worker.yaml"))
            self._wait(sync=True)

    def _wait(self, *, sync: bool) -> None:
        began_s = time.monotonic()
        while time.monotonic() - began_s < _PATIENCE_S:
            if self.has_ended():
                if "Address already in use" in self.log.read_text(errors="replace"):
                    raise TakenError
                fail(self, "Synapse ended")
            try:
                self.request("GET", "/_matrix/client/versions", sync=sync)
                return
            except OSError:
                pass  # it does not listen yet
        fail(self, f"Synapse did not answer within {_PATIENCE_S} s")

    def has_ended(self) -> bool:
        """Whether a process ends within a moment."""
        try:
            self.processes[-1].wait(0.1)
        except subprocess.TimeoutExpired:
            return self.processes[0].poll() is not None
        return True

    def register(self) -> str:
        """A user's access token."""
        path = "/_synapse/admin/v1/register"
        nonce = self.request("GET", path)["nonce"]
        words = "\0".join((nonce, "alice", "password", "notadmin"))
        mac = hmac.new(_SECRET.encode(), words.encode(), hashlib.sha1).hexdigest()
        body = {"nonce": nonce, "username": "alice", "password": "password", "mac": mac}
        token: str = self.request("POST", path, body)["access_token"]
        return token

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _listener(port: int, *names: str) -> dict[str, Any]:
    return {
        "port": port,
        "bind_addresses": ["127.0.0.1"],
        "type": "http",
        "resources": [{"names": names}],
    }


def fail(server: Server, why: str) -> NoReturn:
    """Ends, with what Synapse said last."""
    sys.exit(f"{why}\n{server.log.read_text(errors='replace')[-4000:]}")


def refused() -> str:
    """What Synapse says last, where the module is configured but not installed."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), _MODULE_ALONE)
        server.start()
        try:
            server.processes[0].wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            fail(server, "Synapse starts without the module that it is to load")
        finally:
            server.stop()
        last = server.log.read_text(errors="replace").strip().splitlines()[-1]
        if last != LACKS:
            fail(server, "Synapse does not end with what it lacks")
        return last


def five_lines(readme: str) -> str:
    """The lines for homeserver.yaml that the README shows."""
    blocks = re.findall(r"^```yaml\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    if len(blocks) != 1 or blocks[0].count("\n") != 5:
        sys.exit(f"The README does not show five lines of YAML: {blocks}")
    lines: str = blocks[0]
    return lines


def check(config: Path) -> list[str]:
    """The module's own check of the configuration. Gives the duties, which have to be on."""
    command = [sys.executable, "-I", "-m", "synapse_sticky", "check", "--json", "-c", str(config)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=config.parent)
    if done.returncode:
        sys.exit(f"check ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    duties: dict[str, Any] = json.loads(done.stdout)["duties"]
    if not duties or any(duty["state"] != "on" or duty.get("idle") for duty in duties.values()):
        sys.exit(f"check does not find all duties on: {duties}")
    return list(duties)


def sent_and_seen(server: Server) -> None:
    """Sends a sticky event; /sync has to have it in the sticky section, not in the timeline."""
    token = server.register()
    room = server.request("POST", "/_matrix/client/v3/createRoom", {}, token)["room_id"]
    sent = server.request(
        "PUT",
        f"/_matrix/client/v3/rooms/{room}/send/org.example.call/1"
        "?org.matrix.msc4354.sticky_duration_ms=600000",
        {"body": "here"},
        token,
    )["event_id"]
    without_timeline = '{"room":{"timeline":{"not_types":["org.example.call"]}}}'
    query = urllib.parse.urlencode({"filter": without_timeline})
    synced = server.request("GET", f"/_matrix/client/v3/sync?{query}", token=token, sync=True)
    sections = synced["rooms"]["join"][room].get("msc4354_sticky", {})
    if [event["event_id"] for event in sections.get("events", ())] != [sent]:
        fail(server, f"/sync has {sections}, not {sent}")


def all_run(server: Server, duties: list[str]) -> None:
    """Waits until each process says that it runs its duties: the main process all of them, where it
    is the only one."""
    for name in ("master", WORKER)[: len(server.processes)]:
        asked = set(duties) if len(server.processes) == 1 else {"index", "delivery"}
        began_s = time.monotonic()
        while missing := asked - _running(server.log.read_text(errors="replace"), name):
            if server.has_ended() or time.monotonic() - began_s > _PATIENCE_S:
                fail(server, f"The log does not say that {name} runs {', '.join(sorted(missing))}")


def _running(said: str, process: str) -> set[str]:
    """The duties that the log says are on in a process, those that were loading among them."""
    line = re.search(rf"synapse-sticky runs in {process}: ([^\n;]*)[^\n]*\n", said)
    on = set() if line is None else set(line[1].split(", "))
    return on | set(re.findall(r"\b(\w+) is on$", said, re.MULTILINE))


def main() -> None:
    """See above."""
    if there := [name for name in ("cargo", "cc", "gcc", "make") if shutil.which(name)]:
        sys.exit(f"That is no clean environment: {', '.join(there)} is on PATH")
    if sys.argv[1:] == ["refused"]:
        sys.stdout.write(f"Synapse ended, and said: {refused()}\n")
        return
    shared = json.loads(sys.argv[1]) if len(sys.argv) > 1 else None
    for attempt in range(_ATTEMPTS):
        with tempfile.TemporaryDirectory() as folder:
            server = Server(
                Path(folder), five_lines(metadata("synapse-sticky")["Description"]), shared
            )
            began_s = time.monotonic()
            duties = check(server.config)
            checked_s = time.monotonic()
            try:
                server.start()
                server.wait_until_ready()
                ready_s = time.monotonic()
                sent_and_seen(server)
                all_run(server, duties)
            except TakenError:
                if attempt + 1 == _ATTEMPTS:
                    raise
                continue
            finally:
                server.stop()
            break
    sys.stdout.write(
        f"synapse-sticky {version('synapse-sticky')} on Synapse {version('matrix-synapse')}:"
        f" check took {checked_s - began_s:.0f} s, Synapse was up after"
        f" {ready_s - checked_s:.0f} s, a sticky event came through"
        f"{' a worker' if shared else f', all {len(duties)} duties are on'}\n"
    )


if __name__ == "__main__":
    main()
