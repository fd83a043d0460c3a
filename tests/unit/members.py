"""A homeserver in this process whose database has rooms of any size."""

import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attr
from synapse.app.homeserver import SynapseHomeServer
from synapse.config.homeserver import HomeServerConfig
from twisted.internet.defer import Deferred

from synapse_sticky.handlers.joins.detection.synapse import SynapseStateChanges
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.clock import SetClock
from tests.unit.configuration import configuration
from tests.unit.test_limits_in_synapse import Reactor, begin, run_synchronously

HERE = "here"
MOST_ARGUMENTS = 32_766


@attr.s(auto_attribs=True, frozen=True)
class Change:
    """A change of a member, or of who made the room.

    at: the stream position.
    user_id: None for the create event.
    membership: None if the state is forgotten.
    before: the membership until then.
    ordering: of its event, in the events stream.
    """

    at: int
    room_id: str
    user_id: str | None
    membership: str | None
    ordering: int
    before: str | None = None
    depth: int = 1
    outlier: bool = False
    received_ts_ms: int = 0


@attr.s(auto_attribs=True, frozen=True)
class Member:
    """Who is joined now.

    ordering: of the event that says so, in the events stream; None if the database does not say.
    """

    room_id: str
    user_id: str
    ordering: int | None
    depth: int = 1


class ThisProcess(Homeserver):
    """The real one. It notes its transactions, and what they take.

    held: the next transaction of this name waits until ``release``.
    failing: transactions of this name fail.
    sql_s: how long the transactions took, all in all, in seconds.
    most_s: the longest that the reactor was held between two of its turns, in seconds of CPU.
    """

    def __init__(self, hs: SynapseHomeServer) -> None:
        api = hs.get_module_api()
        reactor: Any = hs.get_reactor()
        super().__init__(api)
        self._clock.close()
        # Time passes when a test says so.
        self._clock = SetClock(
            api.get_current_time_msec,
            api.delayed_background_call,
            reactor.callFromThread,
            reactor.seconds,
        )
        self.transactions: list[str] = []
        self.sleeps = 0
        self.held: str | None = None
        self.failing: str | None = None
        self.sql_s = self.most_s = 0.0
        self._turn_s = time.thread_time()
        self._waiting: list[Deferred[None]] = []

    async def transact(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        self._end_turn()
        self.transactions.append(what)
        if what == self.held:
            self.held = None
            self._waiting.append(Deferred())
            await self._waiting[-1]
        if what == self.failing:
            raise ValueError("for the test")
        start_s = time.perf_counter()
        try:
            return await super().transact(what, function, *args)
        finally:
            self.sql_s += time.perf_counter() - start_s
            self._turn_s = time.thread_time()

    async def sleep_ms(self, delay_ms: int) -> None:
        self._end_turn()
        self.sleeps += 1
        await super().sleep_ms(delay_ms)
        self._turn_s = time.thread_time()

    def forget(self) -> None:
        """Begins to note anew."""
        self.transactions.clear()
        self.sql_s = self.most_s = 0.0
        self._turn_s = time.thread_time()

    def _end_turn(self) -> None:
        self.most_s = max(self.most_s, time.thread_time() - self._turn_s)

    def release(self) -> None:
        """What is held goes on."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.callback(None)


class World:
    """A homeserver with whatever members and changes of state a test puts in."""

    def __init__(self, folder: Path, database: dict[str, Any] | None) -> None:
        options = configuration(folder, HERE)
        config = HomeServerConfig()
        config.parse_config_dict(
            {**options, **({"database": database} if database else {})}, "", ""
        )
        reactor: Any = Reactor()  # type: ignore[no-untyped-call]
        self.reactor = reactor
        self.reactor.rightNow = 1_800_000_000
        self.hs = SynapseHomeServer(HERE, config=config, reactor=reactor)
        self.hs.setup()
        run_synchronously(self.hs)
        self.store: Any = self.hs.get_datastores().main
        self.is_postgres = database is not None
        if not self.is_postgres:
            self.drive(self.store.db_pool.runWithConnection(_limit_arguments))
        self._number = 0

    @contextmanager
    def process(self) -> Iterator[ThisProcess]:
        """The module's view of the homeserver."""
        process = ThisProcess(self.hs)
        try:
            yield process
        finally:
            process.close()

    def close(self) -> None:
        for connection in self.store.db_pool._db_pool.connections.values():
            connection.close()

    def now_ms(self) -> int:
        return int(self.reactor.seconds() * 1000)

    def drive(self, coroutine: Any) -> Any:
        """The result of a coroutine that waits for nothing but turns of the reactor."""
        results = begin(coroutine)
        while not results:
            self.reactor.advance(0)
        if hasattr(results[0], "raiseException"):
            results[0].raiseException()
        return results[0]

    def take_turns(self) -> None:
        """Lets happen all that is due now, and what follows from it."""
        while any(c.getTime() <= self.reactor.seconds() for c in self.reactor.getDelayedCalls()):
            self.reactor.advance(0)

    def execute(self, sql: str, *args: object) -> list[tuple[Any, ...]]:
        def run_txn(txn: Any) -> list[tuple[Any, ...]]:
            txn.execute(sql, args)
            return txn.fetchall() if sql.startswith("SELECT") else []

        return self.drive(self.store.db_pool.runInteraction("test", run_txn))  # type: ignore[no-any-return]

    def clear(self) -> None:
        """Forgets all rooms."""
        tables = list(reversed(_COLUMNS))
        if self.is_postgres:
            # What refers to them is looked for without an index otherwise.
            self.execute(f"TRUNCATE {', '.join(tables)} CASCADE")
            return
        for table in tables:
            self.execute(f"DELETE FROM {table}")

    def put(self, changes: Sequence[Change], members: Sequence[Member]) -> None:
        """Adds changes of state, and members with events of their own unless a change has made them
        members."""
        self.drive(self.store.db_pool.runInteraction("test", self._put_txn, changes, members))
        for change in changes:
            self.store._curr_state_delta_stream_cache.entity_has_changed(change.room_id, change.at)

    def _put_txn(self, txn: Any, changes: Sequence[Change], members: Sequence[Member]) -> None:
        rows: dict[str, list[tuple[Any, ...]]] = {table: [] for table in _COLUMNS}
        rows["rooms"] = [(room_id, "11") for room_id in {one.room_id for one in changes}]
        made: dict[tuple[str, int], str] = {}

        def event(
            room_id: str,
            user_id: str,
            membership: str,
            ordering: int,
            depth: int = 1,
            outlier: bool = False,
            received_ts_ms: int = 0,
        ) -> str:
            self._number += 1
            event_id = f"${self._number}"
            kind = "m.room.member" if membership else "m.room.create"
            rows["events"].append(
                (
                    *(event_id, room_id, ordering, depth, depth, kind, user_id),
                    *(True, outlier, received_ts_ms or self.now_ms()),
                )
            )
            if membership:
                rows["room_memberships"].append((event_id, user_id, user_id, room_id, membership))
            return event_id

        for c in changes:
            new = old = None
            if c.membership is not None:
                new = event(
                    *(c.room_id, c.user_id or "", c.membership, c.ordering),
                    *(c.depth, c.outlier, c.received_ts_ms),
                )
                made[c.user_id or "", c.ordering] = new
            if c.before is not None:
                old = event(c.room_id, c.user_id or "", c.before, self._earlier())
            kind = "m.room.create" if c.user_id is None else "m.room.member"
            rows["current_state_delta_stream"].append(
                (c.at, c.room_id, kind, c.user_id or "", new, old)
            )
        for m in members:
            event_id = made.get((m.user_id, m.ordering or 0)) or event(
                m.room_id, m.user_id, "join", m.ordering or self._earlier(), m.depth
            )
            rows["current_state_events"].append(
                (event_id, m.room_id, "m.room.member", m.user_id, "join", m.ordering)
            )
        for table, columns in _COLUMNS.items():
            if rows[table]:
                self.store.db_pool.simple_insert_many_txn(
                    txn, table, keys=columns.split(), values=rows[table]
                )

    def _earlier(self) -> int:
        return -(10**9) - self._number


def _limit_arguments(connection: Any) -> None:
    """As SQLite is by default. Some distributions allow more; Python 3.10 cannot limit it."""
    if sys.version_info < (3, 11):
        return
    connection.conn.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, MOST_ARGUMENTS)


