"""The module's own tables cannot be used: the duties that have some wait, and only the operator
notices.

Nothing that is in the tables is lost meanwhile, nor anything that Synapse keeps itself.
"""

import re
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from types import SimpleNamespace
from typing import Any

import attr
import pytest

from synapse_sticky.cli.check import look
from synapse_sticky.handlers.deferral.synapse import SynapseWriter
from synapse_sticky.homeserver import Homeserver as Process
from tests.conftest import Servers
from tests.integration.rooms import (
    backlogged_rooms,
    deferred,
    entered,
    has_event,
    limits,
    wait_until_seen,
    wait_until_taken_in,
)
from tests.integration.test_duties import in_state, wait_until_nothing_is_staged
from tests.integration.test_staging import parked
from tests.lab import Client, Homeserver, Lab, Peer, wait_until
from tests.lab.client import sliding_sticky_events
from tests.lab.postgres import Postgres, Settings, change_in, cursor_in, query_in
from tests.lab.scene import Scene, enter

pytestmark = [pytest.mark.one_process, pytest.mark.slow]

TABLES = {
    "sliding": ("synapse_sticky_pages",),
    "joins": (
        *("synapse_sticky_newcomers", "synapse_sticky_state_positions"),
        "synapse_sticky_whitelists",
    ),
    "deferral": ("synapse_sticky_deferred",),
    "parking": ("synapse_sticky_incomplete",),
}
"""Each duty's own."""
ALL_TABLES = (*(name for names in TABLES.values() for name in names), "synapse_sticky_layouts")
OTHERS = ("index", "delivery", "visibility", "pruning", "receipt", "sending", "extremities")
"""The duties without tables."""
OF_SYNAPSE = (
    *("destination_rooms_sticky_events_backlog", "federation_inbound_events_staging"),
    *("sticky_events", "event_json"),
)

BURST = 5
CONFIG = limits(per_server={"per_second": 0.001, "burst_count": BURST})
STEPS_MS = ("5000", "10000", "20000", "30000")
"""The delays between the attempts to load a duty."""
LATER_LAYOUT = 99

Rows = dict[str, list[tuple[Any, ...]]]


@attr.s(auto_attribs=True)
class Story:
    """A server with something in each table of the module.

    flood: the peer's events; the last of them are deferred.
    withheld: events that cannot be fetched, each with one on top of it, which is parked.
    newcomer: a server that joined another room, and cannot be sent anything.
    old: that room's events, from before the newcomer's join.
    reader: a user who joined that room then, and reads ``old`` in pages.
    page: the first answer of sliding sync with some of ``old``.
    """

    scene: Scene[Homeserver]
    flood: list[str]
    withheld: set[str]
    newcomer: Peer
    elsewhere: str
    old: list[str]
    reader: Client
    page: Any

    @property
    def server(self) -> Homeserver:
        return self.scene.server


def rows(server: Homeserver, *tables: str) -> Rows:
    return {name: sorted(server.query(f"SELECT * FROM {name}")) for name in tables}


def begin(server: Homeserver, peer: Peer, newcomer: Peer) -> Story:
    wait_until_on(server, *TABLES)
    scene = enter(server, peer)
    flood = scene.flood(2 * BURST)
    wait_until_taken_in(server, scene.room_id, set(flood))
    assert set(flood[BURST:]) <= deferred(server)

    alice, reader = server.user("alice"), server.user("reader")
    elsewhere = alice.create_room()
    old = [alice.send_sticky(elsewhere) for _ in range(5)]
    reader.send_sticky(reader.create_room())
    answer = reader.sliding_sync()
    reader.join(elsewhere)
    page = reader.sliding_sync(answer, limit=2)
    assert sliding_sticky_events(page, elsewhere) == old[:2]

    newcomer.override = lambda method, path: (503, {}) if "/send/" in path else None
    newcomer.join(server, elsewhere, newcomer.user("carol"))
    wait_until_seen(server, newcomer, elsewhere)

    peer.override = lambda method, path: (502, {}) if "/get_missing_events/" in path else None
    withheld = send_on_top_of_what_nobody_has(scene)
    wait_until(lambda: bool(withheld & parked(server)), "an event to be parked")
    wait_until_nothing_is_staged(server)
    return Story(scene, flood, withheld, newcomer, elsewhere, old, reader, page)


