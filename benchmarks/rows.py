"""Bytes of rows and indexes after an hour at 50 sticky events a second, on Postgres.

``python -m benchmarks.rows``

Time is compressed: a simulated minute has the statements of a minute, in the module's own
transactions. After each minute, as often as autovacuum wakes, this vacuums the tables that
autovacuum would take by its default rule. Autovacuum itself is off, as it does not know of the
simulated time.
"""

import argparse
from contextlib import closing
from typing import Any

import psycopg2
from psycopg2.extras import execute_values

from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.handlers.sliding.tables import PageTable
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from tests.lab.postgres import Postgres
from tests.lab.say import say

PER_SECOND = 50
BATCH = 50
ROOMS, SERVERS, SENDERS = 200, 100, 2_000

# As Synapse makes it.
_STREAM = (
    "CREATE TABLE sticky_events (stream_id INTEGER NOT NULL PRIMARY KEY, instance_name TEXT"
    " NOT NULL, event_id TEXT NOT NULL, room_id TEXT NOT NULL, event_stream_ordering INTEGER"
    " NOT NULL UNIQUE, sender TEXT NOT NULL, expires_at BIGINT NOT NULL)",
    "CREATE INDEX sticky_events_room_idx ON sticky_events (room_id, event_stream_ordering)",
)
_HOUR_MS = 3_600_000


