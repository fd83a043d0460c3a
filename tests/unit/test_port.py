"""SQLite to Postgres by ``synapse_port_db``: with the module's tables, and by the documented recipe
(E2, E4)."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attr
import psycopg2
import pytest
from synapse.storage.engines import IncorrectDatabaseSetup

from synapse_sticky.cli import main
from synapse_sticky.cli.synapse import LAYOUTS
from synapse_sticky.homeserver.layout import LAYOUTS_TABLE, migrate, tables_of
from tests.lab.postgres import Postgres, Settings, change_in, query_in
from tests.unit.configuration import Files
from tests.unit.members import World
from tests.unit.test_boundaries import ROOT

pytestmark = pytest.mark.requirement("E2", "E4")

HOUR_MS = 3_600_000
OWN_TABLES = [name for table in LAYOUTS for name in tables_of(table.migrations)]
ROWS: dict[str, dict[str, object]] = {
    "synapse_sticky_deferred": {
        "event_id": "$1",
        "room_id": "!a",
        "sender": "@a:there",
        "server": "there",
        "expires_at_ms": 2_000_000_000_000,
        "event_stream_ordering": 7,
        "sticky_key": -5,
        "past_limit": "per_sender",
        "deferred_ms": 1,
    },
    "synapse_sticky_newcomers": {
        "destination": "there",
        "room_id": "!a",
        "position": 3,
        "watch_until_ms": 2_000_000_000_000,
    },
    "synapse_sticky_state_positions": {
        "instance_name": "master",
        "position": 9,
        "updated_ts_ms": 1,
    },
    "synapse_sticky_pages": {
        "user_id": "@a:here",
        "device_id": "D",
        "connection": "",
        "token": "s1",
        "older": "[]",
        "noted_ts_ms": 1,
    },
    "synapse_sticky_incomplete": {
        "origin": "there",
        "event_id": "$2",
        "room_id": "!a",
        "event_json": "{}",
        "internal_metadata": "{}",
        "prev_event_ids": "[]",
        "received_ts_ms": 1,
        "until_ms": 2,
        "due_ms": 3,
        "tries": 2,
        "reason": "its prev_events cannot be fetched",
    },
    "synapse_sticky_actions": {
        "action_id": "a",
        "kind": "hold",
        "server": "there",
        "reason": "",
        "made_by": "@admin:here",
        "made_ms": 1,
        "until_ms": 2_000_000_000_000,
    },
}
"""Something in each."""
LAST_ROW, POSITION = 40, 55
"""Of the sticky events stream. The rows between were deleted, as Synapse does once they expire."""


def recipe() -> str:
    """The first SQL of docs/database.md."""
    page = (ROOT / "docs/database.md").read_text()
    first, _ = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
    return str(first)


@attr.s(auto_attribs=True)
class Moved:
    """A homeserver's SQLite, and an empty Postgres."""

    files: Files
    postgres: Settings

    @property
    def path(self) -> str:
        return self.files.write(database=self.postgres)

    def port(self) -> None:
        script = Path(sys.executable).with_name("synapse_port_db")
        databases = ("--sqlite-database", self.files.database, "--postgres-config", self.path)
        run = subprocess.run(
            [script, *databases], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert run.returncode == 0, run.stderr[-4000:]

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        return query_in(self.postgres, sql)


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A database that Synapse and the module have used."""
    folder = tmp_path_factory.mktemp("port")
    world = World(folder, None)
    with world.process() as process:
        for table in LAYOUTS:
            kind: type = table
            world.drive(migrate(process, kind(process)))
    for name, row in ROWS.items():
        values = ", ".join("?" * len(row))
        world.execute(f"INSERT INTO {name} ({', '.join(row)}) VALUES ({values})", *row.values())
    now_ms = int(time.time() * 1000)
    for number in range(2, LAST_ROW + 1):
        world.execute(
            "INSERT INTO sticky_events VALUES (?, 'master', ?, '!a', ?, '@a:there', ?)",
            *(number, f"${number}", number, now_ms + HOUR_MS),
        )
    world.execute("INSERT INTO stream_positions VALUES ('sticky_events', 'master', ?)", POSITION)
    # They take Synapse a minute.
    world.execute("DELETE FROM background_updates")
    world.close()
    return Files(folder)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as started:
        yield started


@pytest.fixture
def moved(sqlite: Files, postgres: Postgres) -> Moved:
    return Moved(sqlite, postgres.new_database())


def position_after_start(moved: Moved) -> int:
    """Where the sticky events stream goes on."""
    world = World(moved.files.folder, moved.postgres)
    token = world.store.get_sticky_events_stream_token()
    world.close()
    return int(token.stream)


def rows_of(moved: Moved) -> dict[str, dict[str, object]]:
    """What is there now of ``ROWS``."""
    found = {}
    for name, row in ROWS.items():
        (values,) = moved.query(f"SELECT {', '.join(row)} FROM {name}")
        found[name] = dict(zip(row, values, strict=True))
    return found


@pytest.mark.slow
def test_by_the_recipe(moved: Moved, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate-tables", "-c", moved.path]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{table.duty}: its tables are made." for table in LAYOUTS]
    assert main(["migrate-tables", "-c", moved.path]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{table.duty}: its tables were there." for table in LAYOUTS]
    moved.port()
    assert rows_of(moved) == ROWS
    assert len(moved.query(f"SELECT * FROM {LAYOUTS_TABLE}")) == len(LAYOUTS)
    change_in(moved.postgres, recipe())
    assert position_after_start(moved) == POSITION
    # What came along waits here, too.
    assert main(["drain", "--once", "-c", moved.path]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("deferred events: 1, parked PDUs: 0, staged sticky PDUs: 0, ")


@pytest.mark.slow
def test_without_the_recipe(moved: Moved) -> None:
    """What is done about in the page is so. Should Synapse mend it, the recipe does no harm."""
    moved.port()
    assert all(name not in tables_in(moved) for name in OWN_TABLES)
    with pytest.raises(IncorrectDatabaseSetup, match="sticky_events"):
        position_after_start(moved)


@pytest.mark.slow
def test_the_order_was_wrong(moved: Moved, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said, and what to do about it is true."""
    moved.port()
    assert main(["migrate-tables", "-c", moved.path]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{LAST_ROW - 1} unexpired sticky events of other servers were there")
    assert "run synapse_port_db once more" in last
    moved.port()
    assert rows_of(moved) == ROWS
    change_in(moved.postgres, recipe())
    assert position_after_start(moved) == POSITION


def tables_in(moved: Moved) -> set[str]:
    return {name for (name,) in moved.query("SELECT tablename FROM pg_tables")}


@pytest.mark.parametrize(
    ("rows", "position", "last"), [(40, 55, 55), (55, 40, 55), (None, 40, 40), (None, None, 1)]
)
def test_the_recipe_takes_the_greater_one(
    moved: Moved, rows: int | None, position: int | None, last: int
) -> None:
    """Also where there are no rows, or no positions."""
    change_in(
        moved.postgres,
        "CREATE SEQUENCE sticky_events_sequence",
        "CREATE TABLE sticky_events (stream_id BIGINT)",
        "CREATE TABLE stream_positions (stream_name TEXT, stream_id BIGINT)",
        "INSERT INTO stream_positions VALUES ('events', 1000)",
        *([f"INSERT INTO sticky_events VALUES ({rows})"] if rows else []),
        *(
            [f"INSERT INTO stream_positions VALUES ('sticky_events', {position})"]
            if position
            else []
        ),
        recipe(),
    )
    assert moved.query("SELECT nextval('sticky_events_sequence')") == [(last + 1,)]


def test_the_configuration_has_sqlite(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the two configurations that a move has, it is the wrong one."""
    assert main(["migrate-tables", "-c", files.write()]) == 2
    assert not files.database.exists()
    assert "The configuration has SQLite" in capsys.readouterr().err


def test_a_role_that_may_not_make_tables(
    files: Files, postgres: Postgres, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = postgres.new_database_of_a_role()
    admin = postgres.as_admin(settings)
    change_in(admin, f"REVOKE CREATE ON SCHEMA public FROM {settings['args']['user']}")
    assert main(["migrate-tables", "-c", files.write(database=settings)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "migrate-tables itself failed: InsufficientPrivilege: permission denied" in said
    with pytest.raises(psycopg2.errors.UndefinedTable):
        query_in(admin, f"SELECT * FROM {LAYOUTS_TABLE}")
