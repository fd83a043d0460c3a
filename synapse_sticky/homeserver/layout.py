"""The layout of a duty's own tables in Synapse's database, and its migrations.

Each duty's tables have a version of their own (table ``synapse_sticky_layouts``), so that a duty
can be on while another is off. Version 0.1.0 of this module had one version for all tables (table
``synapse_sticky_layout``); its tables are version 1 of each duty's layout, and are taken over as
they are. That older table is left alone, so that a process of 0.1.0 works on the same tables.
"""

import logging
import re
from collections.abc import Sequence
from typing import Protocol

from synapse_sticky.homeserver.process import Cursor, Homeserver

logger = logging.getLogger(__name__)

Migrations = Sequence[Sequence[str]]
"""The SQL statements of each version of a layout.

Entries are only ever added, each statement can be run on what is there already (``IF NOT
EXISTS``, which SQLite gets from here for a column), and a process of the version before works on
with the tables of the next until it is restarted.
"""

_TABLE = r"CREATE TABLE IF NOT EXISTS (\w+)\s*\(\s*(\w+)"
"""A table that a migration makes, and its first column."""

_ADDED_COLUMN = re.compile(r"ALTER TABLE (\w+) ADD COLUMN IF NOT EXISTS (\w+)")

LAYOUTS_TABLE = "synapse_sticky_layouts"


class NewerLayoutError(Exception):
    """A later version of the module made the tables."""


class HasLayout(Protocol):
    """A duty's tables."""

    duty: str
    migrations: Migrations


def tables_of(migrations: Migrations) -> dict[str, str]:
    """The tables that the migrations make, each with its first column."""
    return dict(
        found
        for statements in migrations
        for statement in statements
        for found in re.findall(_TABLE, statement)
    )


async def migrate(homeserver: Homeserver, tables: HasLayout) -> None:
    """Brings a duty's tables to this version's layout; any number of processes may try at once.

    Fails if the tables cannot be read and written: a duty that finds that out in one of Synapse's
    own transactions would fail that.

    Raises:
        NewerLayoutError: a later version of the module has been here. Nothing was changed.
    """
    duty, migrations = tables.duty, tables.migrations

    def migrate_txn(txn: Cursor) -> None:
        txn.execute(
            "CREATE TABLE IF NOT EXISTS synapse_sticky_layouts"
            " (duty TEXT NOT NULL PRIMARY KEY, version BIGINT NOT NULL)"
        )
        txn.execute("SELECT version FROM synapse_sticky_layouts WHERE duty = ?", (duty,))
        row = txn.fetchone()
        version: int = row[0] if row else 0
        if version > len(migrations):
            raise NewerLayoutError(
                f"The tables of {duty} have layout {version}, this version of synapse-sticky knows"
                f" {len(migrations)}. Install the later version again."
            )
        for number, statements in enumerate(migrations[version:], start=version + 1):
            logger.info("Migrating the tables of %s to layout %d", duty, number)
            for statement in statements:
                _run_txn(txn, statement, homeserver)
        if version < len(migrations):
            txn.execute(
                "INSERT INTO synapse_sticky_layouts (duty, version) VALUES (?, ?)"
                " ON CONFLICT (duty) DO UPDATE SET version = EXCLUDED.version",
                (duty, len(migrations)),
            )
        for table, column in tables_of(migrations).items():
            # No row is touched, but the database checks what this role may do.
            txn.execute(f"INSERT INTO {table} SELECT * FROM {table} WHERE 1 = 0")
            txn.execute(f"UPDATE {table} SET {column} = {column} WHERE 1 = 0")
            txn.execute(f"DELETE FROM {table} WHERE 1 = 0")

    await homeserver.transact_alone(f"migrate_{duty}", migrate_txn)


def _run_txn(txn: Cursor, statement: str, homeserver: Homeserver) -> None:
    added = _ADDED_COLUMN.match(statement)
    if added and not homeserver.is_postgres:
        # SQLite does not know IF NOT EXISTS here.
        txn.execute("SELECT 1 FROM pragma_table_info(?) WHERE name = ?", (added[1], added[2]))
        if txn.fetchone() is not None:
            return
        statement = re.sub(_ADDED_COLUMN, r"ALTER TABLE \1 ADD COLUMN \2", statement)
    txn.execute(statement)
