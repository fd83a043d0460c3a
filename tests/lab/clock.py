"""The module with a clock that tests set ahead: what is deferred for an hour is released now."""

from pathlib import Path
from typing import Any

from synapse.module_api import ModuleApi

from synapse_sticky import StickyEventsModule
from synapse_sticky.config import StickyConfig
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.process import Cancellable
from tests import lab

MODULE = f"{__name__}.WithItsOwnClock"
_LOOKS_EVERY_MS = 200
_LOOK = ("release", "observe")
"""Who waits for the turn of what is deferred looks as often whether it has come."""

_FILE = "ahead_ms"
"""In the server's folder, which it runs in."""


class WithItsOwnClock(StickyEventsModule):
    """Synapse's own clock goes on as it does."""

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        now_ms = Homeserver.now_ms

        def later_ms(homeserver: Homeserver) -> int:
            ahead = Path(_FILE)
            return now_ms(homeserver) + (int(ahead.read_text()) if ahead.exists() else 0)

        call_later = Homeserver.call_later

        def call_soon(homeserver: Homeserver, delay_ms: int, what: str, *args: Any) -> Cancellable:
            at_most_ms = _LOOKS_EVERY_MS if what in _LOOK else delay_ms
            return call_later(homeserver, min(delay_ms, at_most_ms), what, *args)

        setattr(Homeserver, "now_ms", later_ms)  # noqa: B010
        setattr(Homeserver, "call_later", call_soon)  # noqa: B010
        super().__init__(config, api)


def set_ahead(server: "lab.Homeserver", ms: int) -> None:
    """Sets the module's clock ahead, in one step."""
    new = server.folder / f"{_FILE}.new"
    new.write_text(str(ms))
    new.rename(server.folder / _FILE)
