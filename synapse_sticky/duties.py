"""The duties: what each needs of Synapse and of the others, and what users notice without it."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import attr

from synapse_sticky.homeserver import (
    access,
    changed,
    database,
    remaining,
    retention,
    schema,
    unignored,
)
from synapse_sticky.homeserver.fitting import Columns, misfits
from synapse_sticky.homeserver.place import Place
from synapse_sticky.homeserver.seams import Seam, Table, imports_of

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
class Part:
    """A part of a duty, which is done whether or not the duty's others fit.

    files: the modules of this package that use Synapse's private parts for it; ``file:part`` for
        one part of those that a file declares.
    without: what users notice while it is not done.
    name: empty if it is all of the duty.
    option: the attribute of the configuration that says whether it is wanted; it always is if this
        is empty.
    """

    files: tuple[str, ...]
    without: str
    name: str = ""
    option: str = ""

    def seams(self) -> tuple[Seam, ...]:
        """The seams that its files declare for it.

        Raises:
            ImportError: the running Synapse lacks a name that one of them imports.
        """
        return tuple(dict.fromkeys(s for file in self.files for s in seams_of(file)))

    def misfits(self, columns: Columns | None = None) -> list[str]:
        """What the running Synapse and its database lack, one line each.

        Args:
            columns: those of the database; None if they are not known.
        """
        problems: dict[str, None] = {}
        for file in self.files:
            try:
                problems.update(dict.fromkeys(misfits(seams_of(file), columns)))
            except Exception as e:
                # A file reads what it imports: a constant that is gone is an AttributeError.
                problems[f"{file} cannot be loaded: {e}"] = None
        return list(problems)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Duty:
    """What one duty needs.

    where: tells of a process whether the duty is done there.
    needs: the duties without which there is nothing to do for it.
    native: what a Synapse has that does this itself, an attribute, a table or an option; None while
        that is not known yet.
    """

    name: str
    parts: tuple[Part, ...]
    where: Callable[[Place], bool]
    needs: tuple[str, ...] = ()
    native: Seam | None = None

    def seams(self) -> tuple[Seam, ...]:
        """The seams of all of its parts.

        Raises:
            ImportError: the running Synapse lacks a name that a file imports.
        """
        return tuple(dict.fromkeys(seam for part in self.parts for seam in part.seams()))

    def misfits(self, columns: Columns | None = None) -> list[str]:
        """What the running Synapse and its database lack for any of its parts, one line each."""
        found = (problem for part in self.parts for problem in part.misfits(columns))
        return list(dict.fromkeys(found))

    def is_native(self, columns: Columns | None = None) -> bool:
        """Does the running Synapse have what it would do this with itself?"""
        if self.native is None or (columns is None and isinstance(self.native, Table)):
            return False
        return not misfits([self.native], columns)


def seams_of(file: str) -> tuple[Seam, ...]:
    """The seams of a file of this package, or of ``file:part``: those that it declares, and what it
    imports.

    Raises:
        ImportError: the running Synapse lacks a name that it imports.
    """
    path, _, part = file.partition(":")
    module: Any = importlib.import_module(f"{_PACKAGE}.{path}")
    seams: Any = getattr(module, "SEAMS", ())
    return (*(seams[part] if part else seams), *imports_of(module))


ALL = ("homeserver.process", "homeserver.place", "homeserver.signal")
"""What every duty needs."""

CHECK = "cli.synapse"
"""What ``synapse-sticky check`` needs to read a configuration."""

ADMIN = (
    *("admin.listeners.synapse", "admin.events.synapse", "admin.rooms.synapse"),
    *("homeserver.rooms:servers", "homeserver.rooms:members"),
)
"""What the API for administrators needs."""

_PLACES = "homeserver.sticky_rows"
_ROWS = (_PLACES, "index.synapse:rows")
_OPTIONAL = (
    "homeserver.whole:events",
    "homeserver.whole:users",
    "index.synapse:persisted",
    "index.redactions.synapse:bans",
    "index.redactions.synapse:erasure",
    "index.cut_short.synapse",
)
"""What duties make use of where it fits, and do without where it does not."""
_PURGES = "index.synapse:purges"
_RECEIVED = "homeserver.received"
_CHANGES = ("homeserver.stream", "index.synapse:changes", _PURGES)
_INDEX = (*_ROWS, *_CHANGES, "index.synapse:stream")
_MEMBERS = "homeserver.rooms:members"
_SERVERS = (_MEMBERS, "homeserver.rooms:servers", "homeserver.rooms:erased")
_SENDING = "handlers.sending.synapse"
_STAGING = "handlers.staging"


def _everywhere(place: Place) -> bool:
    return True


def _serves_clients(place: Place) -> bool:
    return place.serves("client")


def _whole(
    name: str,
    files: tuple[str, ...],
    without: str,
    where: Callable[[Place], bool],
    needs: tuple[str, ...] = (),
) -> Duty:
    """A duty of one part."""
    return Duty(name, (Part(files, without),), where, needs)


DUTIES: Mapping[str, Duty] = {
    duty.name: duty
    for duty in (
        _whole("index", _INDEX, "each /sync asks the database for sticky events", _everywhere),
        Duty(
            "delivery",
            (
                Part(
                    ("homeserver.tokens", "handlers.delivery.synapse"),
                    "each /sync asks the database for sticky events",
                ),
                Part(
                    (*_ROWS, "handlers.delivery.ttl.synapse"),
                    "clients show events that are dated ahead, or not kept, as sticky for longer",
                    "ttl",
                ),
            ),
            _everywhere,
        ),
        _whole(
            "sliding",
            (
                *("homeserver.tokens", "handlers.sliding.synapse"),
                "handlers.sliding.joined.synapse",
            ),
            "users of sliding sync who join a room miss the sticky events of before",
            _serves_clients,
        ),
        _whole(
            "visibility",
            (*_ROWS, *_SERVERS, "homeserver.rooms:users", "handlers.visibility.synapse"),
            "history visibility hides sticky events from joined users and servers",
            _everywhere,
        ),
        _whole(
            "joins",
            (
                *(*_INDEX, *_SERVERS, "handlers.joins.synapse", "handlers.joins.backlog.synapse"),
                *("handlers.joins.detection.synapse", "handlers.joins.confirmation.synapse"),
                "handlers.joins.whitelist.synapse",
            ),
            "servers that newly join a room do not get its sticky events",
            lambda place: place.sends,
            needs=("index",),
        ),
        Duty(
            "pruning",
            (
                Part(
                    (f"{_STAGING}.pruning.synapse",),
                    "acknowledged sticky events may be pruned in a flood",
                ),
                Part(
                    (f"{_STAGING}.turns.synapse",),
                    "a flood that is staged delays what other servers send later",
                    "turns",
                ),
            ),
            _everywhere,
        ),
        Duty(
            "parking",
            (
                Part(
                    (
                        *(_MEMBERS, _PURGES, "homeserver.staged", _RECEIVED),
                        *(f"{_STAGING}.parking.synapse", f"{_STAGING}.batches.synapse"),
                        f"{_STAGING}.parking.origins.synapse",
                    ),
                    "acknowledged sticky events are dropped if they cannot be persisted at once",
                ),
                Part(
                    (f"{_STAGING}.received.synapse", _RECEIVED),
                    "an event that is dated ahead counts from when it could be persisted",
                    "received",
                ),
                Part(
                    (f"{_STAGING}.first_joins.synapse",),
                    "sticky events for a room that is joined for the first time may be dropped",
                    "first_joins",
                ),
            ),
            _everywhere,
        ),
        _whole(
            "receipt",
            ("handlers.receipt.synapse", "homeserver.staged"),
            "no transaction of another server is refused, however many events are deferred",
            lambda place: place.serves("federation"),
        ),
        _whole(
            "deferral",
            (*_CHANGES, _PLACES, _RECEIVED, "handlers.deferral.synapse"),
            "a flood of another server delays the sticky events of all others",
            lambda place: place.writes,
        ),
        Duty(
            "sending",
            (
                Part(
                    (f"{_SENDING}:limit",),
                    "local users are not limited",
                    "limit",
                    option="limits_local_users",
                ),
                Part(
                    (f"{_SENDING}:parameter",),
                    "a wrong parameter for stickiness gets Synapse's own error",
                    "parameter",
                ),
                Part(
                    (f"{_SENDING}:state_events",),
                    "`state_events` has no effect",
                    "state_events",
                    option="state_events",
                ),
            ),
            _serves_clients,
        ),
        _whole(
            "extremities",
            ("handlers.extremities.synapse",),
            "forward extremities of old sticky events stay for minutes",
            lambda place: place.merges,
            needs=("index",),
        ),
    )
}


def all_seams() -> tuple[Seam, ...]:
    """Every seam, once.

    Raises:
        ImportError: the running Synapse lacks a name that a file imports.
    """
    return tuple(dict.fromkeys(_every_seam()))


def _every_seam() -> Iterator[Seam]:
    for file in ALL:
        yield from seams_of(file)
    yield from database.SEAMS
    yield from schema.SEAMS
    yield from changed.SEAMS
    yield from remaining.SEAMS
    yield from unignored.SEAMS
    yield from retention.SEAMS
    for file in (*_OPTIONAL, CHECK, *ADMIN):
        yield from seams_of(file)
    for layer in access.SEAMS.values():
        yield from layer
    for duty in DUTIES.values():
        yield from duty.seams()
        for part in duty.parts:
            yield from part.seams()


def number_of_seams() -> int:
    """How many private parts of Synapse are used, each counted once.

    Raises:
        ImportError: the running Synapse lacks a name that a file imports.
    """
    return len({(seam.owner, seam.name) for seam in all_seams()})


def shared_misfits() -> list[str]:
    """What all duties need and the running Synapse lacks, one line each."""
    return [problem for file in ALL for problem in misfits(seams_of(file))]
