"""Programs of matrix-js-sdk, the client that people use: each prints whom it sees in a call."""

import json
import os
import subprocess
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest

from tests.lab.client import Client
from tests.lab.js_sdk.installation import FOLDER, missing, tool

WATCH = "watch.mjs"
PARTICIPATE = "participate.mjs"


class JsSdk:
    """One of the programs for one user in one room, from ``open`` to ``close`` or ``kill``.

    Each has a device of its own. The program's log is beside a test that failed.

    Args:
        program: its file's name.
        on_line: is called with each line, in a thread of its own.
        log: whether the program's log is shown.
        options: the ones that the head of client.mjs and the program's own name.
    """

    def __init__(
        self,
        user: Client,
        room_id: str,
        program: str = WATCH,
        on_line: Callable[[Any], object] = lambda line: None,
        log: bool = True,
        **options: Any,
    ) -> None:
        if (reason := missing()) is not None:
            pytest.skip(f"matrix-js-sdk is not to be had: {reason}")
        token, device_id = _log_in(user)
        base = {"baseUrl": user.base_url, "userId": user.user_id, "deviceId": device_id}
        said = json.dumps({**base, "roomId": room_id, **options})
        self._command = [tool("node") or "", str(FOLDER / program), said]
        self._env = {**os.environ, "ACCESS_TOKEN": token}
        self.name = f"{program} of {user.user_id}, {options.get('sync', '/sync')}"
        self._on_line = on_line
        self._log = None if log else subprocess.DEVNULL
        self.lines: list[dict[str, list[Any]]] = []
        """What it has printed since it was opened."""

    def open(self) -> None:
        """Starts the program."""
        self.lines = []
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, env=self._env, stdin=pipe, stdout=pipe, stderr=self._log, text=True
        )
        self._reader = Thread(target=self._read)
        self._reader.start()

    def close(self) -> None:
        """Ends it as a user does."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(json.loads(line))
            self._on_line(self.lines[-1])

    def _last(self, what: str) -> list[str] | None:
        assert self._process.poll() is None, f"{self.name} has ended"
        return self.lines[-1][what] if self.lines else None

    def sticky(self) -> set[str] | None:
        """The IDs of the events in the SDK's own store; None before it knows the room.

        Raises:
            AssertionError: the program has ended.
        """
        event_ids = self._last("sticky")
        return None if event_ids is None else set(event_ids)

    def call(self) -> list[str] | None:
        """The user IDs of the call's members that the SDK makes of it, in order; None as above."""
        user_ids = self._last("call")
        return None if user_ids is None else sorted(user_ids)


def _log_in(user: Client) -> tuple[str, str]:
    """The token and the name of a new device."""
    identifier = {"type": "m.id.user", "user": user.user_id}
    login = {"type": "m.login.password", "identifier": identifier, "password": "password"}
    answer = user.request("POST", "login", login)
    return answer["access_token"], answer["device_id"]
