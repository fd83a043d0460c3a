"""The running homeserver process: clock, background work, transactions, and what it serves."""

import functools
import inspect
import logging
import weakref
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from packaging.version import InvalidVersion, Version
from synapse.module_api import ModuleApi
from synapse.module_api.errors import ConfigError

from synapse_sticky.homeserver.calls import in_place_of
from synapse_sticky.homeserver.clock import OnSet, SetClock
from synapse_sticky.homeserver.database import KIND, is_postgres
from synapse_sticky.homeserver.fitting import Columns
from synapse_sticky.homeserver.place import Place, Process
from synapse_sticky.homeserver.seams import HOMESERVER, Attribute, attributes, method
from synapse_sticky.homeserver.signal import Signal
from synapse_sticky.metrics import Metrics
from synapse_sticky.versions import synapse_version

if TYPE_CHECKING:
    from synapse.config.homeserver import HomeServerConfig
    from synapse.server import HomeServer

logger = logging.getLogger(__name__)

T = TypeVar("T")

SEAMS = (
    Attribute("synapse.module_api.ModuleApi", "_hs"),
    *attributes(HOMESERVER, "config", "get_datastores"),
    method(HOMESERVER, "register_sync_shutdown_handler(*, phase, eventType, shutdown_func)"),
    Attribute("synapse.storage.databases.Databases", "main"),
    Attribute("synapse.config.homeserver.HomeServerConfig", "experimental"),
    *KIND,
)

FIRST_SYNAPSE = (1, 163)
"""The first release of Synapse that has what the module stands on."""

MIGRATION_LOCK = 0x5354_4943_4B59
"""Any number that no other user of the database's advisory locks takes ("STICKY")."""


# Synapse tries a transaction that fails by these five times more. Whoever waits for a locked table
# lets others have their turn meanwhile.
_TURN_TIMEOUT_MS = 10_000
_LOCK_TIMEOUT_MS = 2_000
_WAIT_BRIEFLY = "SET LOCAL lock_timeout = 400"
"""Two seconds in all tries."""


class Cursor(Protocol):
    """A database cursor with ``?`` placeholders, whatever the database.

    It is used in a database thread, by functions whose names end in ``_txn``.
    """

    def execute(self, sql: str, parameters: Any = ..., /) -> None: ...
    def execute_batch(self, sql: str, args: Any, /) -> None: ...
    def fetchone(self) -> tuple[Any, ...] | None: ...
    def fetchmany(self, size: int, /) -> list[tuple[Any, ...]]: ...
    def fetchall(self) -> list[tuple[Any, ...]]: ...

    def call_after(self, callback: Callable[..., object], /, *args: Any) -> None:
        """Calls back in the reactor's thread once the transaction is through: as often as this
        was asked for, earlier attempts of the same transaction included."""


class Cancellable(Protocol):
    """A call that is due later."""

    def cancel(self) -> None: ...
    def active(self) -> bool: ...


