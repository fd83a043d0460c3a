"""This version on a database that version 0.1.0 left, and what 0.1.0 would find after it (E4).

How the dumps were made is in make_dump.py.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import attr
import pytest

from tests.integration.rooms import limits
from tests.lab import Homeserver, Lab, Peer, wait_until
from tests.lab.client import (
    SLIDING_EXTENSION,
    WITHOUT_TIMELINE,
    sliding_sticky_events,
    sticky_events,
)
from tests.upgrade.database import ENGINES, PREFIX, Column, Database
from tests.upgrade.installation import FLOODER, NEWCOMER, facts_of, start
from tests.upgrade.restore import (
    client_of,
    come_back,
    make_restored_server,
    restored_database,
)

pytestmark = pytest.mark.one_process

BACKLOG = "destination_rooms_sticky_events_backlog"
LAYOUT, LAYOUTS = f"{PREFIX}layout", f"{PREFIX}layouts"
LAYOUT_OF_0_1_0 = 4
DUTIES = {"deferral", "joins", "parking", "sliding"}
LET_THROUGH = 2
TIGHT = limits(per_server={"per_second": 0.001, "burst_count": LET_THROUGH})
"""As many may come out at a start, and no others within a test."""


@attr.s(auto_attribs=True, frozen=True)
class Table:
    """What 0.1.0 relies upon."""

    columns: dict[str, Column]
    key: set[str]


@attr.s(auto_attribs=True, frozen=True)
class Upgraded:
    """The homeserver of the dump, with this version of the module.

    ``rows`` and ``tables`` are the module's as 0.1.0 left them, and the rows of Synapse's backlog.
    """

    server: Homeserver
    database: Database
    facts: Any
    flooder: Peer
    newcomer: Peer
    rows: dict[str, list[dict[str, Any]]]
    tables: dict[str, Table]

    def rows_now(self, table: str) -> list[dict[str, Any]]:
        """What is there now, of the columns that 0.1.0 knows."""
        names = self.rows[table][0].keys()
        return [{name: row[name] for name in names} for row in self.database.rows(table)]

    def row_of(self, table: str, **key: str) -> dict[str, Any] | None:
        """One of these rows; None if it is not there any more."""
        found = [row for row in self.rows_now(table) if key.items() <= row.items()]
        assert len(found) <= 1
        return found[0] if found else None


@contextmanager
def upgraded(lab: Lab, engine: str, config: object, *, mute: bool) -> Iterator[Upgraded]:
    """Starts the homeserver. Its peers are there under their names; ``mute`` ones answer that they
    are not available."""
    facts = facts_of(engine)
    with (
        closing(lab.peer()) as flooder,
        closing(lab.peer()) as newcomer,
        restored_database(engine) as database,
    ):
        peers = {FLOODER: flooder, NEWCOMER: newcomer}
        for name, peer in peers.items():
            come_back(peer, name, facts)
            if mute:
                peer.override = lambda method, path: (503, {})
        own = database.own_tables()
        rows = {table: database.rows(table) for table in (*own, BACKLOG)}
        tables = {table: Table(database.columns(table), database.key(table)) for table in own}
        server = make_restored_server(lab, database, facts, peers, config)
        try:
            start(server)
            yield Upgraded(server, database, facts, flooder, newcomer, rows, tables)
        finally:
            lab.close_servers([server])


@pytest.fixture(scope="module", params=ENGINES)
def left_alone(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Upgraded]:
    """One that can do little about what it found: no other server answers, and the limit lets only
    some events through. What can be done is done."""
    with upgraded(lab, request.param, TIGHT, mute=True) as found:
        wait_until(lambda: found.server.log_has("synapse-sticky runs in master"), "the module")
        waiting = len(found.facts["deferral"]["deferred"])
        wait_until(
            lambda: len(found.database.rows(f"{PREFIX}deferred")) <= waiting - LET_THROUGH,
            "some events to be released",
        )
        wait_until_asked(found.newcomer, "/send/")
        wait_until_asked(found.flooder, "/get_missing_events/")
        yield found


def wait_until_asked(peer: Peer, what: str) -> None:
    wait_until(lambda: any(what in asked for asked in peer.requests), f"{peer.name}: {what}")


@pytest.mark.requirement("E4")
def test_what_cannot_be_dealt_with_yet_is_kept(left_alone: Upgraded) -> None:
    assert all(left_alone.rows.values()), "the dump has something of everything"
    now = {table: left_alone.rows_now(table) for table in left_alone.rows}
    now[PREFIX + "pages"] = without("shown", without("until", now[PREFIX + "pages"]))
    for name in ("pages", "layout"):
        assert in_order(now[PREFIX + name]) == in_order(left_alone.rows[PREFIX + name])
    for name in (PREFIX + "newcomers", BACKLOG):
        assert of_newcomer(now[name]) == of_newcomer(left_alone.rows[name]) != []
    # It is looked at again and again.
    parked = without("tries", without("due_ms", now[PREFIX + "incomplete"]))
    assert parked == without("due_ms", left_alone.rows[PREFIX + "incomplete"])
    (before,), (after,) = (rows[PREFIX + "state_positions"] for rows in (left_alone.rows, now))
    assert after["instance_name"] == before["instance_name"]
    assert after["position"] >= before["position"]


@pytest.mark.requirement("E4", "L4")
def test_deferred_events_are_released_as_the_limit_allows(left_alone: Upgraded) -> None:
    before = left_alone.rows[f"{PREFIX}deferred"]
    now = left_alone.rows_now(f"{PREFIX}deferred")
    assert len(now) == len(before) - LET_THROUGH
    assert all(row in before for row in now)
    facts = left_alone.facts["deferral"]
    assert {row["event_id"] for row in before} == set(facts["deferred"])
    alice = client_of(left_alone.server, facts["user"])
    released = set(facts["deferred"]) - {row["event_id"] for row in now}
    expected = {*facts["entered"], *released}
    alice.collect_sticky(facts["room_id"], expected, filter_=WITHOUT_TIMELINE)
    given = sticky_events(alice.sync(filter_=WITHOUT_TIMELINE), facts["room_id"])
    assert sorted(given) == sorted(expected)


def in_order(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(map(repr, rows))


def of_newcomer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["destination"] == NEWCOMER]


def without(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != name} for row in rows]


@pytest.mark.requirement("E4")
def test_each_duty_has_a_layout_of_its_own(left_alone: Upgraded) -> None:
    """The tables of 0.1.0 are the first version of each. Most have had others since."""

    def layouts() -> dict[str, int]:
        if LAYOUTS not in left_alone.database.tables():
            return {}
        return {row["duty"]: row["version"] for row in left_alone.database.rows(LAYOUTS)}

    expected = {**dict.fromkeys(DUTIES, 2), "deferral": 3, "parking": 6}
    expected |= {"delivery (unignored)": 1, "admin": 1}
    wait_until(lambda: layouts().keys() == expected.keys(), "all to be ready", look=layouts)
    assert layouts() == expected


@pytest.mark.requirement("E4")
def test_what_0_1_0_needs_is_still_there(left_alone: Upgraded) -> None:
    """0.1.0 can be put back: it reads and writes these columns by their names."""
    database = left_alone.database
    for name, table in left_alone.tables.items():
        columns = database.columns(name)
        types = {column: columns[column].type for column in table.columns.keys() & columns.keys()}
        assert types == {column: known.type for column, known in table.columns.items()}, name
        assert database.key(name) == table.key, name
        for column in columns.keys() - table.columns.keys():
            assert columns[column].may_be_left_out, f"0.1.0 does not fill {name}.{column}"
    # It leaves tables alone that say that they are of a later version.
    assert database.query(f"SELECT MAX(version) FROM {LAYOUT}") == [(LAYOUT_OF_0_1_0,)]


@pytest.mark.requirement("E4", "L4", "P3", "L3", "D5")
@pytest.mark.parametrize("engine", ENGINES)
def test_each_duty_goes_on(lab: Lab, engine: str) -> None:
    """Without limits and with the other servers back nothing is left to be done."""
    with upgraded(lab, engine, limits("off"), mute=False) as found:
        pages_go_on(found)
        deferred_events_are_delivered(found)
        parked_pdu_is_taken_in(found)
        newcomer_gets_all(found)


def pages_go_on(found: Upgraded) -> None:
    """The token that a client got of 0.1.0 says what is left, and nothing comes twice."""
    facts = found.facts["sliding"]
    carol = client_of(found.server, facts["user"])
    extension = {"next_batch": facts["token"]}
    answer: Any = {"pos": facts["pos"], "extensions": {SLIDING_EXTENSION: extension}}
    pages = []
    for _ in range(3):
        answer = carol.sliding_sync(answer, limit=2)
        pages.append(sliding_sticky_events(answer, facts["room_id"]))
    assert pages == [facts["left"][:2], facts["left"][2:], []]
    new = carol.send_sticky(facts["room_id"])
    answer = carol.sliding_sync(answer, limit=2)
    assert sliding_sticky_events(answer, facts["room_id"]) == [new]


def deferred_events_are_delivered(found: Upgraded) -> None:
    facts = found.facts["deferral"]
    alice = client_of(found.server, facts["user"])
    every = {*facts["entered"], *facts["deferred"]}
    alice.collect_sticky(facts["room_id"], every, filter_=WITHOUT_TIMELINE)
    given = sticky_events(alice.sync(filter_=WITHOUT_TIMELINE), facts["room_id"])
    assert sorted(given) == sorted(every)
    assert given[: len(facts["entered"])] == facts["entered"]
    assert found.database.rows(f"{PREFIX}deferred") == []


def parked_pdu_is_taken_in(found: Upgraded) -> None:
    """Its origin has the event before it now."""
    facts = found.facts["parking"]
    alice = client_of(found.server, facts["user"])
    seen = alice.collect_sticky(facts["room_id"], {facts["event_id"]}, filter_=WITHOUT_TIMELINE)
    assert list(seen) == [facts["event_id"]]
    assert alice.event(facts["room_id"], facts["withheld_id"])
    wait_until(
        lambda: found.row_of(f"{PREFIX}incomplete", event_id=facts["event_id"]) is None,
        "the PDU to be parked no longer",
    )


def newcomer_gets_all(found: Upgraded) -> None:
    facts = found.facts["joins"]
    wait_until(
        lambda: set(facts["event_ids"]) <= found.newcomer.events.keys(),
        "the newcomer to be sent everything",
    )
    wait_until(
        lambda: found.row_of(BACKLOG, destination=NEWCOMER, room_id=facts["room_id"]) is None,
        "nothing to be left to send",
    )
    # Only who has read the row can say that of it: there is a time in it that has to be the same.
    wait_until(lambda: is_settled(found, facts["room_id"]), "the newcomer to be through with it")


def is_settled(found: Upgraded, room_id: str) -> bool:
    """Has the module noted that the newcomer lacks nothing of what there was?"""
    row = found.row_of(f"{PREFIX}newcomers", destination=NEWCOMER, room_id=room_id)
    return row is None or row["position"] > 0
