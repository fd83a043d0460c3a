"""What an answer of the API for administrators costs with many rows, on SQLite and Postgres.

``python -m benchmarks.admin``
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from synapse_sticky.admin.actions import Actions
from synapse_sticky.admin.api import Api
from synapse_sticky.admin.installing import make_api
from synapse_sticky.admin.requests import Request
from synapse_sticky.admin.tables import ActionTable
from synapse_sticky.config import parse
from synapse_sticky.handlers.deferral.reading import DeferredReader
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.joins.reading import NewcomerReader
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.handlers.staging.parking.reading import ParkedReader
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.homeserver.rooms import Rooms
from synapse_sticky.lately import Lately
from tests.lab.postgres import Postgres
from tests.lab.say import say
from tests.unit.members import ThisProcess, World

ROWS, PARKED, ROOMS, SERVERS = 50_000, 5_000, 1_000, 500
PDU_BYTES = 20_000
RUNS = 5
_HOUR_MS = 3_600_000


def fill(world: World, process: ThisProcess) -> None:
    """So many active, deferred and staged events; the first room and server have half of them."""
    for table in (DeferredTable, NewcomerTable, ParkedTable, ActionTable):
        world.drive(migrate(process, table(process)))
    ends_ms = world.now_ms() + _HOUR_MS

    def at(number: int, names: int) -> int:
        return 0 if number % 2 else number % names

    def write_txn(txn: Any) -> None:
        def insert(table: str, columns: str, rows: list[tuple[Any, ...]]) -> None:
            marks = ", ".join("?" * len(rows[0]))
            txn.execute_batch(f"INSERT INTO {table} ({columns}) VALUES ({marks})", rows)

        def of(n: int) -> tuple[str, str, str]:
            server = f"server{at(n, SERVERS)}.example"
            return f"!room{at(n, ROOMS)}", f"@user{n % 2_000}:{server}", server

        insert("rooms", "room_id, is_public", [(f"!room{n}", False) for n in range(ROOMS)])
        insert(
            "sticky_events",
            "stream_id, instance_name, event_id, room_id, sender, expires_at,"
            " event_stream_ordering",
            [(n, "master", f"$a{n}", *of(n)[:2], ends_ms, n) for n in range(1, ROWS + 1)],
        )
        insert(
            "synapse_sticky_deferred",
            "event_id, room_id, sender, server, expires_at_ms, event_stream_ordering, past_limit,"
            " deferred_ms",
            [(f"$d{n}", *of(n), ends_ms, n, "per_server", 1) for n in range(ROWS)],
        )
        pdu = json.dumps({"sender": "@a:b", "type": "m.call", "content": "x" * PDU_BYTES})
        insert(
            "synapse_sticky_incomplete",
            "origin, event_id, room_id, event_json, internal_metadata, prev_event_ids,"
            " received_ts_ms, until_ms, due_ms, reason",
            [
                (of(n)[2], f"$p{n}", of(n)[0], pdu, "{}", "[]", n, ends_ms, 1, "its prev_events")
                for n in range(PARKED)
            ],
        )
        insert(
            "federation_inbound_events_staging",
            "origin, room_id, event_id, received_ts, event_json, internal_metadata",
            [(of(n)[2], of(n)[0], f"$s{n}", n, pdu[:2_000], "{}") for n in range(ROWS)],
        )
        insert(
            "destination_rooms_sticky_events_backlog",
            "destination, room_id, sticky_events_stream_position",
            [(f"server{n % 500}.example", f"!room{n // 500}", 1) for n in range(5_000)],
        )

    world.drive(process.transact("fill", write_txn))


def measure(world: World, api: Api, path: str, **query: Any) -> float:
    """The median of some answers, in ms."""
    request = Request("GET", path.split("/"), {k: [str(v)] for k, v in query.items()}, {}, "@a:h")
    took = []
    for _ in range(RUNS):
        start_s = time.perf_counter()
        world.drive(api.answer(request))
        took.append((time.perf_counter() - start_s) * 1_000)
    return statistics.median(took)


def run(kind: str, folder: Path, settings: dict[str, Any] | None) -> None:
    """Prints what each answer takes on this kind of database."""
    world = World(folder, settings)
    config = parse({})
    with world.process() as process:
        fill(world, process)
        rooms, table = Rooms(process), ActionTable(process)
        readers = DeferredReader(process, config.federation), ParkedReader()
        api = make_api(
            *(process, config, rooms, *readers, NewcomerReader(process)),
            *(Actions(process, rooms, table, config.federation, lambda: None), table),
            Lately(process.now_ms),
        )
        for path, query in (
            ("overview", {}),
            ("rooms", {}),
            ("rooms", {"order_by": "deferred", "limit": 500}),
            ("rooms/!room0/events", {"limit": 500}),
            ("rooms/!room0/events", {"limit": 500, "from": "deferred~"}),
            ("rooms/!room0/events", {"limit": 500, "from": "parked~"}),
            ("servers", {"limit": 500}),
            ("events/$s1", {}),
            ("events/$p1", {}),
            ("events/$nowhere", {}),
            ("actions", {}),
        ):
            shown = f"{path} {query or ''}"
            say(f"{kind:9} {shown:60} {measure(world, api, path, **query):7.1f} ms")
    world.close()


def main() -> None:
    """Measures all."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run("SQLite", folder, None)
        postgres = stack.enter_context(Postgres())
        run("Postgres", folder, postgres.new_database())


if __name__ == "__main__":
    main()
