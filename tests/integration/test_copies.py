"""The database is moved, restored or replaced by its replica (docs/database.md). Nothing that a
copy has is lost (E2, E4)."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from synapse_sticky.cli import main
from tests.integration.rooms import entered
from tests.integration.test_tables import ALL_TABLES, CONFIG, TABLES, Story, begin, wait_until_on
from tests.integration.test_tables import comes_to_its_end as comes_to_its_end_of
from tests.lab import Homeserver, Lab, Peer, wait_until
from tests.lab.client import WITHOUT_TIMELINE
from tests.lab.postgres import Postgres, Replica, change_in, query_in
from tests.lab.starter import PROJECT

pytestmark = [
    pytest.mark.one_process,
    pytest.mark.slow,
    pytest.mark.requirement("E2", "E4", "L3", "L4", "P3", "D4"),
]

AT_ONCE = {"background_updates": {"sleep_enabled": False}}
NEW = "The tables of {} are new, beside "


def sql_of_page() -> list[str]:
    """The SQL of docs/database.md: after a port, and after a restore."""
    page = (PROJECT / "docs/database.md").read_text()
    return re.findall(r"```sql\n(.*?)```", page, re.DOTALL)


@pytest.fixture
def newcomer(lab: Lab) -> Iterator[Peer]:
    with closing(lab.peer()) as started:
        yield started


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    with Postgres() as started:
        yield started


@pytest.fixture
def server(lab: Lab, request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[Homeserver]:
    """A server with the module, on what the test asks for."""
    database = {"database": postgres.new_database()} if request.param == "postgres" else {}
    lab.prepare()
    started = lab.make(config=CONFIG, extra={**AT_ONCE, **database}, metrics=True)
    started.first_start()
    yield started
    lab.close_servers([started])


on_sqlite = pytest.mark.parametrize("server", ["sqlite"], indirect=True)
on_postgres = pytest.mark.parametrize("server", ["postgres"], indirect=True)


def config_of(server: Homeserver) -> str:
    return str(server.folder / "homeserver.yaml")


def port(server: Homeserver) -> None:
    """Copies the server's SQLite to the Postgres that it has now."""
    program = Path(sys.executable).with_name("synapse_port_db")
    options = ("--sqlite-database", server.database_path, "--postgres-config", config_of(server))
    run = subprocess.run(
        [program, *options], cwd=server.folder, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]


def stop_once_updated(server: Homeserver) -> None:
    """Nothing is ported before that."""
    wait_until(
        lambda: not server.query("SELECT 1 FROM background_updates"), "the updates to be done", 120
    )
    server.stop()


class Reader:
    """A client that goes on from where it was."""

    def __init__(self, story: Story) -> None:
        self._story = story
        self._since = story.scene.alice.sync()["next_batch"]

    def sees(self, *event_ids: str) -> None:
        """It is given these in the sticky section."""
        scene = self._story.scene
        expected = {*event_ids}
        seen = scene.alice.collect_sticky(
            scene.room_id, expected, since=self._since, filter_=WITHOUT_TIMELINE
        )
        assert set(seen) >= expected


def comes_to_its_end(story: Story) -> None:
    wait_until_on(story.server, *TABLES)
    comes_to_its_end_of(story)


@on_sqlite
def test_sqlite_to_postgres_by_the_recipe(
    server: Homeserver, postgres: Postgres, peer: Peer, newcomer: Peer
) -> None:
    """Also where the last rows of the sticky events stream have expired and were deleted."""
    story = begin(server, peer, newcomer)
    gone = story.scene.alice.send_sticky(story.scene.room_id)
    wait_until(lambda: gone in entered(server, story.scene.room_id), "the last event")
    reader = Reader(story)
    stop_once_updated(server)
    server.change(f"DELETE FROM sticky_events WHERE event_id = '{gone}'")
    kept = {name: sorted(server.query(f"SELECT * FROM {name}")) for name in ALL_TABLES}
    database = postgres.new_database()
    server.use_database(database)
    assert main(["migrate-tables", "-c", config_of(server)]) == 0
    port(server)
    assert {n: sorted(server.query(f"SELECT * FROM {n}")) for n in ALL_TABLES} == kept
    after_port, _ = sql_of_page()
    change_in(database, after_port)
    server.restart()
    new = story.scene.alice.send_sticky(story.scene.room_id)
    comes_to_its_end(story)
    # What was deferred is sticky now. All that came after the token has an ID after it.
    reader.sees(new, *story.flood[5:])
    assert "are new, beside" not in server.output()


