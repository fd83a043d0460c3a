"""A plugin of pytest: the homeservers of Synapse's own tests have the module."""

import importlib
from typing import Any

MODULE = {"module": "synapse_sticky.StickyEventsModule", "config": {}}


def pytest_sessionstart() -> None:
    """Adds it to what each of their homeservers is configured with."""
    # Synapse's package of that name, not this project's.
    theirs: Any = importlib.import_module("tests.unittest")
    case = theirs.HomeserverTestCase
    original = case.default_config

    def default_config(self: object) -> dict[str, Any]:
        config: dict[str, Any] = original(self)
        return {**config, "modules": [MODULE]}

    case.default_config = default_config
