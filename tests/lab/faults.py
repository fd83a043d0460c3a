"""The module in a process that crashes or panics, or whose database fails, when it is told.

For tests only.

A fault is armed by a file in the server's folder, while the server runs or before it starts. So is
a clock that is wrong.
"""

import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import attr
from synapse.module_api import ModuleApi
from synapse.replication.tcp.streams._base import StickyEventsStream

import synapse_sticky.handlers.deferral.synapse
import synapse_sticky.wiring
from synapse_sticky import _core
from synapse_sticky.config import StickyConfig
from synapse_sticky.handlers.deferral.handler import NewStickyEvent
from synapse_sticky.handlers.deferral.synapse import SynapseWriter
from synapse_sticky.homeserver import Cursor
from synapse_sticky.homeserver import Homeserver as Process
from synapse_sticky.homeserver.received import Received
from tests.lab import starter
from tests.lab.homeserver import Homeserver
from tests.lab.probe import ProbedModule

FAULTY_MODULE = "tests.lab.faults.FaultyModule"
_FILE = "fault.json"


@attr.s(auto_attribs=True, frozen=True)
class Fault:
    """What is to happen.

    transaction: one of the module's transactions, by its name; ``persist`` is Synapse's own in
        which the module decides what is deferred.
    moment: ``before``, ``inside`` (all is done but the commit) or ``after`` it.
    kind: ``kill``, the process is gone; or ``error``, the database fails.
    times: how often. Synapse itself begins a transaction anew up to five times.
    """

    transaction: str
    moment: str
    kind: str
    times: int = 1

    def arm(self, folder: Path) -> None:
        """For the server whose folder this is."""
        waiting = folder / (_FILE + ".new")
        waiting.write_text(json.dumps(attr.asdict(self)))
        waiting.rename(folder / _FILE)

    def strike(self, error: type[Exception]) -> NoReturn:
        """Does it; ``error`` is what the database's driver raises."""
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise error(f"a fault {self.moment} {self.transaction}")


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
        if fault.transaction != transaction or fault.moment not in moments:
            return None
        if fault.times > 1:
            attr.evolve(fault, times=fault.times - 1).arm(Path())
        else:
            path.unlink()
    except FileNotFoundError:
        # There is none, or another process of the server took it.
        return None
    return fault


def panic_in(name: str, calls: int) -> None:
    """Has the next calls in this process panic: of the objects of a class of the Rust core, of a
    function, or those that convert an argument of this name."""
    getattr(_core, "_panic_in")(name, calls)  # noqa: B009  # only there for tests


def arm_panics(server: Homeserver, name: str, calls: int) -> None:
    """Does the same in a running server."""
    _panics_path(server.folder).write_text(json.dumps([name, calls]))
    for process in server.running():
        process.send_signal(signal.SIGUSR1)


def _panics_path(folder: Path) -> Path:
    return folder / "panics.json"


def _install_panics() -> None:
    def read(*_: object) -> None:
        name, calls = json.loads(_panics_path(Path()).read_text())
        panic_in(name, calls)
        _panics_path(Path()).unlink(missing_ok=True)

    signal.signal(signal.SIGUSR1, read)


def panics_are_armed(server: Homeserver) -> bool:
    """Has a running server of one process taken what was armed?"""
    return not _panics_path(server.folder).exists()


def set_clock(server: Homeserver, offset_s: float) -> None:
    """Has the clock of a running server jump: it is so far from the true time then."""
    for process in server.running():
        set_clock_of(process, server.folder, offset_s)


def set_clock_of(process: starter.Process, folder: Path, offset_s: float) -> None:
    """The same for one process of a server of many."""
    _clock_path(folder, process.pid).write_text(json.dumps(offset_s))
    process.send_signal(signal.SIGUSR2)


def _clock_path(folder: Path, process: int) -> Path:
    return folder / f"clock.{process}.json"


