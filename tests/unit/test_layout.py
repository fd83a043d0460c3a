"""The module's tables are made; and it is said if they should have been there (E4)."""

import logging
from collections.abc import Iterator
from importlib import import_module

import pytest

from synapse_sticky.cli.synapse import LAYOUTS
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.homeserver.layout import (
    LAYOUTS_TABLE,
    HasLayout,
    Migrations,
    migrate,
    tables_of,
)
from tests.unit.members import ThisProcess, World
from tests.unit.test_boundaries import ROOT

pytestmark = pytest.mark.requirement("E4")

HOUR_MS = 3_600_000
NOTHING = "At the first start with this module that is as it should be."


@pytest.fixture
def empty(world: World) -> Iterator[World]:
    """A database without tables of the module, and without sticky events."""
    for table in LAYOUTS:
        for name in tables_of(table.migrations):
            world.execute(f"DROP TABLE IF EXISTS {name}")
    world.execute(f"DROP TABLE IF EXISTS {LAYOUTS_TABLE}")
    world.execute("DELETE FROM sticky_events")
    yield world
    world.execute("DELETE FROM sticky_events")


def put_sticky(world: World, number: int, sender: str, expires_at_ms: int) -> None:
    world.execute(
        "INSERT INTO sticky_events (stream_id, instance_name, event_id, room_id,"
        " event_stream_ordering, sender, expires_at) VALUES (?, 'master', ?, '!a', ?, ?, ?)",
        *(number, f"${number}", number, sender, expires_at_ms),
    )


def all_tables(process: ThisProcess) -> list[HasLayout]:
    made: list[HasLayout] = []
    for table in LAYOUTS:
        kind: type = table
        made.append(kind(process))
    return made


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The module's own."""
    own = [r for r in caplog.records if r.name.startswith("synapse_sticky")]
    return [r.getMessage() for r in own if r.levelno >= logging.WARNING]


def test_no_table_is_left_out() -> None:
    """What the commands and the start say is of all tables, as is the page."""
    files = [path.relative_to(ROOT) for path in ROOT.glob("synapse_sticky/**/tables.py")]
    modules = [import_module(".".join(path.with_suffix("").parts)) for path in files]
    found = {c for m in modules for c in vars(m).values() if hasattr(c, "migrations")}
    assert found == {*LAYOUTS}
    page = (ROOT / "docs/database.md").read_text()
    _, _, dropped = page.partition("`DROP TABLE ")
    for name in [*(name for t in LAYOUTS for name in tables_of(t.migrations)), LAYOUTS_TABLE]:
        assert f"| `{name}` |" in page
        assert name in dropped.partition("`")[0]


def test_made_beside_sticky_events_of_other_servers(
    empty: World, process: ThisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """As after the database was copied without them. Each duty says once what is missing."""
    now_ms = empty.now_ms()
    for number in range(5):
        put_sticky(empty, number + 2, "@a:there", now_ms + HOUR_MS)
    put_sticky(empty, 8, "@a:there", now_ms)
    put_sticky(empty, 9, "@a:here", now_ms + HOUR_MS)
    tables = all_tables(process)
    for _ in range(2):
        for table in tables:
            empty.drive(migrate(process, table))
    said = warnings_of(caplog)
    # Nobody can have left behind what no version before had.
    told_of = [table for table in tables if table.contents]
    assert len(said) == len(told_of) == len(tables) - 2
    for line, table in zip(said, told_of, strict=True):
        assert line.startswith(f"The tables of {table.duty} are new, beside 5 unexpired ")
        assert NOTHING in line
        assert line.endswith(table.contents)


def test_made_where_nothing_can_be_missing(
    empty: World, process: ThisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """What has expired is of no interest, and own events are neither deferred nor parked."""
    put_sticky(empty, 8, "@a:there", empty.now_ms())
    put_sticky(empty, 9, "@a:here", empty.now_ms() + HOUR_MS)
    for table in all_tables(process):
        empty.drive(migrate(process, table))
    assert warnings_of(caplog) == []


def test_that_it_cannot_be_known_keeps_no_duty_off(
    empty: World, process: ThisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    process.failing = "of_others"
    table = DeferredTable(process)
    empty.drive(migrate(process, table))
    assert warnings_of(caplog) == []
    assert empty.drive(table.page("")) == []


def test_a_copy_that_lacks_some_tables(
    empty: World, process: ThisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """The layout's version was copied, and says that they are there."""
    table = NewcomerTable(process)
    empty.drive(migrate(process, table))
    empty.execute("INSERT INTO synapse_sticky_newcomers VALUES ('there', '!a', 0, 0)")
    empty.execute("DROP TABLE synapse_sticky_state_positions")
    put_sticky(empty, 2, "@a:there", empty.now_ms() + HOUR_MS)
    empty.drive(migrate(process, table))
    assert len(empty.drive(table.newcomers())) == 1
    assert empty.drive(table.state_position(5)) == 5
    (line,) = warnings_of(caplog)
    assert line.startswith("The tables of joins are new")


def test_tables_of_version_0_1_0_are_not_new(
    empty: World, process: ThisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    table = DeferredTable(process)
    for statement in table.migrations[0]:
        empty.execute(statement)
    put_sticky(empty, 2, "@a:there", empty.now_ms() + HOUR_MS)
    empty.drive(migrate(process, table))
    assert warnings_of(caplog) == []


class Extended(NewcomerTable):
    """A later version of the module has one more table."""

    migrations: Migrations = (
        *NewcomerTable.migrations,
        ("CREATE TABLE IF NOT EXISTS synapse_sticky_later (room_id TEXT NOT NULL)",),
    )


def test_a_later_version_with_one_more_table(
    empty: World, process: ThisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody can have left that behind."""
    empty.drive(migrate(process, NewcomerTable(process)))
    put_sticky(empty, 2, "@a:there", empty.now_ms() + HOUR_MS)
    table = Extended(process)
    empty.drive(migrate(process, table))
    assert warnings_of(caplog) == []
    assert empty.execute("SELECT * FROM synapse_sticky_later") == []
    empty.execute("DROP TABLE synapse_sticky_later")
    empty.drive(migrate(process, table))
    (line,) = warnings_of(caplog)
    assert line.startswith("The tables of joins are new")
    assert empty.execute("SELECT * FROM synapse_sticky_later") == []
    empty.execute("DROP TABLE synapse_sticky_later")
