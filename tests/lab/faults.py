"""The module in a process that crashes, or whose database fails, when it is told: for tests only.

A fault is armed by a file in the server's folder, while the server runs or before it starts. So is
a clock that is wrong.
"""

import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

import attr
from synapse.module_api import ModuleApi

import synapse_sticky.module
from synapse_sticky import StickyEventsModule
from synapse_sticky.adapter import SynapseHomeserver
from synapse_sticky.config import StickyConfig
from synapse_sticky.homeserver import Cursor, NewStickyEvent
from tests.lab.homeserver import Homeserver

FAULTY_MODULE = "tests.lab.faults.FaultyModule"
_FILE = "fault.json"
_CLOCK = "clock.json"


@attr.s(auto_attribs=True, frozen=True)
class Fault:
    """What is to happen, once.

    transaction: one of the module's transactions, by its name; ``persist`` is Synapse's own in
        which the module decides what is deferred.
    moment: ``before``, ``inside`` (all is done but the commit) or ``after`` it.
    kind: ``kill``, the process is gone; or ``error``, the database fails.
    """

    transaction: str
    moment: str
    kind: str

    def arm(self, folder: Path) -> None:
        """For the server whose folder this is."""
        waiting = folder / (_FILE + ".new")
        waiting.write_text(json.dumps(attr.asdict(self)))
        waiting.rename(folder / _FILE)

    def strike(self) -> NoReturn:
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise sqlite3.OperationalError(f"a fault {self.moment} {self.transaction}")


def has_struck(folder: Path) -> bool:
    """Has what was armed happened?"""
    return not (folder / _FILE).exists()


def take(transaction: str, *moments: str) -> Fault | None:
    """The fault that is armed for this transaction and one of these moments, if there is one.

    It is not armed any more then.
    """
    path = Path(_FILE)
    try:
        fault = Fault(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    if fault.transaction != transaction or fault.moment not in moments:
        return None
    path.unlink()
    return fault


def set_clock(server: Homeserver, offset_s: float) -> None:
    """Has the clock of a running server jump: it is so far from the true time then."""
    (server.folder / _CLOCK).write_text(json.dumps(offset_s))
    assert server.process is not None
    server.process.send_signal(signal.SIGUSR2)


def _install_clock() -> None:
    from twisted.internet import reactor

    offset_s = 0.0

    def read(*_: object) -> None:
        nonlocal offset_s
        offset_s = json.loads(Path(_CLOCK).read_text())

    # What Twisted and Synapse ask for the time.
    setattr(reactor, "seconds", lambda: time.time() + offset_s)  # noqa: B010
    signal.signal(signal.SIGUSR2, read)


class FaultyHomeserver(SynapseHomeserver):
    """Fails as it is told."""

    def __init__(self, api: ModuleApi) -> None:
        super().__init__(api)
        original = self.writer.hold_back

        def hold_back(hold_txn: Callable[[Cursor, Sequence[NewStickyEvent]], Any]) -> None:
            def faulty_hold_txn(txn: Cursor, events: Sequence[NewStickyEvent]) -> Collection[str]:
                if fault := take("persist", "before"):
                    fault.strike()
                held: Collection[str] = hold_txn(txn, events)
                if fault := take("persist", "inside", "after"):
                    if fault.moment == "inside":
                        fault.strike()
                    txn.call_after(fault.strike)
                return held

            original(faulty_hold_txn)

        self.writer.hold_back = hold_back  # type: ignore[method-assign]

    async def transact(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        if fault := take(what, "before"):
            fault.strike()

        def run_txn(txn: Cursor, *args: Any) -> Any:
            result = function(txn, *args)
            if fault := take(what, "inside"):
                fault.strike()
            return result

        result = await super().transact(what, run_txn, *args)
        if fault := take(what, "after"):
            fault.strike()
        return result


class FaultyModule(StickyEventsModule):
    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        setattr(synapse_sticky.module, "SynapseHomeserver", FaultyHomeserver)  # noqa: B010
        _install_clock()
        super().__init__(config, api)
