"""The commands that need packages which Synapse does not: what they are, and what they need.

To add one, write a file with a function ``command``, which imports click and gives a
``click.Command``, and add it to ``EXTRA``. Neither that file nor what it imports at its top imports
an extra there: every module of this package can be imported without any.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

import attr
from packaging.version import Version

from synapse_sticky.cli.api.actions import (
    actions,
    discard,
    end,
    exempt,
    hold,
    push,
    release,
)
from synapse_sticky.cli.api.lists import rooms, servers
from synapse_sticky.cli.api.status import command as status
from synapse_sticky.cli.api.watch import command as watch
from synapse_sticky.cli.api.why import command as why
from synapse_sticky.cli.simulate.command import command as simulate

if TYPE_CHECKING:
    import click

_OLDEST_CLICK = "8.1"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class ExtraCommand:
    """A command.

    load: imports the packages and gives the command.
    extra: the one of this package that brings what it needs.
    needs: the packages without which it cannot run.
    """

    name: str
    summary: str
    load: Callable[[], "click.Command"]
    extra: str
    needs: tuple[str, ...]

    def lacks(self) -> str:
        """What to install to run it; empty if nothing."""
        if all(map(_is_there, self.needs)):
            return ""
        return (
            f"synapse-sticky {self.name} needs {', '.join(self.needs)}. Install them into this"
            f" environment: pip install 'synapse-sticky[{self.extra}]'"
        )


_TERMINAL = ("click", "rich")

EXTRA: Sequence[ExtraCommand] = (
    ExtraCommand("status", "how much is sticky, and how much waits", status, "cli", _TERMINAL),
    ExtraCommand("watch", "the same, renewed until Ctrl-C", watch, "cli", _TERMINAL),
    ExtraCommand("why", "why an event has not been delivered", why, "cli", _TERMINAL),
    ExtraCommand("rooms", "where something is sticky or waits", rooms, "cli", _TERMINAL),
    ExtraCommand("servers", "whose events are sticky or wait", servers, "cli", _TERMINAL),
    ExtraCommand("release", "deliver what waits", release, "cli", _TERMINAL),
    ExtraCommand("discard", "have what waits never be sticky", discard, "cli", _TERMINAL),
    ExtraCommand("push", "send a room's own events to a server again", push, "cli", _TERMINAL),
    ExtraCommand("exempt", "no limits for a time", exempt, "cli", _TERMINAL),
    ExtraCommand("hold", "have a server's events wait for a time", hold, "cli", _TERMINAL),
    ExtraCommand("actions", "what administrators have ordered", actions, "cli", _TERMINAL),
    ExtraCommand("end", "end what was ordered", end, "cli", _TERMINAL),
    ExtraCommand(
        "simulate",
        "what limits would do to a flood",
        simulate,
        "simulate",
        (*_TERMINAL, "plotext"),
    ),
)


def has_click() -> bool:
    """Is there a click that can be used?"""
    try:
        return _is_there("click") and Version(version("click")) >= Version(_OLDEST_CLICK)
    except PackageNotFoundError:
        return False  # somebody has put its files there


def _is_there(package: str) -> bool:
    return find_spec(package) is not None