def send_on_top_of_what_nobody_has(scene: Scene[Homeserver]) -> set[str]:
    """Gives the IDs of both; the peer goes on as if there were neither."""
    before = scene.room.extremities, scene.room.depth
    unknown, _ = scene.peer.sticky(scene.room, scene.eve)
    scene.peer.advance(scene.room, unknown)
    on_top = scene.sticky()
    scene.room.extremities, scene.room.depth = before
    return {unknown, on_top}


def arrives_without_limits(story: Story) -> set[str]:
    """What is sticky reaches who is there, by /sync and sliding sync; also past what the limit
    would be. Gives the IDs of what was sent for that."""
    scene = story.scene
    new = {scene.alice.send_sticky(scene.room_id), *(scene.sticky() for _ in range(3))}
    expected = {*story.flood[:BURST], *new}
    wait_until(
        lambda: all(set(section) == expected for section in scene.sections()),
        "the sections to be as they should",
        look=scene.sections,
    )
    return new


def goes_on_as_plain_synapse(story: Story) -> None:
    scene, new = story.scene, arrives_without_limits(story)
    assert set(scene.alice.collect_sticky(scene.room_id, new)) >= new
    # How far the page went is not known now: all of it once more.
    assert sliding_sticky_events(story.reader.sliding_sync(story.page), story.elsewhere) == (
        story.old
    )
    assert story.elsewhere in backlogged_rooms(story.server)


def comes_to_its_end(story: Story) -> None:
    """What was left in the tables is done, once the duties are on."""
    # Limits begin anew with a start.
    wait_until(
        lambda: set(story.flood) <= set(entered(story.server, story.scene.room_id)),
        "what was deferred to be released",
    )
    story.newcomer.override = story.scene.peer.override = lambda method, path: None
    answer = story.reader.sliding_sync(story.page)
    assert sliding_sticky_events(answer, story.elsewhere) == story.old[2:]
    wait_until(lambda: set(story.old) <= story.newcomer.events.keys(), "the newcomer to have all")
    for event_id in story.withheld:
        wait_until(partial(has_event, story.server, event_id), "what was parked")


def wait_until_on(server: Homeserver, *duties: str) -> None:
    for duty in duties:
        wait_until(partial(in_state, server, duty, "on"), f"{duty} to be on", 60)


def wait_until_off(server: Homeserver) -> None:
    for duty in TABLES:
        wait_until(partial(in_state, server, duty, "off"), f"{duty} to be off")
    wait_until_on(server, *OTHERS)


class Log:
    """What a server's log has from now on."""

    def __init__(self, server: Homeserver) -> None:
        self._path = server.log_path
        self._start = self._path.stat().st_size

    def text(self) -> str:
        return self._path.read_bytes()[self._start :].decode()

    def problems(self) -> list[str]:
        """The warnings and errors, whoever's."""
        return re.findall(r"^\S+ \S+ (?:WARNING|ERROR|CRITICAL) (.*)$", self.text(), re.MULTILINE)

    def delays_after(self, problem: str) -> list[str]:
        """What was said of the next attempts after this failed, in ms."""
        return re.findall(rf"{problem}, trying again in (\d+) ms", self.text())

    def delays_of(self, duty: str) -> list[str]:
        return self.delays_after(f"Could not load {duty}, which is off until then")


