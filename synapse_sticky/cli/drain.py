"""Whether anything waits that only the module does (``synapse-sticky drain``, E4)."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

import attr

from synapse_sticky.cli.report import ALL_FIT, SOMETHING_OFF

if TYPE_CHECKING:
    from synapse_sticky.cli.synapse import Configuration

_EVERY_S = 5


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Remaining:
    """What is in the database at one moment.

    waiting: how many of each kind wait for the module, by what they are called.
    own_tables: how many rows each of the module's tables has.
    unexpired: how many sticky events are in Synapse's table.
    """

    waiting: dict[str, int]
    own_tables: dict[str, int]
    unexpired: int

    def line(self) -> str:
        """What waits."""
        return ", ".join(f"{name}: {count}" for name, count in self.waiting.items())


def drain(
    paths: Sequence[str], *, once: bool = False, pause: Callable[[float], None] = time.sleep
) -> int:
    """Prints what waits until nothing does, and gives the exit code: 1 if something still waits.

    It only reads. What waits is done by the running module.

    Args:
        paths: the files of the configuration.
        once: whether to look once only.
        pause: waits for that many seconds.

    Raises:
        Exception: the configuration is wrong, or the database cannot be read.
    """
    # Synapse prints while it loads its configuration.
    with redirect_stdout(sys.stderr):
        from synapse_sticky.cli.synapse import Configuration

        configuration = Configuration(paths)
    for remark in _remarks(configuration):
        print(f"Remark: {remark}")
    said = ""
    while True:
        remaining = _look(configuration)
        if (line := remaining.line()) != said:
            print(line, flush=True)
            said = line
        if not any(remaining.waiting.values()):
            break
        if once:
            return SOMETHING_OFF
        pause(_EVERY_S)
    print("Nothing waits any more: the module can be taken out.")
    rows = ", ".join(f"{name} ({count})" for name, count in remaining.own_tables.items())
    print(f"Of the module these tables stay, with so many rows: {rows or 'none'}.")
    print(
        f"Synapse goes on with its own: sticky_events has {remaining.unexpired} unexpired events,"
        " destination_rooms_sticky_events_backlog what servers lack that could not be reached."
    )
    return ALL_FIT


def _remarks(configuration: "Configuration") -> Iterator[str]:
    """Why something may wait for longer, or anew."""
    from synapse_sticky.config import Mode

    sticky = configuration.sticky
    if sticky is None:
        yield "synapse_sticky.StickyEventsModule is not listed under `modules:`. Nobody does this."
        return
    if sticky.federation.applied().mode is not Mode.OFF:
        yield (
            f"`federation: {{mode: {sticky.federation.mode.value}}}` may defer events anew. With"
            " `off`, a restart releases all."
        )
    for duty in ("deferral", "parking", "joins"):
        if duty in sticky.native or not sticky.is_on(duty):
            yield f"{duty} is off by this configuration. What waits for it waits until it expires."


def _look(configuration: "Configuration") -> Remaining:
    from synapse_sticky.cli.synapse import LAYOUTS
    from synapse_sticky.homeserver import remaining
    from synapse_sticky.homeserver.database import columns_in
    from synapse_sticky.homeserver.layout import LAYOUTS_TABLE, tables_of

    now_ms = int(time.time() * 1000)
    with configuration.transaction() as cursor:
        there = columns_in(cursor, is_postgres=configuration.has_postgres)
        own = [*(name for t in LAYOUTS for name in tables_of(t.migrations)), LAYOUTS_TABLE]
        counts = {}
        for name in own:
            if name in there:
                cursor.execute(f"SELECT COUNT(*) FROM {name}")
                counts[name] = int(cursor.fetchone()[0])
        waiting = {}
        for table in LAYOUTS:
            if table.waiting and set(tables_of(table.migrations)) <= there.keys():
                name, sql = table.waiting
                cursor.execute(sql, (now_ms,))
                waiting[name] = int(cursor.fetchone()[0])
        waiting["staged sticky PDUs"] = remaining.staged_txn(cursor, now_ms)
        if "synapse_sticky_newcomers" in there:
            waiting["newcomers that lack events"] = remaining.lacking_txn(
                cursor, configuration.server_name, now_ms
            )
        return Remaining(waiting, counts, remaining.unexpired_txn(cursor, now_ms))