class Homeserver:
    """This process of the homeserver.

    ``hs`` is Synapse's own object, for files named ``synapse.py`` only; ``store`` is its main data
    store; ``columns`` are those of its database, once the start has read them; ``metrics`` is what
    the duties count with.

    Raises:
        ConfigError: the running Synapse lacks what the module stands on.
    """

    def __init__(self, api: ModuleApi) -> None:
        self.api = api
        self.hs: HomeServer = api._hs
        self.store: Any = self.hs.get_datastores().main
        require_sticky_events(self.hs.config)
        self.server_name = api.server_name
        self.metrics = Metrics(self.server_name)
        self.place = Place(self.hs.config, Process.running(api))
        self.instance_name = self.place.name
        self.columns: Columns | None = None
        self.is_postgres = is_postgres(self.hs.config)
        # Whoever imports it earlier decides on which one it is.
        from twisted.internet import reactor

        self._clock = SetClock(
            api.get_current_time_msec, api.delayed_background_call, reactor.callFromThread
        )
        running: Any = reactor
        self._clock.look_when_running(running)
        self._undo: list[Callable[[], None]] = []
        # The reactor knows this function, and lets it go at the homeserver's `shutdown()` only.
        # When the process ends, Synapse processes events until its own handlers of the phase
        # before have come to their end: the duties are done until then.
        self.hs.register_sync_shutdown_handler(
            phase="after",
            eventType="shutdown",
            shutdown_func=functools.partial(_close, weakref.ref(self)),
        )

    def now_ms(self) -> int:
        """The time in ms since the epoch: for what expires, or is stored. Somebody may set it."""
        return self._clock.now_ms()

    def steady_ms(self) -> int:
        """The time for delays within this process, in ms: it goes on evenly, whoever sets the
        clock. Where nobody has, it is the same as ``now_ms``."""
        return self._clock.steady_ms()

    def on_clock_set(self, listener: OnSet) -> None:
        """Calls back with the ms by which the clock was set: forward, or back if negative."""
        self._clock.on_set(listener)

    def in_background(
        self, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> None:
        """Runs the coroutine function by itself; an exception ends up in the log."""
        self.api.run_as_background_process(f"synapse_sticky_{what}", function, *args)

    def call_later(
        self, delay_ms: int, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> Cancellable:
        """The same, after a delay."""
        call = functools.partial(function, *args)
        return self._clock.call_later(delay_ms, f"synapse_sticky_{what}", call)

    def in_reactor(self, function: Callable[..., object], *args: Any) -> None:
        """Calls the function in the reactor's thread soon; from whatever thread."""
        from twisted.internet import reactor

        reactor.callFromThread(function, *args)

    def new_signal(self) -> Signal:
        """A signal that nobody waits for yet."""
        return Signal(self.call_later)

    async def sleep_ms(self, delay_ms: int) -> None:
        """Waits. Nobody may be kept waiting by that: no lock is held, no room's queue stands."""
        await self.new_signal().wait(delay_ms)

    async def give_way(self) -> None:
        """Between two steps of something long: whatever else is due has its turn (H3)."""
        await self.sleep_ms(0)

    def transact(self, what: str, function: Callable[..., T], *args: Any) -> Awaitable[T]:
        """Runs ``function(cursor, *args)`` in one transaction; retried if the database asks."""
        return self.api.run_db_interaction(f"synapse_sticky_{what}", function, *args)

    async def transact_alone(self, what: str, function: Callable[[Cursor], T]) -> T:
        """The same, in one process at a time; each sees what those before it have done.

        Fails if another transaction has what it needs for too long.
        """

        def run_txn(txn: Cursor) -> T:
            # SQLite has one writer at a time anyway.
            if self.is_postgres:
                take_turn_txn(txn)
            return function(txn)

        return await self.transact(what, run_txn)

    async def transact_briefly(self, what: str, function: Callable[[Cursor], T]) -> T:
        """The same as ``transact``, for whoever has others wait for it, as with a room's lock.

        Fails (55P03) rather than wait long for what another transaction has locked.
        """

        def run_txn(txn: Cursor) -> T:
            self.wait_briefly_txn(txn)
            return function(txn)

        return await self.transact(what, run_txn)

    def wait_briefly_txn(self, txn: Cursor) -> None:
        """From now on a statement of the transaction fails (55P03) that would wait long for what
        another transaction has locked."""
        # SQLite has no locks of tables, and waits five seconds for its one writer.
        if self.is_postgres:
            txn.execute(_WAIT_BRIEFLY)

    @contextmanager
    def brief_waits_txn(self, txn: Cursor) -> Iterator[None]:
        """Meanwhile a statement fails (55P03) that would wait long for what another transaction has
        locked. Whoever goes on after an error has to roll back to a savepoint from before this."""
        if not self.is_postgres:
            yield
            return
        txn.execute("SHOW lock_timeout")
        before = txn.fetchone()
        txn.execute(_WAIT_BRIEFLY)
        yield
        txn.execute("SELECT set_config('lock_timeout', ?, TRUE)", before)

    def in_list(self, column: str, values: Collection[object]) -> tuple[str, list[Any]]:
        """The SQL for "the column is one of these", and its arguments.

        SQLite takes 32,766 arguments: whoever cannot say how many values there are takes
        ``database.portions`` of them.
        """
        if self.is_postgres:
            return f"{column} = ANY(?)", [list(values)]
        return f"{column} IN ({', '.join('?' * len(values))})", list(values)

    def replace(
        self, owner: object, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        """Puts ``make(original)`` in the place of an object's method, until ``shutdown()``.

        The replacement keeps the name and the signature. ``owner`` belongs to this homeserver
        alone; what all homeservers of a process share is not for this.
        """
        original = getattr(owner, name)
        self._put(owner, name, in_place_of(original, make(original)))

    def enter(self, owner: object, name: str, entry: object) -> None:
        """Notes on an object of this homeserver what a function that all homeservers of the process
        share is to do for it, until ``shutdown()``."""
        self._put(owner, name, entry)

    def _put(self, owner: object, name: str, value: object) -> None:
        had_own = name in vars(owner)
        before = vars(owner).get(name)
        setattr(owner, name, value)

        def put_back() -> None:
            # Another module may have put its own in front of this one since, or before.
            if vars(owner).get(name) is not value:
                return
            if had_own:
                setattr(owner, name, before)
            else:
                delattr(owner, name)

        self._undo.append(put_back)

    def mark(self) -> int:
        """For ``undo_to``: how much was put in up to now."""
        return len(self._undo)

    def undo_to(self, mark: int) -> None:
        """Takes out what was put in since the mark, in reverse."""
        while len(self._undo) > mark:
            self._undo.pop()()

    def close(self) -> None:
        """Takes out whatever was put in. Synapse goes on without the module."""
        self._clock.close()
        self.undo_to(0)
        self.metrics.close()


def take_turn_txn(txn: Cursor) -> None:
    """Waits until no other process is where this one is about to be, on Postgres. The transaction
    begins with this. It fails if others take too long, now or for what it needs later."""
    # By default a transaction sees what was there before it waited for the lock.
    txn.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
    txn.execute(f"SET LOCAL lock_timeout = {_TURN_TIMEOUT_MS}")
    txn.execute("SELECT pg_advisory_xact_lock(?)", (MIGRATION_LOCK,))
    txn.execute(f"SET LOCAL lock_timeout = {_LOCK_TIMEOUT_MS}")


def _close(homeserver: "weakref.ref[Homeserver]") -> None:
    if (there := homeserver()) is not None:
        there.close()


def replace_shared(
    owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Puts ``make(original)`` in the place of a function of a module or class that all homeservers
    of the process share; once a process. ``make``'s function must find what it does by an entry on
    an object of the homeserver (``Homeserver.enter``), and hold no homeserver itself."""
    original = getattr(owner, name)
    if getattr(original, "is_of_synapse_sticky", False):
        return
    replacement: Any = in_place_of(original, make(original))
    replacement.is_of_synapse_sticky = True
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(replacement) if is_static else replacement)


def require_sticky_events(config: "HomeServerConfig") -> None:
    """Synapse's own part of MSC4354 must be there, and on.

    Raises:
        ConfigError: it is not; the message says what to do.
    """
    if problem := too_old():
        raise ConfigError(problem)
    require_enabled(config)


def too_old() -> str | None:
    """What to say of a Synapse before 1.163, which has only a part of MSC4354; None of a later one.

    Its version says so, and nothing that a later Synapse may rename.
    """
    found = synapse_version()
    try:
        is_too_old = Version(found).release < FIRST_SYNAPSE
    except InvalidVersion:
        is_too_old = False  # somebody's own build
    if not is_too_old:
        return None
    return (
        f"synapse-sticky needs Synapse 1.163 or later, this is {found}. "
        "Upgrade Synapse, or take the module out of `modules:`."
    )


def require_enabled(config: "HomeServerConfig") -> None:
    """Synapse's own part of MSC4354 must be on.

    Raises:
        ConfigError: it is off.
    """
    # A Synapse that has sticky events and no such option has them as a stable feature.
    if not getattr(config.experimental, "msc4354_enabled", True):
        raise ConfigError(
            "synapse-sticky needs Synapse's own sticky events. Add to homeserver.yaml:\n"
            "experimental_features:\n"
            "  msc4354_enabled: true\n"
            "and restart Synapse, or take the module out of `modules:`. If it is there already,"
            " look for a second `experimental_features:`, as of two the last one counts.",
            path=("experimental_features", "msc4354_enabled"),
        )
