"""What staged PDUs cost: each check of a transaction, and the next PDU to be processed (H3)."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harm import Case, Figures, Goal
from tests.lab import Lab
from tests.unit.staging import CountingStore, prepared
from tests.unit.test_limits_in_synapse import HOUR_MS, ROOM
from tests.unit.test_receipt import ORIGIN, Checked, ids
from tests.unit.test_staged import WITH_TURNS, Processing, stage_chains

_CHECKS = 150
_PDUS = 300


@contextmanager
def _store() -> Iterator[CountingStore]:
    # Synapse says of each transaction that nobody waits for it.
    logging.getLogger("synapse").setLevel(logging.CRITICAL)
    with (
        TemporaryDirectory() as folder,
        prepared("postgres", Path(folder)) as hs,
        closing(CountingStore(hs)) as store,
    ):
        yield store


def _cpu_s(store: CountingStore) -> float:
    """What this process and its one connection's process of Postgres have used."""
    ((pid,),) = store.sql("SELECT pg_backend_pid()")
    # The second field is a name in brackets. User and system time are the 14th and 15th.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def checks(lab: Lab, size: int) -> Figures:
    """A server with many staged PDUs sends transactions one by one, and all are refused."""
    with _store() as store:
        store.stage(ORIGIN, ROOM, ids("sticky", 3_000 * size), HOUR_MS)
        store.analyze()
        checked = Checked(store)
        start_s = _cpu_s(store)
        refused = sum(checked.retry_after_ms() is not None for _ in range(_CHECKS))
        took_s = _cpu_s(store) - start_s
        assert refused == _CHECKS
        return {"CPU": took_s}


def processing(lab: Lab, size: int) -> Figures:
    """PDUs of four servers, as Synapse takes them out of the staging area."""
    with _store() as store:
        stage_chains(store, "pdu", 5_000 * size)
        taking = Processing(store, WITH_TURNS)
        start_s = _cpu_s(store)
        for _ in range(_PDUS):
            taking.process()
        return {"CPU per PDU": (_cpu_s(store) - start_s) * 1_000 / _PDUS}


CASES = (
    Case(
        "staged: 150 transactions of a server that has 12,000 staged PDUs",
        checks,
        {"CPU": Goal(5, growth=5, unit="s")},
    ),
    Case(
        "staged: the next of 20,000 PDUs that are staged for a room",
        processing,
        {"CPU per PDU": Goal(5, growth=1.5, unit="ms")},
    ),
)