@on_sqlite
def test_sqlite_to_postgres_without_the_tables(
    server: Homeserver, postgres: Postgres, peer: Peer, newcomer: Peer
) -> None:
    """The start says what is missing, and goes on without that."""
    story = begin(server, peer, newcomer)
    stop_once_updated(server)
    database = postgres.new_database()
    server.use_database(database)
    port(server)
    after_port, _ = sql_of_page()
    change_in(database, after_port)
    server.restart()
    wait_until_on(server, *TABLES)
    for duty in TABLES:
        wait_until(partial(server.log_has, NEW.format(duty)), f"{duty} to say it")
    new = story.scene.alice.send_sticky(story.scene.room_id)
    wait_until(lambda: new in story.scene.sections()[0], "it to go on")


@on_postgres
def test_a_restored_dump(
    server: Homeserver, postgres: Postgres, peer: Peer, newcomer: Peer
) -> None:
    """It was made while Synapse ran; clients have seen more since."""
    story = begin(server, peer, newcomer)
    database = postgres.copy(server.settings)
    later = [story.scene.alice.send_sticky(story.scene.room_id) for _ in range(5)]
    wait_until(lambda: {*later} <= {*story.scene.sections()[0]}, "all to be seen")
    reader = Reader(story)
    server.stop()
    _, after_restore = sql_of_page()
    change_in(database, after_restore)
    server.use_database(database)
    server.restart()
    assert not {*later} & {*entered(server, story.scene.room_id)}
    new = [story.scene.alice.send_sticky(story.scene.room_id) for _ in range(3)]
    reader.sees(*new)
    comes_to_its_end(story)


@on_postgres
def test_a_restored_dump_without_the_modules_tables(
    server: Homeserver, postgres: Postgres, peer: Peer, newcomer: Peer
) -> None:
    story = begin(server, peer, newcomer)
    server.stop()
    database = postgres.copy(server.settings, "--exclude-table=synapse_sticky_*")
    server.use_database(database)
    server.restart()
    wait_until_on(server, *TABLES)
    for duty in TABLES:
        wait_until(partial(server.log_has, NEW.format(duty)), f"{duty} to say it")
    new = story.scene.alice.send_sticky(story.scene.room_id)
    wait_until(lambda: new in story.scene.sections()[0], "it to go on")


@on_postgres
def test_fail_over_to_an_asynchronous_replica(
    server: Homeserver, postgres: Postgres, peer: Peer, newcomer: Peer
) -> None:
    """It lacks the last events. Who has seen them sees all that follows."""
    story = begin(server, peer, newcomer)
    with Replica(postgres) as replica:
        database = replica.database(server.settings)
        (here,) = query_in(server.settings, "SELECT pg_current_wal_lsn()")[0]
        wait_until(
            lambda: query_in(database, "SELECT pg_last_wal_replay_lsn() >= ?", here) == [(True,)],
            "the replica to have all",
        )
        replica.stop()
        lost = story.scene.alice.send_sticky(story.scene.room_id)
        wait_until(lambda: lost in story.scene.sections()[0], "it to be seen")
        reader = Reader(story)
        server.kill()
        postgres.stop()
        replica.start()
        replica.promote()
        server.use_database(database)
        server.restart()
        assert lost not in entered(server, story.scene.room_id)
        new = [story.scene.alice.send_sticky(story.scene.room_id) for _ in range(3)]
        reader.sees(*new)
        comes_to_its_end(story)
        server.kill()
