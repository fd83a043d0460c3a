"""A plugin of pytest: the homeservers of Synapse's own tests have the module."""

import importlib
from collections.abc import Callable
from typing import Any

from synapse_sticky.homeserver.clock import SetClock

MODULE = {"module": "synapse_sticky.StickyEventsModule", "config": {}}


class _OneClock(SetClock):
    """Their tests have a clock of their own, which stands still while time passes."""

    def __init__(
        self, wall_ms: Callable[[], int], call_by_twisted: Any, in_reactor: Callable[..., None]
    ) -> None:
        super().__init__(wall_ms, call_by_twisted, in_reactor, lambda: wall_ms() / 1_000)


def pytest_sessionstart() -> None:
    """Adds the module to what each of their homeservers is configured with."""
    # Synapse's package of that name, not this project's.
    theirs: Any = importlib.import_module("tests.unittest")
    case = theirs.HomeserverTestCase
    original = case.default_config

    def default_config(self: object) -> dict[str, Any]:
        config: dict[str, Any] = original(self)
        return {**config, "modules": [MODULE]}

    case.default_config = default_config
    process: Any = importlib.import_module("synapse_sticky.homeserver.process")
    process.SetClock = _OneClock
