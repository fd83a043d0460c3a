"""A client that people use sees a call's members from before it joined: matrix-js-sdk (D1, D5)."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from threading import Thread
from urllib.parse import quote

import pytest

from tests.conftest import Servers
from tests.integration.rooms import room_of
from tests.lab import Client, wait_until
from tests.lab.client import HOUR_MS, STICKY_PARAMETER

_SOURCE = Path(__file__).parent / "js_sdk"
_INSTALLED = Path(__file__).parents[2] / "target" / "js_sdk"  # git ignores it
_SHORT_MS = 20_000  # long enough to be seen before its end, also on a busy machine


@pytest.mark.slow
@pytest.mark.requirement("D1", "D5")
def test_js_sdk_sees_the_members_of_a_call(servers: Servers) -> None:
    program = installed()
    a, b = servers(2)
    alice, carol, bob = a.user("alice"), a.user("carol"), b.user("bob")
    # The timeline shows nobody what was before they joined.
    room_id = room_of(alice, carol, via=a, history_visibility="joined")
    alices, carols = send_member(alice, room_id, 1), send_member(carol, room_id, 1)

    command = [*program, b.base_url, bob.user_id, room_id, a.name]
    with Sdk(command, access_token(bob)) as sdk:
        sdk.wait_until_it_sees({alices: alice, carols: carol})
        assert sdk.seen["in_timeline"] == []

        newer = send_member(alice, room_id, 2, _SHORT_MS)
        sdk.wait_until_it_sees({newer: alice, carols: carol})
        carol.redact(room_id, carols)
        sdk.wait_until_it_sees({newer: alice})
        sdk.wait_until_it_sees({})  # the newer one has expired


@pytest.mark.slow
@pytest.mark.requirement("S5", "P3")
def test_js_sdk_does_not_see_who_was_banned_with_redactions(servers: Servers) -> None:
    program = installed()
    redacting = {"extra": {"experimental_features": {"msc4293_enabled": True}}}
    a, b = servers(redacting, redacting)
    alice, carol, bob = a.user("alice"), a.user("carol"), b.user("bob")
    room_id = room_of(alice, carol, via=a)
    alices, _ = send_member(alice, room_id, 1), send_member(carol, room_id, 1)
    ban = {"user_id": carol.user_id, "org.matrix.msc4293.redact_events": True}
    alice.request("POST", f"rooms/{quote(room_id)}/ban", ban)
    command = [*program, b.base_url, bob.user_id, room_id, a.name]
    with Sdk(command, access_token(bob)) as sdk:
        sdk.wait_until_it_sees({alices: alice})


def send_member(user: Client, room_id: str, number: int, duration_ms: int = HOUR_MS) -> str:
    """Says as MatrixRTC's clients do that the user is in the room's call."""
    content = {
        "msc4354_sticky_key": f"device of {user.user_id}",
        "slot_id": "m.call#ROOM",
        "application": {"type": "m.call"},
        "member": {"user_id": user.user_id, "device_id": "DEVICE", "id": "device"},
        "transports": {"published": [], "can_subscribe": ["livekit"]},
        "versions": [],
    }
    path = f"rooms/{quote(room_id)}/send/org.matrix.msc4143.rtc.member/{number}"
    sent = user.request("PUT", path, content, **{STICKY_PARAMETER: duration_ms})
    return str(sent["event_id"])


def access_token(user: Client) -> str:
    """The token of a new device."""
    identifier = {"type": "m.id.user", "user": user.user_id}
    login = {"type": "m.login.password", "identifier": identifier, "password": "password"}
    return str(user.request("POST", "login", login)["access_token"])


class Sdk:
    """The node program, and what it saw last. Its log is beside a test that failed."""

    def __init__(self, command: list[str], token: str) -> None:
        env, pipe = {**os.environ, "ACCESS_TOKEN": token}, subprocess.PIPE
        self._process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)
        self.seen: dict[str, list[str]] = {}
        self._reader = Thread(target=self._read)

    def __enter__(self) -> "Sdk":
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # at which the program ends
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.seen = json.loads(line)

    def wait_until_it_sees(self, members: dict[str, Client]) -> None:
        """Waits until its store holds just these events, and just their senders are in the call."""
        call = {user.user_id for user in members.values()}

        def as_expected() -> bool:
            assert self._process.poll() is None, "the program has ended"
            seen = self.seen
            return bool(seen) and set(seen["sticky"]) == set(members) and set(seen["call"]) == call

        wait_until(as_expected, f"matrix-js-sdk to see {list(members)}")


def installed() -> list[str]:
    """The program's command; what it needs is installed once for each package-lock.json."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("matrix-js-sdk needs node and npm, and one of them is missing")
    shutil.copytree(_SOURCE, _INSTALLED, dirs_exist_ok=True)
    lock, stamp = _SOURCE / "package-lock.json", _INSTALLED / "installed"
    if not stamp.exists() or stamp.read_text() != lock.read_text():
        npm_ci = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--engine-strict=false"]
        run = subprocess.run(
            npm_ci, cwd=_INSTALLED, capture_output=True, text=True, timeout=300, check=False
        )
        assert run.returncode == 0, f"npm ci failed:\n{run.stdout}{run.stderr}"
        shutil.copy(lock, stamp)
    return [node, str(_INSTALLED / "client.mjs")]