def install_clock() -> None:
    from twisted.internet import reactor

    offset_s = 0.0

    def read(*_: object) -> None:
        nonlocal offset_s
        offset_s = json.loads(_clock_path(Path(), os.getpid()).read_text())

    # What Twisted and Synapse ask for the time.
    setattr(reactor, "seconds", lambda: time.time() + offset_s)  # noqa: B010
    signal.signal(signal.SIGUSR2, read)


@contextmanager
def without_new_rows(folder: Path, name: str) -> Iterator[None]:
    """This process of the server sees nothing new of the sticky events stream meanwhile."""
    path = _holding_path(folder, name)
    path.touch()
    try:
        yield
    finally:
        path.unlink()


def _holding_path(folder: Path, name: str) -> Path:
    return folder / f"holding.{name}"


class _HeldRows:
    """What replication says of the sticky events stream, held back while a file is there."""

    def __init__(self, homeserver: Process) -> None:
        self._hs = homeserver
        self._path = _holding_path(Path(), homeserver.instance_name)
        self._held: list[Callable[[], None]] = []
        self._notifier = homeserver.hs.get_notifier()
        store = homeserver.store
        for name in ("process_replication_rows", "process_replication_position"):
            setattr(store, name, partial(self._process, getattr(store, name)))

    def _process(self, process: Callable[..., None], stream_name: str, *args: Any) -> None:
        go_on = partial(process, stream_name, *args)
        if stream_name == StickyEventsStream.NAME and (self._held or self._path.exists()):
            if not self._held:
                self._look_later()
            self._held.append(go_on)
        else:
            go_on()

    def _look_later(self) -> None:
        self._hs.call_later(100, "look_at_held_rows", self._look)

    async def _look(self) -> None:
        if self._path.exists():
            self._look_later()
            return
        held, self._held = self._held, []
        for go_on in held:
            go_on()
        self._notifier.notify_replication()


class FaultyHomeserver(Process):
    """Fails as it is told."""

    def __init__(self, api: ModuleApi) -> None:
        super().__init__(api)
        _HeldRows(self)
        self.error: type[Exception] = self.store.database_engine.module.OperationalError

    async def transact(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        return await self._faulty(super().transact, what, function, *args)

    async def transact_alone(self, what: str, function: Callable[..., Any]) -> Any:
        return await self._faulty(super().transact_alone, what, function)

    async def _faulty(
        self,
        transact: Callable[..., Awaitable[Any]],
        what: str,
        function: Callable[..., Any],
        *args: Any,
    ) -> Any:
        if fault := take(what, "before"):
            fault.strike(self.error)

        def run_txn(txn: Cursor, *args: Any) -> Any:
            result = function(txn, *args)
            if fault := take(what, "inside"):
                fault.strike(self.error)
            return result

        result = await transact(what, run_txn, *args)
        if fault := take(what, "after"):
            fault.strike(self.error)
        return result


class FaultyWriter(SynapseWriter):
    """The transaction in which Synapse persists events fails as it is told."""

    def __init__(self, homeserver: FaultyHomeserver, received: Received) -> None:
        super().__init__(homeserver, received)
        self._error = homeserver.error

    def defer_by(
        self, defer_txn: Callable[[Cursor, Sequence[NewStickyEvent]], Collection[str]]
    ) -> None:
        super().defer_by(defer_txn)
        # All that is persisted comes by here, also what is not sticky.
        self._homeserver.replace(self._store, "insert_sticky_events_txn", self._faulty)

    def _faulty(self, original: Callable[..., None]) -> Callable[..., None]:
        def insert_sticky_events_txn(txn: Any, events: Any) -> None:
            if fault := take("persist", "before"):
                fault.strike(self._error)
            original(txn, events)
            if fault := take("persist", "inside", "after"):
                if fault.moment == "inside":
                    fault.strike(self._error)
                txn.call_after(fault.strike, self._error)

        return insert_sticky_events_txn


class FaultyModule(ProbedModule):
    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        setattr(synapse_sticky.wiring, "Homeserver", FaultyHomeserver)  # noqa: B010
        setattr(synapse_sticky.handlers.deferral.synapse, "SynapseWriter", FaultyWriter)  # noqa: B010
        install_clock()
        _install_panics()
        super().__init__(config, api)