@attr.s(auto_attribs=True)
class Database:
    """A Postgres in which Synapse's role may do as much as the operator allows."""

    server: Homeserver
    role: str
    as_admin: Settings

    def change(self, *statements: str) -> None:
        change_in(self.as_admin, *statements)

    def rows(self, *tables: str) -> Rows:
        """What is in these tables."""
        return {name: sorted(query_in(self.as_admin, f"SELECT * FROM {name}")) for name in tables}

    def take_tables(self, *, leaving: str = "") -> None:
        """As after a restore by another role: the tables are that one's."""
        self.change(*(f"ALTER TABLE {name} OWNER TO CURRENT_USER" for name in ALL_TABLES))
        if leaving:
            self.change(*(f"GRANT {leaving} ON {name} TO {self.role}" for name in ALL_TABLES))

    def give_tables(self) -> None:
        self.change(*(f"ALTER TABLE {name} OWNER TO {self.role}" for name in ALL_TABLES))


@attr.s(auto_attribs=True)
class Questioned:
    """A cursor to which ``?`` stands for an argument, as to Synapse's."""

    cursor: Any

    def execute(self, sql: str, args: Any = ()) -> None:
        self.cursor.execute(sql.replace("?", "%s"), args)

    def fetchone(self) -> Any:
        return self.cursor.fetchone()

    def lock_timeout(self) -> str:
        self.execute("SHOW lock_timeout")
        return str(self.fetchone()[0])


@pytest.fixture(scope="module")
def database(lab: Lab) -> Iterator[Database]:
    """That of a homeserver whose role is not the database's owner."""
    lab.prepare()
    with Postgres() as postgres:
        settings = postgres.new_database_of_a_role()
        server = lab.make(extra={"database": settings}, config=CONFIG, metrics=True)
        server.first_start()
        wait_until_on(server, *TABLES)
        yield Database(server, settings["args"]["user"], postgres.as_admin(settings))
        lab.close_servers([server])


@pytest.fixture
def newcomer(lab: Lab) -> Iterator[Peer]:
    with closing(lab.peer()) as started:
        yield started


COUNTING = "receipt counts staged events only, not deferred ones"
"""Receipt looks into the table of deferral."""


def problems_by_check(server: Homeserver) -> list[str]:
    """What ``synapse-sticky check`` says of the server's tables, before it is started."""
    report = look([str(server.folder / "homeserver.yaml")])
    assert report.stops == []
    assert report.exit_code() == (1 if report.problems else 0)
    assert not any(decision.misfits for decision in report.duties.values())
    return report.problems


def each_is_said_once(log: Log) -> None:
    """However many attempts there were."""
    delays = {duty: log.delays_of(duty) for duty in TABLES}
    delays["receipt"] = log.delays_after(COUNTING)
    for duty, of_duty in delays.items():
        assert of_duty == list(STEPS_MS[: len(of_duty)]), duty
        # Parking waits a minute for deferral.
        assert of_duty or duty == "parking"
    told = [line for line in log.problems() if line.startswith("synapse_sticky")]
    for duty, of_duty in delays.items():
        problem = COUNTING if duty == "receipt" else f"Could not load {duty}, "
        assert [problem in line for line in told].count(True) == bool(of_duty), duty
    # What cannot be read of the layouts cannot be read of the orders of administrators, either.
    of_orders = [line for line in told if "Could not read what administrators have" in line]
    assert len(of_orders) <= 1
    assert len(told) - len(of_orders) == len([of_duty for of_duty in delays.values() if of_duty])


