"""What ``synapse-sticky check`` says of the database, and that a start finds it so."""

import inspect
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import attr
import pytest
from psycopg2.errors import InsufficientPrivilege
from synapse.config.homeserver import HomeServerConfig
from synapse.storage.prepare_database import PrepareDatabaseException, prepare_database
from synapse.storage.schema import SCHEMA_VERSION

from synapse_sticky.cli.check import look
from synapse_sticky.duties import State
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.sliding.tables import PageTable
from synapse_sticky.homeserver import database as synapse_database
from synapse_sticky.homeserver import schema
from synapse_sticky.homeserver.fitting import resolve
from synapse_sticky.homeserver.seams import Method, Seam, Table
from tests.lab.postgres import Postgres, Settings, change_in
from tests.mutations import added, changed, put, stand_in
from tests.unit.configuration import Files
from tests.unit.test_check import start

pytestmark = pytest.mark.requirement("H5")

LAYOUTS = (
    "CREATE TABLE synapse_sticky_layouts (duty TEXT NOT NULL PRIMARY KEY, version BIGINT NOT NULL)"
)
TO_BE_MIGRATED = "Synapse has not made or migrated its tables in this database yet."


def change(database: Path, *statements: str) -> None:
    with closing(sqlite3.connect(database)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def test_a_later_layout(files: Files) -> None:
    path = files.write()
    change(
        files.database,
        LAYOUTS,
        "INSERT INTO synapse_sticky_layouts VALUES ('parking', 1), ('joins', 99)",
    )
    report = look([path])
    (problem,) = report.problems
    assert problem.startswith("joins would be off: the tables of joins have layout 99")
    assert report.exit_code() == 1


@pytest.mark.parametrize("off", [{"native": ["deferral"]}, {"deferral": {"enabled": False}}])
def test_the_tables_of_a_duty_that_does_not_run(files: Files, off: dict[str, object]) -> None:
    """A start does not look at them, but for receipt, which counts what is deferred."""
    change(files.database, LAYOUTS, "INSERT INTO synapse_sticky_layouts VALUES ('deferral', 99)")
    (problem,) = look([files.with_module(**off)]).problems
    assert problem.startswith("receipt would count staged events only, not deferred ones: ")
    report = look([files.with_module(**off, receipt={"enabled": False})])
    assert (report.problems, report.exit_code()) == ([], 0)


def test_the_tables_of_a_duty_that_runs_where_no_file_was_given_of(files: Files) -> None:
    path = files.write(federation_sender_instances=["sender"])
    change(files.database, LAYOUTS, "INSERT INTO synapse_sticky_layouts VALUES ('joins', 99)")
    (problem,) = look([path]).problems
    assert problem.startswith("joins would be off: ")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_database_that_is_still_empty(files: Files, is_there: bool) -> None:
    path = files.write()
    if is_there:
        change(files.database, LAYOUTS)
    report = look([path])
    assert {decision.state for decision in report.decisions().values()} == {State.ON}
    (remark,) = report.remarks
    assert TO_BE_MIGRATED in remark
    assert f"Remark: {remark}" in list(report.lines())
    assert (report.problems, report.exit_code()) == ([], 0)


def migrate(path: str) -> HomeServerConfig:
    """Makes Synapse's tables in the database, as its start does."""
    config = HomeServerConfig.load_config("start", ["-c", path])
    with closing(synapse_database.connect(config, "test")) as connection:
        prepare_database(connection, connection.engine, config)
    return config


def migrates(config: HomeServerConfig, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Does Synapse have anything to make or change? A worker refuses to start then."""
    monkeypatch.setattr(config.worker, "worker_app", "synapse.app.generic_worker")
    with closing(synapse_database.connect(config, "test")) as connection:
        try:
            prepare_database(connection, connection.engine, config)
        except PrepareDatabaseException:
            return True
    return False


LAST = f"(SELECT MAX(file) FROM applied_schema_deltas WHERE version = {SCHEMA_VERSION})"


@pytest.mark.parametrize(
    ("statements", "is_to_be_migrated"),
    [
        ([], False),
        ([f"UPDATE schema_version SET version = {SCHEMA_VERSION - 1}"], True),
        (["DELETE FROM schema_version"], True),
        ([f"DELETE FROM applied_schema_deltas WHERE file = {LAST}"], True),
        # Made in this version, and not by a change of an older one's tables.
        (
            ["DELETE FROM applied_schema_deltas", "UPDATE schema_version SET upgraded = FALSE"],
            False,
        ),
        # Of a later Synapse, which this one may work with.
        ([f"UPDATE schema_version SET version = {SCHEMA_VERSION + 1}"], False),
    ],
)
def test_a_database_that_synapse_migrates_when_it_starts(
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    statements: list[str],
    is_to_be_migrated: bool,
) -> None:
    """Its tables are as they will be only afterwards."""
    path = files.write()
    config = migrate(path)
    change(files.database, *statements, "DROP TABLE sticky_events")
    report = look([path])
    assert [TO_BE_MIGRATED in remark for remark in report.remarks] == [True] * is_to_be_migrated
    misfits = report.duties["index"].misfits
    assert ("table sticky_events is not there" in misfits) is not is_to_be_migrated
    assert report.exit_code() == (0 if is_to_be_migrated else 1)
    assert migrates(config, monkeypatch) is is_to_be_migrated


@pytest.mark.usefixtures("restored")
def test_a_migrated_database_that_does_not_fit(files: Files) -> None:
    """The start finds the same."""
    path = files.write()
    migrate(path)
    assert (look([path]).remarks, look([path]).exit_code()) == ([], 0)
    change(files.database, "ALTER TABLE room_ban_redactions RENAME COLUMN user_id TO other")
    report = look([path])
    unfit = {name for name, decision in report.duties.items() if decision.state is State.UNFIT}
    (module,) = start(path)
    started = module._wiring.states
    assert unfit == {name for name, state in started.items() if state is State.UNFIT} != set()
    assert (report.remarks, report.problems, report.exit_code()) == ([], [], 1)


@pytest.mark.parametrize("seam", schema.SEAMS, ids=str)
def test_synapse_migrates_in_another_way(
    files: Files, monkeypatch: pytest.MonkeyPatch, seam: Seam
) -> None:
    """Then it cannot be known whether the tables are as they will be."""
    path = files.write()
    migrate(path)
    if isinstance(seam, Table):
        change(files.database, f"ALTER TABLE {seam.name} RENAME COLUMN version TO edition")
    else:
        put(monkeypatch, seam.owner, stand_in(resolve(seam.owner), seam.name))
    report = look([path])
    (problem,) = report.problems
    assert "cannot know whether this Synapse has yet to migrate the database" in problem
    assert {decision.state for decision in report.decisions().values()} == {State.ON}
    assert (report.remarks, report.exit_code()) == ([], 1)


def test_a_table_that_synapse_no_longer_makes(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is there still: the start of that Synapse would drop it."""
    path = files.write()
    migrate(path)
    change(files.database, f"UPDATE schema_version SET version = {SCHEMA_VERSION - 1}")
    columns = synapse_database.new_columns()
    monkeypatch.setattr(
        synapse_database,
        "new_columns",
        lambda: {name: found for name, found in columns.items() if name != "sticky_events"},
    )
    for report in look([]), look([path]):
        assert "table sticky_events is not there" in report.duties["index"].misfits
        assert report.exit_code() == 1


def test_a_database_that_cannot_be_read(files: Files) -> None:
    path = files.write()
    files.database.write_bytes(b"no database at all, but long enough to be taken for one" * 20)
    report = look([path])
    assert "Synapse's database cannot be read" in report.stops[0]
    assert report.exit_code() == 2


def test_synapse_connects_in_another_way(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is checked all the same. The start goes on as well, without looking at columns."""
    path = files.write()
    (seam,) = (s for s in synapse_database.SEAMS if s.name == "make_conn")
    assert isinstance(seam, Method)
    other = changed(seam, added(inspect.Parameter.empty))
    put(monkeypatch, seam.owner, stand_in(resolve(seam.owner), seam.name, other))
    for report in look([]), look([path]):
        (problem,) = report.problems
        assert problem.startswith("the check cannot look at the tables of this Synapse: ")
        assert "make_conn takes" in problem
        assert {decision.state for decision in report.decisions().values()} == {State.ON}
        assert (report.stops, report.exit_code()) == ([], 1)
    assert report.processes


# Postgres, where a role may be forbidden something


@attr.s(auto_attribs=True)
class Role:
    """Synapse's own, which is not the owner of the database."""

    name: str
    database: Settings
    _admin: Settings

    def change(self, *statements: str) -> None:
        """As an operator who may do anything."""
        change_in(self._admin, *statements)


@pytest.fixture
def role() -> Iterator[Role]:
    with Postgres() as postgres:
        settings = postgres.new_database_of_a_role()
        yield Role(settings["args"]["user"], settings, postgres.as_admin(settings))


def test_tables_of_another_role(files: Files, role: Role) -> None:
    migrations = [*PageTable.migrations, *DeferredTable.migrations]
    statements = [statement for statements in migrations for statement in statements]
    # The last is of version 0.1.0, and nothing reads it.
    role.change(*statements, "CREATE TABLE synapse_sticky_layout (version BIGINT)")
    path = files.write(database=role.database)
    may_not = f"the database user {role.name} may not read and write"
    of_receipt = f"receipt would count staged events only, not deferred ones: {may_not}"
    assert look([path]).problems == [
        f"deferral would be off: {may_not} synapse_sticky_deferred",
        f"{of_receipt} synapse_sticky_deferred",
        f"sliding would be off: {may_not} synapse_sticky_pages",
    ]
    role.change(
        f"GRANT SELECT ON synapse_sticky_deferred TO {role.name}",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON synapse_sticky_pages TO {role.name}",
    )
    assert len(look([path]).problems) == 2, "it may read, and not write, what is deferred"
    role.change(LAYOUTS)
    problems = look([path]).problems
    assert [problem.split()[0] for problem in problems] == [
        *("deferral", "receipt", "joins", "sliding", "parking", "delivery")
    ]
    assert f"sliding would be off: {may_not} synapse_sticky_layouts" in problems


def test_a_role_that_may_not_make_tables(files: Files, role: Role) -> None:
    """Synapse itself asks for that at each start, whether there is something to make or not."""
    path = files.write(database=role.database)
    assert look([path]).exit_code() == 0
    config = migrate(path)
    role.change(f"REVOKE CREATE ON SCHEMA public FROM {role.name}")
    report = look([path])
    (stop,) = report.stops
    assert stop.startswith(
        f"the database user {role.name} may not create tables in the schema public"
    )
    assert (report.remarks, report.exit_code()) == ([], 2)
    with (
        closing(synapse_database.connect(config, "test")) as connection,
        pytest.raises(InsufficientPrivilege),
    ):
        prepare_database(connection, connection.engine, config)


def test_what_only_postgres_has(files: Files, role: Role, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.write(database=role.database)
    config = migrate(path)
    assert (look([path]).remarks, look([path]).exit_code()) == ([], 0)
    change_in(role.database, "ALTER TABLE sticky_events ALTER COLUMN room_id TYPE bytea USING NULL")
    report = look([path])
    misfit = "column room_id of table sticky_events has values of bytes, not text"
    assert misfit in report.duties["index"].misfits
    assert (report.remarks, report.exit_code()) == ([], 1)
    of_postgres = "(SELECT MAX(file) FROM applied_schema_deltas WHERE file LIKE '%.postgres')"
    change_in(role.database, f"DELETE FROM applied_schema_deltas WHERE file = {of_postgres}")
    (remark,) = look([path]).remarks
    assert TO_BE_MIGRATED in remark
    assert migrates(config, monkeypatch)
