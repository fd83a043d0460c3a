"""The module's tables in a database that is still empty (``synapse-sticky migrate-tables``, E4).

``synapse_port_db`` copies the tables only that are on both sides.
"""

import sys
import time
from collections.abc import Sequence

from synapse_sticky.cli.report import ALL_FIT, NO_START, SOMETHING_OFF

# What needs any part of Synapse is imported where it is used: that one is gone is to be said.


def migrate_tables(paths: Sequence[str]) -> int:
    """Makes the tables in the Postgres of the configuration, and gives the exit code.

    Exit code 1: they are there now, but sticky events of other servers were there before them.

    Args:
        paths: the files of the configuration.

    Raises:
        Exception: the configuration is wrong, or the database refuses.
    """
    from synapse_sticky.cli.synapse import LAYOUTS, Configuration
    from synapse_sticky.homeserver.database import columns_in
    from synapse_sticky.homeserver.layout import migrate_txn
    from synapse_sticky.homeserver.process import take_turn_txn
    from synapse_sticky.homeserver.remaining import of_others_txn

    configuration = Configuration(paths)
    if not configuration.has_postgres:
        print(
            "The configuration has SQLite, where the start makes the tables. Give the one with the"
            " Postgres that is to be copied to.",
            file=sys.stderr,
        )
        return NO_START
    with configuration.transaction() as cursor:
        take_turn_txn(cursor)
        made = [t for t in LAYOUTS if migrate_txn(cursor, t, is_postgres=True)]
        older = 0
        if made and "sticky_events" in columns_in(cursor, is_postgres=True):
            now_ms = int(time.time() * 1000)
            older = of_others_txn(cursor, configuration.server_name, now_ms)
    for table in LAYOUTS:
        print(f"{table.duty}: its tables {'are made' if table in made else 'were there'}.")
    if not older:
        return ALL_FIT
    print(
        f"{older} unexpired sticky events of other servers were there before the tables. If Synapse"
        " has not been started on this database yet, run synapse_port_db once more. Else what was"
        " in the tables of the other database is missing."
    )
    return SOMETHING_OFF
