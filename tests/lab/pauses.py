"""A module of Synapse that notes how long the reactor is held, with or without ours beside it.

It also lets tests set the process's clock.
"""

import json
import time
from pathlib import Path
from typing import Any

from synapse.module_api import ModuleApi
from twisted.internet import reactor

from tests.lab.faults import install_clock
from tests.lab.homeserver import Homeserver

MODULE = f"{__name__}.PausesModule"
_FILE = "pauses.json"
_KEPT = 5


class PausesModule:
    """Measures every turn of the reactor by the CPU time of the reactor's thread.

    Other programs on the machine do not count then.
    """

    def __init__(self, config: dict[str, Any], api: ModuleApi) -> None:
        install_clock()
        # There before the reactor runs, so that no turn is missed.
        setattr(reactor, "_poller", _Poller(getattr(reactor, "_poller")))  # noqa: B009, B010

    @staticmethod
    def parse_config(config: dict[str, Any]) -> dict[str, Any]:
        return config


class _Poller:
    """What waits for the reactor's next events, in the place of the reactor's own."""

    def __init__(self, poller: Any) -> None:
        self._poller = poller
        self._turns = 0
        self._since_s = 0.0
        self._longest_ms = longest_pauses_ms(Path())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._poller, name)

    def poll(self, *args: Any) -> Any:
        """Waits for events, and notes how long the turn before took."""
        # The first turns have the start itself in them.
        if self._turns > 2:
            self._note((time.thread_time() - self._since_s) * 1_000)
        self._turns += 1
        events = self._poller.poll(*args)
        self._since_s = time.thread_time()
        return events

    def _note(self, pause_ms: float) -> None:
        if len(self._longest_ms) == _KEPT and pause_ms <= self._longest_ms[-1]:
            return
        self._longest_ms = sorted([*self._longest_ms, pause_ms], reverse=True)[:_KEPT]
        Path(_FILE).write_text(json.dumps(self._longest_ms))


def longest_pauses_ms(folder: Path) -> list[float]:
    """The longest turns of the server whose folder this is, over its restarts, longest first."""
    try:
        found: list[float] = json.loads((folder / _FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return []  # it has none yet, or was killed while it wrote
    return found


def pauses_ms(server: Homeserver) -> list[float]:
    """The same of a server of one process."""
    return longest_pauses_ms(server.folder)
