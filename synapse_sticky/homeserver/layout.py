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
from synapse_sticky.homeserver.remaining import of_others_txn

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

Waiting = tuple[str, str] | None
"""What rows are called that wait, and the SQL for their number now (``?``, in ms); or None."""

LAYOUTS_TABLE = "synapse_sticky_layouts"


class NewerLayoutError(Exception):
    """A later version of the module made the tables."""


class HasLayout(Protocol):
    """A duty's tables.

    contents: what is in them; for the log, should that have been left behind somewhere. Empty for
        tables that are so new that nobody can have left them.
    waiting: what of it only the module ever does, and the SQL that counts that.
    """

    duty: str
    migrations: Migrations
    contents: str
    waiting: Waiting


def tables_of(migrations: Migrations) -> dict[str, str]:
    """The tables that the migrations make, each with its first column."""
    return dict(
        found
        for statements in migrations
        for statement in statements
        for found in re.findall(_TABLE, statement)
    )


def versions_txn(txn: Cursor, *, is_postgres: bool) -> dict[str, int]:
    """The layout version of each duty's tables, as far as the database has them."""
    if not _is_there_txn(txn, LAYOUTS_TABLE, is_postgres):
        return {}
    txn.execute(f"SELECT duty, version FROM {LAYOUTS_TABLE}")
    return {duty: int(version) for duty, version in txn.fetchall()}


async def migrate(homeserver: Homeserver, tables: HasLayout) -> None:
    """Brings a duty's tables to this version's layout; any number of processes may try at once.

    Says what may be missing if it had to make them beside sticky events of before (E4).

    Raises:
        NewerLayoutError: a later version of the module has been here. Nothing was changed.
    """

    def run_txn(txn: Cursor) -> bool:
        return migrate_txn(txn, tables, is_postgres=homeserver.is_postgres)

    if await homeserver.transact_alone(f"migrate_{tables.duty}", run_txn) and tables.contents:
        await _say_what_may_be_missing(homeserver, tables)


def migrate_txn(txn: Cursor, tables: HasLayout | type[HasLayout], *, is_postgres: bool) -> bool:
    """The same, in a transaction that no other process has at the same time. Were tables made?

    Fails if the tables cannot be read and written: a duty that finds that out in one of Synapse's
    own transactions would fail that.

    Raises:
        NewerLayoutError: a later version of the module has been here. Nothing was changed.
    """
    duty, migrations = tables.duty, tables.migrations
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
    # Version 0.1.0 left the first tables, and no row here.
    before = tables_of(migrations[: version or 1])
    were_there = all(_is_there_txn(txn, table, is_postgres) for table in before)
    if not were_there:
        version = 0  # whatever is said of them: a copy of the database may lack some
    for number, statements in enumerate(migrations[version:], start=version + 1):
        logger.info("Migrating the tables of %s to layout %d", duty, number)
        for statement in statements:
            _run_txn(txn, statement, is_postgres)
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
    return not were_there


def _is_there_txn(txn: Cursor, table: str, is_postgres: bool) -> bool:
    txn.execute(
        "SELECT 1 WHERE to_regclass(?) IS NOT NULL"
        if is_postgres
        else "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?",
        (table,),
    )
    return txn.fetchone() is not None


async def _say_what_may_be_missing(homeserver: Homeserver, tables: HasLayout) -> None:
    """Where the database was copied without the module's tables, nobody else would notice."""
    try:
        count = await homeserver.transact(
            "of_others", of_others_txn, homeserver.server_name, homeserver.now_ms()
        )
    except Exception:
        # It is no more than a hint.
        logger.debug("Could not count the sticky events of other servers", exc_info=True)
        return
    if count:
        logger.warning(
            "The tables of %s are new, beside %d unexpired sticky events of other servers. At the"
            " first start with this module that is as it should be. Else the database was copied"
            " without these tables, and what was in them is missing: %s",
            *(tables.duty, count, tables.contents),
        )


def _run_txn(txn: Cursor, statement: str, is_postgres: bool) -> None:
    added = _ADDED_COLUMN.match(statement)
    if added and not is_postgres:
        # SQLite does not know IF NOT EXISTS here.
        txn.execute("SELECT 1 FROM pragma_table_info(?) WHERE name = ?", (added[1], added[2]))
        if txn.fetchone() is not None:
            return
        statement = re.sub(_ADDED_COLUMN, r"ALTER TABLE \1 ADD COLUMN \2", statement)
    txn.execute(statement)
