"""What a large room costs whose members all come at once, as when partial state becomes whole."""

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harm import FACTOR, Case, Figures, Goal
from synapse_sticky.handlers.joins.detection.reader import JoinReader
from synapse_sticky.handlers.joins.synapse import SynapseFederation
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.homeserver.rooms import Rooms
from tests.lab import Lab
from tests.lab.postgres import Postgres
from tests.unit.members import Changes, World, counts, whole

_MEMBERS = 50_000
_SERVERS = 2_000


@contextmanager
def _garbage_as_in_synapse() -> Iterator[None]:
    """Synapse has switched off that Python collects garbage by itself, and does it now and then.

    Else it would happen here, as the rows were made that the database has by now.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _read(world: World, size: int, newcomers: int) -> Figures:
    """One reading of all of it; so many of a thousand servers are newcomers."""
    members, servers = (n * size // FACTOR for n in (_MEMBERS, _SERVERS))
    with world.process() as process:
        table = NewcomerTable(process)
        world.drive(migrate(process, table))
        changes = Changes(process)
        federation = SynapseFederation(process, Rooms(process))
        told: list[Any] = []
        read = JoinReader(
            process, changes, federation, table, lambda mine, own, until: told.extend(mine)
        )
        new = newcomers * servers // 1_000
        at = whole(world, members, servers, newcomers=new)
        read.start(world.drive(read.stored_position()))
        changes.position = at
        with _garbage_as_in_synapse():
            process.forget()
            read.wake()
            world.take_turns()
        assert len(told) == new
        stored = counts(process)["record_joins"]
        return {
            "SQL": process.sql_s,
            "transactions that read": len(process.transactions) - stored,
            "transactions that store newcomers": stored,
            "the reactor is held": process.most_s * 1_000,
        }


def on_postgres(lab: Lab, size: int, newcomers: int = 0) -> Figures:
    """All members of a room, with so many of a thousand servers newcomers."""
    with tempfile.TemporaryDirectory() as folder, Postgres() as postgres:
        world = World(Path(folder), postgres.new_database())
        try:
            return _read(world, size, newcomers)
        finally:
            world.close()


def on_sqlite(lab: Lab, size: int) -> Figures:
    """The same in a file."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), None)
        try:
            return _read(world, size, 0)
        finally:
            world.close()


def mass_join(lab: Lab, size: int) -> Figures:
    """Every server of the room is a newcomer."""
    return on_postgres(lab, size, 1_000)


_GOALS = {
    "SQL": Goal(2, growth=5, unit="s"),
    "transactions that read": Goal(5, growth=1.5),
    "the reactor is held": Goal(10, growth=1.5, unit="ms"),
}

CASES = (
    Case("members: 50,000 of 2,000 servers come at once, Postgres", on_postgres, _GOALS),
    Case("members: 50,000 of 2,000 servers come at once, SQLite", on_sqlite, _GOALS),
    Case(
        "members: the same, all 2,000 servers are newcomers",
        mass_join,
        {**_GOALS, "transactions that store newcomers": Goal(45, growth=4.4)},
    ),
)
