"""Starts Synapse with the module that is installed, and sends a sticky event.

It is run by the Python of a clean environment, with nothing but what is installed there: it imports
the standard library, and Synapse's own key maker. Prints one line if all is well; otherwise it ends
with what Synapse said.
"""

import hashlib
import hmac
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

_SECRET = "registration"
_ATTEMPTS = 3
_PATIENCE_S = 120


class TakenError(Exception):
    """Somebody else got the port meanwhile."""


class Server:
    """One Synapse, in a folder of its own, on a port that the system gives."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "output"
        self._folder = folder
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            self._port: int = bound.getsockname()[1]
        self._write_config()
        command = [sys.executable, "-I", "-m", "synapse.app.homeserver", "-c", "homeserver.yaml"]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)

    def _write_config(self) -> None:
        from signedjson.key import generate_signing_key, write_signing_keys

        with (self._folder / "signing.key").open("w") as file:
            write_signing_keys(file, [generate_signing_key("a_key")])
        log = {
            "version": 1,
            "handlers": {"all": {"class": "logging.StreamHandler"}},
            "root": {"level": "INFO", "handlers": ["all"]},
        }
        (self._folder / "log.yaml").write_text(json.dumps(log))
        listener = {
            "port": self._port,
            "bind_addresses": ["127.0.0.1"],
            "type": "http",
            "resources": [{"names": ["client"]}],
        }
        config = {
            "server_name": f"localhost:{self._port}",
            "listeners": [listener],
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
            # What an administrator writes:
            "experimental_features": {"msc4354_enabled": True},
            "modules": [{"module": "synapse_sticky.StickyEventsModule"}],
        }
        (self._folder / "homeserver.yaml").write_text(json.dumps(config))

    def request(self, method: str, path: str, body: object = None, token: str = "") -> Any:
        """The answer to a request, as JSON."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = f"http://127.0.0.1:{self._port}{path}"
        asked = urllib.request.Request(url, data, headers, method=method)
        # Whatever proxy there may be is not for loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(asked, timeout=60) as answer:
            return json.loads(answer.read())

    def wait_until_ready(self) -> None:
        """Waits until it answers.

        Raises:
            TakenError: its port was taken.
        """
        began_s = time.monotonic()
        while time.monotonic() - began_s < _PATIENCE_S:
            if self._has_ended():
                if "Address already in use" in self.log.read_text(errors="replace"):
                    raise TakenError
                fail(self, f"Synapse ended with {self.process.returncode}")
            try:
                self.request("GET", "/_matrix/client/versions")
                return
            except OSError:
                pass  # it does not listen yet
        fail(self, f"Synapse did not answer within {_PATIENCE_S} s")

    def _has_ended(self) -> bool:
        """Whether the process ends within a moment."""
        try:
            self.process.wait(0.1)
        except subprocess.TimeoutExpired:
            return False
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
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def fail(server: Server, why: str) -> NoReturn:
    """Ends, with what Synapse said last."""
    sys.exit(f"{why}\n{server.log.read_text(errors='replace')[-4000:]}")


def check() -> None:
    """The module's own check of the Synapse that is installed beside it."""
    command = [sys.executable, "-I", "-m", "synapse_sticky", "check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"check ended with {done.returncode}:\n{done.stdout}{done.stderr}")


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
    synced = server.request("GET", f"/_matrix/client/v3/sync?{query}", token=token)
    sections = synced["rooms"]["join"][room].get("msc4354_sticky", {})
    if [event["event_id"] for event in sections.get("events", ())] != [sent]:
        fail(server, f"/sync has {sections}, not {sent}")
    said = server.log.read_text(errors="replace")
    if "synapse-sticky runs in master: index, delivery" not in said:
        fail(server, "The log does not say that the module runs")


def main() -> None:
    """See above."""
    if there := [name for name in ("cargo", "cc", "gcc", "make") if shutil.which(name)]:
        sys.exit(f"That is no clean environment: {', '.join(there)} is on PATH")
    began_s = time.monotonic()
    check()
    checked_s = time.monotonic()
    for attempt in range(_ATTEMPTS):
        with tempfile.TemporaryDirectory() as folder:
            server = Server(Path(folder))
            try:
                server.wait_until_ready()
                ready_s = time.monotonic()
                sent_and_seen(server)
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
        f" {ready_s - checked_s:.0f} s, a sticky event came through\n"
    )


if __name__ == "__main__":
    main()