@pytest.mark.requirement("E2", "E4", "H1", "H2", "L3")
@pytest.mark.parametrize("leaving", ["", "SELECT"], ids=["tables of another role", "read-only"])
def test_the_role_may_not_use_the_tables(
    database: Database, peer: Peer, newcomer: Peer, leaving: str
) -> None:
    server = database.server
    story = begin(server, peer, newcomer)
    server.stop()
    kept, of_synapse = database.rows(*ALL_TABLES), database.rows(*OF_SYNAPSE)
    assert problems_by_check(server) == []
    database.take_tables(leaving=leaving)
    try:
        problems = problems_by_check(server)
        assert {problem.split()[0] for problem in problems} == {*TABLES, "receipt"}
        assert all(f"{database.role} may not read and write" in problem for problem in problems)
        log = Log(server)
        server.restart()
        wait_until_off(server)
        goes_on_as_plain_synapse(story)
        # What would be parked now is kept until it can be.
        story.withheld |= send_on_top_of_what_nobody_has(story.scene)
        # More than one attempt, while transactions come in.
        wait_until(lambda: len(log.delays_of("joins")) > 1, "another attempt")
        late = story.scene.sticky()
        wait_until(lambda: late in story.scene.sections()[0], "it to arrive")
        assert database.rows(*ALL_TABLES) == kept
        for name, now in database.rows(*OF_SYNAPSE).items():
            assert set(now) >= set(of_synapse[name]), name
        each_is_said_once(log)
    finally:
        database.give_tables()
    wait_until_on(server, *TABLES)
    comes_to_its_end(story)


@pytest.mark.requirement("E2", "H1", "H2", "L3")
@pytest.mark.parametrize("leaving", ["", "SELECT"], ids=["tables of another role", "read-only"])
def test_the_tables_are_taken_while_it_runs(
    database: Database, peer: Peer, newcomer: Peer, leaving: str
) -> None:
    """As if the duties with tables were off. What Synapse persists with them is persisted."""
    server = database.server
    story = begin(server, peer, newcomer)
    kept, log = database.rows(*ALL_TABLES), Log(server)
    database.take_tables(leaving=leaving)
    try:
        late = story.scene.flood(2 * BURST)
        plain, pdu = peer.make(story.scene.room, story.scene.eve)
        story.scene.send(pdu)
        wait_until(partial(has_event, server, plain), "the room to go on")
        wait_until(
            lambda: all(set(late) <= set(section) for section in story.scene.sections()),
            "what is past the limit to be delivered",
            look=story.scene.sections,
        )
        assert database.rows("synapse_sticky_deferred") == {
            "synapse_sticky_deferred": kept["synapse_sticky_deferred"]
        }
        told = [line for line in log.problems() if "Could not defer" in line]
        assert 1 <= len(told) <= 3, told
    finally:
        database.give_tables()
    server.stop()
    server.restart()
    comes_to_its_end(story)


@pytest.mark.requirement("H1", "H2")
def test_a_table_that_is_locked_keeps_no_other_duty_off(database: Database) -> None:
    server = database.server
    wait_until_on(server, *TABLES)
    server.stop()
    log = Log(server)
    with cursor_in(database.as_admin) as cursor:
        cursor.execute("LOCK TABLE synapse_sticky_pages IN ACCESS EXCLUSIVE MODE")
        server.restart()
        wait_until_on(server, *(TABLES.keys() - {"sliding"}))
        assert in_state(server, "sliding", "off")
        # Until a lock is no longer waited for, all that happens is that it is.
        wait_until(lambda: log.delays_of("sliding"), "it to be said", 60)
    wait_until_on(server, "sliding")
    assert [duty for duty in TABLES if log.delays_of(duty)] == ["sliding"]


@pytest.mark.requirement("H1", "L3")
@pytest.mark.parametrize("mode", ["SHARE", "ACCESS EXCLUSIVE"])
def test_tables_that_are_locked_while_it_runs_hold_up_no_room(
    database: Database, peer: Peer, mode: str
) -> None:
    """As while the operator makes an index, or has the table written anew."""
    server = database.server
    wait_until_on(server, *TABLES)
    scene = enter(server, peer)
    peer.override = lambda method, path: (502, {}) if "/get_missing_events/" in path else None
    tables = "synapse_sticky_incomplete, synapse_sticky_deferred"
    with cursor_in(database.as_admin) as cursor:
        cursor.execute(f"LOCK TABLE {tables} IN {mode} MODE")
        withheld = send_on_top_of_what_nobody_has(scene)
        late = scene.flood(2 * BURST)
        wait_until(
            lambda: all(set(late) <= set(section) for section in scene.sections()),
            "what is past the limit to be delivered",
            look=scene.sections,
        )
        assert not any(has_event(server, event_id) for event_id in withheld)
    wait_until(lambda: bool(withheld & parked(server)), "an event to be parked")
    peer.override = lambda method, path: None
    scene.wait_until_there(*withheld)


