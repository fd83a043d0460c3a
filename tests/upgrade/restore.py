"""Brings the dump of an installation of version 0.1.0 back, as if it had been made just now."""

import gzip
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from synapse.api.room_versions import KNOWN_ROOM_VERSIONS

from tests.lab import Client, Homeserver, Lab, Peer
from tests.upgrade.database import Database, empty_database
from tests.upgrade.installation import (
    HOME,
    dump_path,
    facts_of,
    key_from_text,
    make_server,
)

_DAY_MS = 24 * 3_600_000
_NEAR_MS = 2 * _DAY_MS


@contextmanager
def restored_database(engine: str) -> Iterator[Database]:
    """A database with what the dump has, all times moved to now. It is removed at the end."""
    with empty_database(engine) as database:
        database.run(gzip.decompress(dump_path(engine).read_bytes()).decode())
        made_ms: int = facts_of(engine)["made_ms"]
        move_times(database, made_ms, int(time.time() * 1000) - made_ms)
        yield database


def move_times(database: Database, made_ms: int, by_ms: int) -> None:
    """Moves what is a time to by so much later.

    It is every number of every table that is within two days of when the dump was made: there is
    none so large that means anything else. So what was unexpired in the dump is unexpired now, and
    for as long as it was then. That is true of Synapse's tables (``sticky_events.expires_at``,
    ``events.received_ts``, ``sliding_sync_connections``, the keys of other servers) and of the
    module's.

    The events themselves, in ``event_json`` and in the module's table of parked PDUs, stay as they
    are. The ID of an event is the hash of it, its ``origin_server_ts`` included, and Synapse does
    not give out one that does not fit its ID. That is no loss. Whether a persisted event is sticky
    is read from ``sticky_events`` and the module's tables. A parked PDU, which has yet to be
    persisted, is of the year 2100, so that it begins to be sticky when it was received.
    """
    between = f"BETWEEN {made_ms - _NEAR_MS} AND {made_ms + _NEAR_MS}"
    statements = []
    for table in database.tables():
        columns = database.columns(table).items()
        numbers = [f'"{name}"' for name, column in columns if "INT" in column.type.upper()]
        # Some columns must not be updated, not even none of their rows.
        counted = [f"COUNT(CASE WHEN {name} {between} THEN 1 END)" for name in numbers]
        counts = database.query(f"SELECT {', '.join(counted)} FROM {table}")[0] if counted else ()
        statements += [
            f"UPDATE {table} SET {name} = {name} + ({by_ms}) WHERE {name} {between};"
            for name, count in zip(numbers, counts, strict=True)
            if count
        ]
    database.run("\n".join(statements))


def make_restored_server(
    lab: Lab, database: Database, facts: Any, peers: dict[str, Peer], config: object
) -> Homeserver:
    """The homeserver of the dump, not started yet.

    It listens on ports of its own, and has its old name. Clients find it by the port, and so do
    the peers. It finds the peers by their old names.
    """
    assert facts["server_name"] == HOME
    server = make_server(lab, database, peers, config, facts["secrets"])
    (server.folder / "signing.key").write_text(facts["signing_key"])
    server.signing_key = key_from_text(facts["signing_key"])
    return server


def come_back(peer: Peer, name: str, facts: Any) -> None:
    """Has the peer be the server of this name in the dump."""
    peer.name = name
    peer.signing_key = key_from_text(facts["peers"][name])
    joined = facts["joins"]
    # What it needs to know of a room to take PDUs.
    peer._versions[joined["room_id"]] = KNOWN_ROOM_VERSIONS[joined["room_version"]]
    if name == facts["parking"]["origin"]:
        peer.events.update(facts["parking"]["pdus"])


def client_of(server: Homeserver, user: dict[str, str]) -> Client:
    """A user of the dump, with the device and the access token that they had."""
    return Client(server.base_url, user["user_id"], user["access_token"])
