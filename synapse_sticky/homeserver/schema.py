"""Whether Synapse has brought its database to the layout that this Synapse wants."""

import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any

from synapse_sticky.homeserver.fitting import Columns, resolve
from synapse_sticky.homeserver.seams import Attribute, table

_SCHEMA = "synapse.storage.schema"

SEAMS = (
    Attribute(_SCHEMA, "SCHEMA_VERSION"),
    table("schema_version", "version integer, upgraded boolean"),
    table("applied_schema_deltas", "version integer, file text"),
)


def is_to_be_migrated(
    cursor: Any, columns: Columns, databases: Collection[str], *, is_postgres: bool
) -> bool:
    """Will Synapse make or change tables here when it starts?

    Args:
        cursor: one of ``database.connect``.
        columns: those of the database.
        databases: the parts of Synapse's tables that are in this database, ``main`` or ``state``.
    """
    if "schema_version" not in columns:
        return True
    cursor.execute("SELECT version, upgraded FROM schema_version")
    row = cursor.fetchone()
    if row is None:
        return True
    version, upgraded = row
    newest = resolve(_SCHEMA).SCHEMA_VERSION
    if version != newest or not upgraded:
        # Tables that were made in this version have all that belongs to it.
        return bool(version < newest)
    cursor.execute("SELECT file FROM applied_schema_deltas WHERE version = ?", (version,))
    applied = {file for (file,) in cursor.fetchall()}
    return not _deltas(version, databases, is_postgres) <= applied


def _deltas(version: int, databases: Collection[str], is_postgres: bool) -> set[str]:
    """The files with this version's changes, as Synapse notes those that it has applied."""
    folder = Path(inspect.getfile(resolve(_SCHEMA))).parent
    ends = (".py", ".sql", ".sql.postgres" if is_postgres else ".sql.sqlite")
    return {
        f"{version}/{path.name}"
        for part in ("common", *databases)
        for path in (folder / part / "delta" / str(version)).glob("*")
        if path.name.endswith(ends)
    }