_COLUMNS = {
    "rooms": "room_id room_version",
    "events": "event_id room_id stream_ordering topological_ordering depth type sender processed "
    "outlier received_ts",
    "room_memberships": "event_id user_id sender room_id membership",
    "current_state_delta_stream": "stream_id room_id type state_key event_id prev_event_id",
    "current_state_events": "event_id room_id type state_key membership event_stream_ordering",
}


class Changes(SynapseStateChanges):
    """The real ones, up to where a test says."""

    position = 0

    def state_position(self) -> int:
        return self.position


def whole(world: World, members: int, servers: int, *, newcomers: int = 0, room: str = "!a") -> int:
    """A room whose members all come at one position, as when partial state becomes whole. The last
    ``newcomers`` of its servers have joined since. Gives the position."""
    own_depth = 10**6
    changes, there = [], [Member(room, f"@own:{HERE}", 5, own_depth)]
    for n in range(members):
        server = n % servers
        is_new = server >= servers - newcomers
        user_id, ordering = f"@user{n}:server{server}", -(n + 1)
        changes.append(
            Change(100, room, user_id, "join", ordering, None, own_depth + is_new * 2 - 1, True)
        )
        there.append(Member(room, user_id, ordering))
    world.put(changes, there)
    return 100


def counts(process: ThisProcess) -> Counter[str]:
    """The process' transactions by their names."""
    return Counter(process.transactions)
