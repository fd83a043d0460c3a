"""``synapse-sticky simulate --database``: what a homeserver persisted, only read (E3)."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import attr
import pytest

from synapse_sticky.cli import main
from tests.lab.postgres import Postgres, Settings, cursor_in
from tests.unit.configuration import Files
from tests.unit.test_check_database import migrate
from tests.unit.test_limits import NOW_MS
from tests.unit.test_simulate import simulated

pytestmark = pytest.mark.requirement("E3")

EVENT = (
    "INSERT INTO events (stream_ordering, topological_ordering, event_id, type, room_id, processed,"
    " outlier, depth, origin_server_ts, received_ts, sender, rejection_reason)"
    " VALUES (?, 1, ?, 'm.rtc.member', '!room', ?, ?, 1, ?, ?, '@mallory:there', ?)"
)
JSON = (
    "INSERT INTO event_json (event_id, room_id, internal_metadata, json) VALUES (?, '!room', ?, ?)"
)
STICKY = {"duration_ms": 3_600_000}
SPAN = ("--since", str(NOW_MS), "--until", str(NOW_MS + 1_000))


@attr.s(auto_attribs=True)
class Database:
    """A homeserver's database with Synapse's tables.

    path: of its homeserver.yaml.
    owner: who may write, if that is not who the homeserver is.
    """

    path: str
    file: Path
    owner: Settings | None

    def execute(self, sql: str, *args: object) -> None:
        if self.owner is not None:
            with cursor_in(self.owner) as cursor:
                cursor.execute(sql.replace("?", "%s"), args)
            return
        with closing(sqlite3.connect(self.file)) as connection, connection:
            connection.execute(sql, args)

    def persist(
        self,
        number: int,
        *,
        outlier: bool = False,
        rejected: str | None = None,
        soft_failed: bool = False,
        field: object = STICKY,
        ago_ms: int = 0,
    ) -> None:
        """An event came so many ms after ``NOW_MS``, or earlier."""
        at_ms = NOW_MS + number - ago_ms
        event_id = f"$event{number}"
        event = {"content": {"msc4354_sticky_key": "secret"}, "msc4354_sticky": field}
        self.execute(EVENT, number, event_id, True, outlier, at_ms, at_ms, rejected)
        metadata = {"soft_failed": True} if soft_failed else {}
        self.execute(JSON, event_id, json.dumps(metadata), json.dumps(event))


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, files: Files) -> Iterator[Database]:
    """In Postgres the homeserver may do nothing but read two tables."""
    if request.param == "sqlite":
        path = files.write()
        migrate(path)
        yield Database(path, files.database, None)
        return
    with Postgres() as postgres:
        settings = postgres.new_database_of_a_role()
        owner = postgres.as_admin(settings)
        migrate(files.write(database=owner))
        made = Database(files.write(database=settings), files.database, owner)
        made.execute(f"GRANT SELECT ON events, event_json TO {settings['args']['user']}")
        yield made


def test_what_came_is_played(
    database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(1, 101):
        database.persist(number)
    database.persist(101, outlier=True)
    database.persist(102, rejected="auth_error")
    database.persist(103, soft_failed=True)
    database.persist(104, field=None)
    database.persist(105, field={"duration_ms": "an hour"})
    database.persist(106, ago_ms=86_400_000)
    database.persist(1_107)
    before = database.file.read_bytes() if database.owner is None else b""
    saved = tmp_path / "flood.jsonl"
    given = ("--database", database.path, "--save-arrivals", str(saved), *SPAN)
    found: dict[str, Any] = simulated(capsys, *given)
    assert found["server_name"] == "here"
    each = found["configurations"]["defaults"]["each"]
    assert [one["event_id"] for one in each] == [f"$event{n}" for n in range(1, 101)]
    assert [one["arrived_ms"] for one in each] == [NOW_MS + n for n in range(1, 101)]
    assert [one["fate"] for one in each] == ["now"] * 60 + ["later"] * 40
    assert database.owner is not None or database.file.read_bytes() == before
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert len({line["key"] for line in lines}) == 1
    assert lines[0]["key"] is not None
    assert "secret" not in saved.read_text()


def test_nothing_came(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--database", database.path, *SPAN]) == 2
    assert "nothing to play" in capsys.readouterr().err


@pytest.mark.requirement("H3")
def test_more_than_is_looked_at(
    database: Database, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they are sticky or not."""
    monkeypatch.setattr("synapse_sticky.cli.simulate.synapse._MOST", 10)
    for number in range(1, 11):
        database.persist(number, field=STICKY if number == 1 else None, outlier=number > 5)
    assert main(["simulate", "--database", database.path, *SPAN]) == 0
    database.persist(11, field=None)
    assert main(["simulate", "--database", database.path, *SPAN]) == 2
    assert "Give a shorter time" in capsys.readouterr().err


@pytest.mark.requirement("H3")
def test_the_index_is_used(files: Files) -> None:
    """A span of a large database is not looked for in all of it."""
    from synapse_sticky.cli.simulate.synapse import _EVENTS, _JSON

    migrate(files.write())
    with closing(sqlite3.connect(files.database)) as connection:

        def plan(query: str, *args: object) -> list[str]:
            found = connection.execute(f"EXPLAIN QUERY PLAN {query}", args)
            return [str(step) for *_, step in found]

        (step,) = plan(_EVENTS, 1, 2, 3)
        assert step.startswith("SEARCH events USING INDEX events_ts")
        (step,) = plan(f"{_JSON} (?, ?)", "%a%", "$a", "$b")
        assert step.startswith("SEARCH event_json USING INDEX")
