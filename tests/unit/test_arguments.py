"""No statement names more values than a database takes, whoever chooses their number (H3)."""

import ast
import json
from collections.abc import Iterator

import pytest
from synapse.api.room_versions import RoomVersions

from synapse_sticky.handlers.deferral.handler import NewStickyEvent
from synapse_sticky.handlers.deferral.synapse import SynapseWriter
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.joins.confirmation.synapse import SynapseAsking
from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.pruning.synapse import SynapsePruning
from synapse_sticky.handlers.staging.turns.synapse import SynapseTurns
from synapse_sticky.homeserver.database import portions
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.homeserver.received import Received
from synapse_sticky.index.synapse import SynapseStickyStream
from tests.unit.members import MOST_ARGUMENTS, ThisProcess, World
from tests.unit.test_boundaries import PACKAGE, ROOT

MORE_THAN_SQLITE_TAKES = MOST_ARGUMENTS + 1
HOUR_MS = 3_600_000


def unbounded(source: str) -> Iterator[str]:
    """What a statement names that is no portion, nor anything of each in a portion."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".in_list"):
            _, values = node.args
            named = values.generators[0].iter if isinstance(values, ast.ListComp) else values
            if ast.unparse(named) != "portion":
                yield ast.unparse(values)


BOUNDED = {
    "admin/events/synapse.py": "a page for an administrator has 500 servers at most",
    "admin/rooms/synapse.py": "a page for an administrator has 500 rooms, or events, at most",
    "handlers/joins/reading.py": "a page for an administrator has 500 servers at most",
    "handlers/joins/detection/synapse.py": "a page has 100 positions and rooms at most, and no "
    "more than so many servers are named",
    "handlers/extremities/synapse.py": "the power levels and one member",
    "handlers/receipt/synapse.py": "so many at once",
    "homeserver/sticky_rows.py": "of one portion",
}
"""Where there are few in any case, and why."""


@pytest.mark.requirement("H3")
def test_no_statement_names_any_number_of_values() -> None:
    """SQLite refuses more than 32,766; then the same fails for ever."""
    found = {
        str(path.relative_to(ROOT / PACKAGE)): list(unbounded(path.read_text()))
        for path in (ROOT / PACKAGE).rglob("*.py")
    }
    assert {path for path, values in found.items() if values} == BOUNDED.keys()


@pytest.mark.requirement("H3")
def test_any_number_of_values_is_taken_in_portions() -> None:
    many = [f"${n}" for n in range(MORE_THAN_SQLITE_TAKES)]
    assert [len(portion) for portion in portions(many[:1_001])] == [500, 500, 1]
    assert list(portions([])) == []
    assert [one for portion in portions(many) for one in portion] == many


@pytest.mark.requirement("H3")
def test_more_events_than_a_database_takes_arguments(world: World, process: ThisProcess) -> None:
    """Their number is chosen by others."""
    table, writer = DeferredTable(process), SynapseWriter(process, Received(process))
    turns = SynapseTurns(process, Held())
    world.drive(migrate(process, table))
    now_ms = process.now_ms()
    events = [
        NewStickyEvent(f"${n}", "!a", "@a:there", now_ms + HOUR_MS, n)
        for n in range(MORE_THAN_SQLITE_TAKES)
    ]
    ids = [event.event_id for event in events]
    world.drive(
        process.transact(
            "test", table.insert_txn, [(event, "there", "per_room") for event in events]
        )
    )
    assert world.drive(table.release(ids, set(ids), writer.enter_txn)).room_ids == ["!a"]
    world.drive(table.drop(ids))
    assert world.drive(process.transact("test", turns.persisted_txn, ids)) == set()
    assert world.drive(process.transact("test", writer._entered_txn, set(ids))) == []
    assert world.drive(SynapseStickyStream(process).rows_of(ids)) == []
    assert world.drive(SynapseAsking(process).referenced(ids)) == set()
    assert world.drive(SynapseAsking(process).places(ids[:50])) == {}
    assert world.execute("SELECT COUNT(*) FROM synapse_sticky_deferred") == [(0,)]


@pytest.mark.requirement("H3")
def test_more_staged_pdus_than_a_database_takes_arguments(
    world: World, process: ThisProcess
) -> None:
    staged = 1_500 if process.is_postgres else MORE_THAN_SQLITE_TAKES
    rows = [
        ("there", "!a", n, f"${n}", json.dumps({"prev_events": [f"${n - 1}"]}), "{}")
        for n in range(staged)
    ]
    insert = (
        "INSERT INTO federation_inbound_events_staging"
        " (origin, room_id, received_ts, event_id, event_json, internal_metadata)"
        " VALUES (?, ?, ?, ?, ?, ?)"
    )
    world.drive(process.transact("test", lambda txn: txn.execute_batch(insert, rows)))
    pruning = SynapsePruning(process)
    keys = {("there", f"${n}") for n in range(staged)}
    page = world.drive(pruning._next_prunable("!a", RoomVersions.V11, lambda pdu: False))
    assert len(page) == 999
    world.drive(pruning._delete("!a", keys))
    assert world.execute("SELECT COUNT(*) FROM federation_inbound_events_staging") == [(0,)]
    world.execute("DELETE FROM federation_inbound_events_staging")
