"""``synapse-sticky drain``: what waits, what stays, and its exit code (E4)."""

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing

import pytest

from synapse_sticky.cli import main
from synapse_sticky.cli.drain import drain
from synapse_sticky.cli.synapse import LAYOUTS
from tests.unit.configuration import Files
from tests.unit.test_check_database import LAYOUTS as LAYOUTS_TABLE
from tests.unit.test_check_database import change, migrate

pytestmark = pytest.mark.requirement("E4")

LATER = int(time.time() * 1000) + 3_000_000
EARLIER = LATER - 4_000_000
NOTHING = "deferred events: 0, parked PDUs: 0, staged sticky PDUs: 0, newcomers that lack events: 0"
DEFERRED = (
    "INSERT INTO synapse_sticky_deferred (event_id, room_id, sender, server, expires_at_ms,"
    " event_stream_ordering) VALUES ('{}', '!a', '@a:there', 'there', {}, 1)"
)
PARKED = (
    "INSERT INTO synapse_sticky_incomplete (origin, event_id, room_id, event_json,"
    " internal_metadata, prev_event_ids, received_ts_ms, until_ms, due_ms)"
    " VALUES ('there', '{}', '!a', '', '', '[]', 0, {}, 0)"
)
STAGED = (
    "INSERT INTO federation_inbound_events_staging"
    " (origin, room_id, event_id, received_ts, event_json, internal_metadata)"
    " VALUES ('there', '!a', '{}', {}, '{}', '{{}}')"
)
STICKY = "INSERT INTO sticky_events VALUES ({}, 'master', '{}', '!a', {}, '{}', {})"
STICKY_JSON = '{"msc4354_sticky":{"duration_ms":1}}'


class Waiting:
    """What is done each time that the command pauses."""

    def __init__(self, *steps: Callable[[], None]) -> None:
        self._steps = [*steps]

    def __call__(self, seconds: float) -> None:
        assert seconds >= 1
        self._steps.pop(0)()


@pytest.fixture
def ready(files: Files) -> Files:
    """The database has all tables."""
    migrate(files.write())
    statements = [s for table in LAYOUTS for of_version in table.migrations for s in of_version]
    # SQLite does not know this of columns.
    change(
        files.database,
        LAYOUTS_TABLE,
        *(s.replace("COLUMN IF NOT EXISTS", "COLUMN") for s in statements),
    )
    return files


def off(files: Files) -> str:
    return files.with_module(federation={"mode": "off"})