@pytest.mark.requirement("H1", "L3")
def test_the_wait_for_a_locked_table_is_short_in_the_modules_own_statements_only(
    database: Database,
) -> None:
    """Synapse's statements in the same transaction wait for as long as the operator says."""
    homeserver: Any = SimpleNamespace(is_postgres=True)
    homeserver.brief_waits_txn = partial(Process.brief_waits_txn, homeserver)
    writer: Any = SimpleNamespace(_homeserver=homeserver)
    with cursor_in(database.as_admin) as cursor:
        txn: Any = Questioned(cursor)

        def change(seen: list[str], error: Exception | None) -> None:
            seen.append(txn.lock_timeout())
            if error is not None:
                raise error

        for before in ("0", "7s"):
            txn.execute(f"SET LOCAL lock_timeout = '{before}'")
            for error in (None, ValueError("for the test")):
                seen: list[str] = []
                attempt = partial(change, seen, error)
                assert SynapseWriter.attempt_txn(writer, txn, attempt) is error
                assert seen == ["400ms"]
                assert txn.lock_timeout() == before


@pytest.mark.requirement("E4", "H1", "H2", "L3")
def test_all_layouts_of_a_later_version(servers: Servers, peer: Peer, newcomer: Peer) -> None:
    """Each duty with tables is off, says so once, and leaves its tables alone."""
    (server,) = servers({"config": CONFIG, "metrics": True})
    story = begin(server, peer, newcomer)
    server.stop()
    server.change(f"UPDATE synapse_sticky_layouts SET version = version + {LATER_LAYOUT}")
    kept = rows(server, *ALL_TABLES)
    log = Log(server)
    server.restart()
    wait_until_off(server)
    goes_on_as_plain_synapse(story)
    assert rows(server, *ALL_TABLES) == kept
    told = [line for line in log.problems() if "have layout" in line]
    for duty in TABLES:
        said = f"{duty} is off: The tables of {duty} have layout"
        assert [said in line for line in told].count(True) == 1
    # Who counts what is deferred has to do without as well.
    assert [COUNTING in line for line in told].count(True) == 1
    assert len(told) == len(TABLES) + 1
    # The later version is there again.
    server.stop()
    server.change(f"UPDATE synapse_sticky_layouts SET version = version - {LATER_LAYOUT}")
    server.restart()
    wait_until_on(server, *TABLES)
    comes_to_its_end(story)


@pytest.mark.requirement("H5", "E4")
def test_what_synapse_does_itself_is_left_to_it(
    database: Database, peer: Peer, newcomer: Peer
) -> None:
    """A duty that Synapse has is not done twice, and what it left stays readable."""
    server = database.server
    story = begin(server, peer, newcomer)
    server.stop()
    kept = database.rows(*ALL_TABLES)
    server.use_module("tests.lab.variants.InSynapseWithItsOwn")
    server.restart()
    assert server.log_has(
        "synapse-sticky runs in master: index, delivery, visibility, receipt, extremities; "
        "native: sliding, joins, pruning, parking, deferral, sending\n"
    )
    wait_until(partial(in_state, server, "joins", "native"), "the metric")
    arrives_without_limits(story)
    # Synapse goes on from the token of a page as from any other.
    assert sliding_sticky_events(story.reader.sliding_sync(story.page), story.elsewhere) == []
    assert database.rows(*ALL_TABLES) == kept
    server.use_module("synapse_sticky.StickyEventsModule")
    server.restart()
    wait_until_on(server, *TABLES)
    comes_to_its_end(story)
