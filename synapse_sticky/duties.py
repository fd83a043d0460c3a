"""The duties: what each needs of Synapse and of the others, and what users notice without it."""

import importlib
from collections.abc import Mapping
from enum import Enum
from typing import Any

import attr

from synapse_sticky.homeserver.seams import Seam, misfits

_PACKAGE = "synapse_sticky"


class State(Enum):
    """Whether a process does a duty."""

    ON = "on"
    OFF = "off"
    """The configuration says so, a duty that it needs is not on, or it could not be loaded."""
    UNFIT = "unfit"
    """The running Synapse lacks what the duty needs."""
    NATIVE = "native"
    """Synapse does it itself."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Duty:
    """What one duty needs.

    files: the modules of this package that use Synapse's private parts for it.
    without: what users notice while it is not done.
    needs: the duties without which there is nothing to do for it.
    native: what a Synapse has that does this itself; None while that is not known yet.
    """

    name: str
    files: tuple[str, ...]
    without: str
    needs: tuple[str, ...] = ()
    native: Seam | None = None

    def seams(self) -> tuple[Seam, ...]:
        """The seams that its files declare for it.

        Raises:
            ImportError: the running Synapse lacks a name that one of them imports.
        """
        return tuple(dict.fromkeys(s for file in self.files for s in seams_of(file, self.name)))

    def misfits(self) -> list[str]:
        """What the running Synapse lacks, one line each."""
        problems: dict[str, None] = {}
        for file in self.files:
            try:
                problems.update(dict.fromkeys(misfits(seams_of(file, self.name))))
            except Exception as e:
                # A file reads what it imports: a constant that is gone is an AttributeError.
                problems[f"{file} cannot be loaded: {e}"] = None
        return list(problems)

    def is_native(self) -> bool:
        """Does the running Synapse have what it would do this with itself?"""
        return self.native is not None and not misfits([self.native])


def seams_of(file: str, duty: str) -> tuple[Seam, ...]:
    """The seams that a file declares for a duty. Two duties that share a file have their own."""
    module: Any = importlib.import_module(f"{_PACKAGE}.{file}")
    seams: tuple[Seam, ...] | Mapping[str, tuple[Seam, ...]] = module.SEAMS
    return seams[duty] if isinstance(seams, Mapping) else seams


ALL = ("homeserver.process",)
"""What every duty needs."""

_INDEX = ("index.synapse",)
_ROOMS = ("homeserver.rooms",)
_STAGING = ("handlers.staging.synapse", "homeserver.staged")

DUTIES: Mapping[str, Duty] = {
    duty.name: duty
    for duty in (
        Duty("index", _INDEX, "each /sync asks the database for sticky events"),
        Duty(
            "delivery",
            (*_INDEX, "handlers.delivery.synapse"),
            "each /sync asks the database for sticky events, and redacted ones may be in a section",
        ),
        Duty(
            "sliding",
            (*_INDEX, "handlers.sliding.synapse"),
            "users of sliding sync who join a room miss the sticky events of before",
        ),
        Duty(
            "visibility",
            (*_INDEX, *_ROOMS, "handlers.visibility.synapse"),
            "history visibility hides sticky events from joined users and servers",
        ),
        Duty(
            "joins",
            (*_INDEX, *_ROOMS, "handlers.joins.synapse", "handlers.joins.detection.synapse"),
            "servers that newly join a room do not get its sticky events",
            needs=("index",),
        ),
        Duty("pruning", _STAGING, "acknowledged sticky events may be pruned in a flood"),
        Duty(
            "parking",
            (*_STAGING, *_ROOMS),
            "acknowledged sticky events are dropped if they cannot be persisted at once",
        ),
        Duty(
            "receipt",
            ("handlers.receipt.synapse", "homeserver.staged"),
            "no transaction of another server is refused, however many events are deferred",
        ),
        Duty(
            "deferral",
            (*_INDEX, "handlers.deferral.synapse"),
            "a flood of another server delays the sticky events of all others",
        ),
        Duty("sending", ("handlers.sending.synapse",), "local users are not limited"),
        Duty(
            "extremities",
            ("handlers.extremities.synapse",),
            "forward extremities of old sticky events stay for minutes",
            needs=("index",),
        ),
    )
}


def all_seams() -> tuple[Seam, ...]:
    """Every seam that is declared, once.

    Raises:
        ImportError: the running Synapse lacks a name that a file imports.
    """
    shared = (seam for file in ALL for seam in seams_of(file, ""))
    of_duties = (seam for duty in DUTIES.values() for seam in duty.seams())
    return tuple(dict.fromkeys((*shared, *of_duties)))


def shared_misfits() -> list[str]:
    """What all duties need and the running Synapse lacks, one line each."""
    return [problem for file in ALL for problem in misfits(seams_of(file, ""))]