def test_nothing_waits(ready: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """What has expired does not."""
    change(
        ready.database,
        DEFERRED.format("$1", EARLIER),
        PARKED.format("$2", EARLIER),
        STAGED.format("$3", LATER, "{}"),
        STAGED.format("$4", EARLIER - 3_600_000, STICKY_JSON),
        STICKY.format(5, "$5", 5, "@a:there", LATER),
        STICKY.format(6, "$6", 6, "@a:here", EARLIER),
    )
    assert main(["drain", "-c", off(ready)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [NOTHING, "Nothing waits any more: the module can be taken out."]
    assert "synapse_sticky_deferred (1)" in said[2]
    assert "synapse_sticky_layouts (0)" in said[2]
    assert "sticky_events has 1 unexpired events" in said[3]


@pytest.mark.parametrize(
    ("statements", "name"),
    [
        ([DEFERRED.format("$1", LATER)], "deferred events"),
        ([PARKED.format("$1", LATER)], "parked PDUs"),
        ([STAGED.format("$1", LATER, STICKY_JSON)], "staged sticky PDUs"),
        (
            [
                "INSERT INTO rooms (room_id) VALUES ('!a')",
                "INSERT INTO synapse_sticky_newcomers VALUES ('there', '!a', 0, 0)",
                "INSERT INTO destination_rooms_sticky_events_backlog VALUES ('there', '!a', 5)",
                "INSERT INTO destination_rooms_sticky_events_backlog VALUES ('other', '!a', 5)",
                STICKY.format(5, "$5", 5, "@a:here", LATER),
                STICKY.format(6, "$6", 6, "@a:there", LATER),
            ],
            "newcomers that lack events",
        ),
    ],
)
def test_something_waits(
    ready: Files, capsys: pytest.CaptureFixture[str], statements: list[str], name: str
) -> None:
    change(ready.database, *statements)
    path = off(ready)
    assert main(["drain", "--once", "-c", path]) == 1
    (said,) = capsys.readouterr().out.splitlines()
    assert said == NOTHING.replace(f"{name}: 0", f"{name}: 1")


def test_a_newcomer_that_lacks_nothing(ready: Files) -> None:
    """What is later than what it has is of another server, or has expired."""
    change(
        ready.database,
        "INSERT INTO rooms (room_id) VALUES ('!a')",
        "INSERT INTO synapse_sticky_newcomers VALUES ('there', '!a', 0, 0)",
        "INSERT INTO destination_rooms_sticky_events_backlog VALUES ('there', '!a', 6)",
        STICKY.format(5, "$5", 5, "@a:here", LATER),
        STICKY.format(6, "$6", 6, "@a:there", LATER),
        STICKY.format(7, "$7", 7, "@a:here", EARLIER),
    )
    assert main(["drain", "--once", "-c", off(ready)]) == 0


def test_it_waits(ready: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """A line each time that something has changed."""
    change(ready.database, *(DEFERRED.format(f"${n}", LATER) for n in range(48)))
    path = off(ready)
    waiting = Waiting(
        lambda: change(ready.database, "DELETE FROM synapse_sticky_deferred WHERE event_id < '$4'"),
        lambda: None,
        lambda: change(ready.database, "DELETE FROM synapse_sticky_deferred"),
    )
    assert drain([path], pause=waiting) == 0
    numbers = [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()[:4]]
    assert numbers[:3] == ["deferred events: 48", "deferred events: 14", "deferred events: 0"]
    assert numbers[3] == "Nothing waits any more: the module can be taken out."


def test_it_is_stopped(
    ready: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    change(ready.database, DEFERRED.format("$1", LATER))
    with pytest.raises(KeyboardInterrupt):
        drain([off(ready)], pause=interrupt)
    assert "Nothing waits any more" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "remark"),
    [
        ({}, "`federation: {mode: defer}` may defer events anew."),
        ({"deferral": {"enabled": False}}, "deferral is off by this configuration."),
        ({"native": ["joins"]}, "joins is off by this configuration."),
        ({"staging": {"keep_sticky": False}}, "parking is off by this configuration."),
    ],
)
def test_why_something_may_wait_for_longer(
    ready: Files,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, object],
    remark: str,
) -> None:
    mode = {} if not config else {"federation": {"mode": "off"}}
    assert main(["drain", "--once", "-c", ready.with_module(**mode, **config)]) == 0
    remarks = [s for s in capsys.readouterr().out.splitlines() if s.startswith("Remark: ")]
    assert len(remarks) == 1
    assert remarks[0].startswith(f"Remark: {remark}")


def test_observing_defers_nothing(ready: Files, capsys: pytest.CaptureFixture[str]) -> None:
    path = ready.with_module(federation={"mode": "observe"})
    assert main(["drain", "--once", "-c", path]) == 0
    assert "Remark: " not in capsys.readouterr().out


def test_the_module_is_not_listed(ready: Files, capsys: pytest.CaptureFixture[str]) -> None:
    change(ready.database, PARKED.format("$1", LATER))
    assert main(["drain", "--once", "-c", ready.write(modules=[])]) == 1
    said = capsys.readouterr().out
    assert "StickyEventsModule is not listed under `modules:`. Nobody does this." in said


def test_tables_that_are_not_there(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """The module has never run."""
    migrate(files.write())
    assert main(["drain", "--once", "-c", off(files)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "staged sticky PDUs: 0"
    assert said[2] == "Of the module these tables stay, with so many rows: none."


def test_it_changes_nothing(ready: Files) -> None:
    change(ready.database, DEFERRED.format("$1", LATER))
    path = off(ready)
    with closing(sqlite3.connect(ready.database)) as connection:
        before = list(connection.iterdump())
        assert main(["drain", "--once", "-c", path]) == 1
        assert list(connection.iterdump()) == before


def test_no_database_yet(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """And none is made."""
    assert main(["drain", "-c", off(files)]) == 2
    assert not files.database.exists()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "synapse-sticky drain itself failed: FileNotFoundError: there is no database yet"


def test_a_wrong_configuration(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drain", "-c", files.with_module(federation={"mode": "no"})]) == 2
    assert "synapse-sticky drain itself failed: ConfigError: " in capsys.readouterr().err