class Rows:
    """The tables, and how many dead rows each has since its last vacuum.

    Args:
        waiting_s: how long each event is deferred.
        parked_share: of how many events one is parked, which is put off four times.
    """

    def __init__(self, connection: Any, waiting_s: int, parked_share: int) -> None:
        self._connection = connection
        self._cursor = connection.cursor()
        self._waiting = waiting_s * PER_SECOND
        self._parked_share = parked_share
        self._number = 0
        self._deferred: list[str] = []
        self._dead: dict[str, int] = {}
        self._cursor.execute("SET synchronous_commit = off")
        for statement in _STREAM:
            self._cursor.execute(statement)
        for table in (DeferredTable, NewcomerTable, PageTable, ParkedTable):
            for step in table.migrations:
                for statement in step:
                    self._cursor.execute(statement)
        for name in self.names():
            self._cursor.execute(f"ALTER TABLE {name} SET (autovacuum_enabled = false)")

    def names(self) -> list[str]:
        """All tables."""
        self._cursor.execute(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname LIKE '%sticky%'"
            " ORDER BY relname"
        )
        return [name for (name,) in self._cursor.fetchall()]

    def minute(self, at_ms: int) -> None:
        """A minute that begins at this time."""
        for second in range(0, 60, BATCH // PER_SECOND):
            self._batch(at_ms + second * 1_000)
        # So Synapse does once an hour.
        if at_ms % _HOUR_MS == _HOUR_MS - 60_000:
            self._delete("sticky_events", "expires_at < %s", at_ms + 60_000)
        self._vacuum()

    def _batch(self, at_ms: int) -> None:
        numbers = range(self._number, self._number + BATCH)
        self._number += BATCH
        events = [
            (
                f"${number:043d}",
                f"!{number % ROOMS:043d}",
                f"@user-{number % SENDERS}:server-{number % SERVERS}.example.org",
                at_ms + _HOUR_MS,
                number,
            )
            for number in numbers
        ]
        # Each is deferred when it is persisted, and enters the stream when it is released.
        self._insert(
            "synapse_sticky_deferred"
            " (event_id, room_id, sender, expires_at_ms, event_stream_ordering, server)",
            [(*event, f"server-{event[4] % SERVERS}.example.org") for event in events],
        )
        self._deferred += [event[0] for event in events]
        self._insert(
            "sticky_events (event_id, room_id, sender, expires_at, event_stream_ordering,"
            " stream_id, instance_name)",
            [(*event, event[4], "master") for event in events],
        )
        released = self._deferred[: -self._waiting][:BATCH]
        del self._deferred[: len(released)]
        self._delete("synapse_sticky_deferred", "event_id = ANY(%s)", released)
        self._park(events[:: self._parked_share], at_ms)
        user = f"@user-{self._number % SENDERS}:here.example.org"
        self._insert(
            "synapse_sticky_pages (user_id, device_id, connection, token, older, noted_ts_ms)",
            [(user, "DEVICEID12", "", str(self._number), "s1_2_3_4_5", at_ms)],
        )
        self._delete("synapse_sticky_pages", "noted_ts_ms < %s", at_ms - _HOUR_MS)

    def _park(self, events: list[Any], at_ms: int) -> None:
        self._insert(
            "synapse_sticky_incomplete (origin, event_id, room_id, event_json, internal_metadata,"
            " prev_event_ids, received_ts_ms, until_ms, due_ms)",
            [
                (
                    *(f"server-{number % SERVERS}.example.org", event_id, room_id),
                    *("x" * 1_500, "{}", "[]", at_ms, until_ms, at_ms),
                )
                for event_id, room_id, _, until_ms, number in events
            ],
        )
        name = "synapse_sticky_incomplete"
        # Each is tried at growing distance, until it is complete.
        tried_ms = [at_ms - after_s * 1_000 for after_s in (1, 3, 10, 30)]
        self._cursor.execute(
            f"UPDATE {name} SET due_ms = %s WHERE received_ts_ms = ANY(%s)", (at_ms, tried_ms)
        )
        self._dead[name] = self._dead.get(name, 0) + self._cursor.rowcount
        self._delete(name, "received_ts_ms <= %s", at_ms - 60_000)

    def _insert(self, into: str, rows: list[Any]) -> None:
        execute_values(self._cursor, f"INSERT INTO {into} VALUES %s", rows, page_size=BATCH)

    def _delete(self, name: str, where: str, argument: object) -> None:
        self._cursor.execute(f"DELETE FROM {name} WHERE {where}", (argument,))
        self._dead[name] = self._dead.get(name, 0) + self._cursor.rowcount

    def _vacuum(self) -> None:
        """As autovacuum does by default: past 50 dead rows and a fifth of the live ones."""
        for name in self.names():
            self._cursor.execute(f"SELECT COUNT(*) FROM {name}")
            (live,) = self._cursor.fetchone()
            if self._dead.get(name, 0) > 50 + 0.2 * live:
                self._cursor.execute(f"VACUUM {name}")
                self._dead[name] = 0

    def sizes(self) -> list[tuple[str, str, int, int]]:
        """Each table and index: its table, its name, the table's rows, and its bytes."""
        found = []
        for table in self.names():
            self._cursor.execute(f"SELECT COUNT(*) FROM {table}")
            (live,) = self._cursor.fetchone()
            self._cursor.execute(
                "SELECT %s UNION ALL SELECT indexrelid::regclass::text FROM pg_index"
                " WHERE indrelid = %s::regclass",
                (table, table),
            )
            for (name,) in self._cursor.fetchall():
                self._cursor.execute("SELECT pg_relation_size(%s::regclass)", (name,))
                found.append((table, name, live, self._cursor.fetchone()[0]))
        return found


def main() -> None:
    """One run of some hours; the sizes after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=int, default=2)
    parser.add_argument("--waiting", type=int, default=30, help="seconds that each is deferred")
    parser.add_argument("--parked", type=int, default=50, help="of how many events one is parked")
    args = parser.parse_args()
    with Postgres() as postgres:
        settings = postgres.new_database()["args"]
        with closing(
            psycopg2.connect(
                host=settings["host"], user=settings["user"], dbname=settings["database"]
            )
        ) as connection:
            connection.autocommit = True
            rows = Rows(connection, args.waiting, args.parked)
            start_ms = 1_800_000_000_000
            for hour in range(args.hours):
                for minute in range(60):
                    rows.minute(start_ms + (hour * 60 + minute) * 60_000)
                say(f"After {hour + 1} h at {PER_SECOND} events a second:")
                for table, name, live, size in rows.sizes():
                    of = f"{live} rows" if name == table else f"index of {table}"
                    say(f"{name}: {size / 1_000_000:.2f} MB ({of})")


if __name__ == "__main__":
    main()
