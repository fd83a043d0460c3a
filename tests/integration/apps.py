"""Apps that are open while things happen in a room's call, and what they show."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.lab import Client, wait_until
from tests.lab.js_sdk import JsSdk
from tests.lab.sliding_app import SlidingApp

App = JsSdk | SlidingApp
Opened = Callable[..., list[App]]
"""``opened(app, another)`` opens apps until the test is over."""


def apps_of(user: Client, room_id: str, folder: Path) -> tuple[JsSdk, JsSdk, SlidingApp]:
    """One of each kind, not opened yet. What they save is in the folder."""
    saved = folder / f"{user.user_id}.json"
    return (
        JsSdk(user, room_id, saved=str(saved)),
        JsSdk(user, room_id, sync="sliding"),
        SlidingApp(user, room_id),
    )


def wait_until_they_show(apps: Sequence[App], *users: Client) -> None:
    """Waits until all apps show just these users in the call."""
    call = sorted(user.user_id for user in users)
    for app in apps:
        _wait_until_equal(app.call, call, app, "show")


def wait_until_they_have(apps: Sequence[App], *event_ids: str) -> None:
    """Waits until all apps have just these sticky events that count."""
    for app in apps:
        _wait_until_equal(app.sticky, {*event_ids}, app, "have")


def _wait_until_equal(seen: Callable[[], object], expected: object, app: App, verb: str) -> None:
    wait_until(lambda: seen() == expected, f"{app.name} to {verb} {expected}", look=seen)
