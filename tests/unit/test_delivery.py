"""What the index answers is what Synapse's own query on the same database does (D1, D2, D4, S5).

The homeserver, its store, both databases' engines, the SQL and the follower are the real ones; only
the reactor is not. Chance makes the rest: rows of several writers, their order, what
changes them later, how far this process has come, and what is asked for.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attr
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from immutabledict import immutabledict
from synapse.api.room_versions import RoomVersions
from synapse.app.homeserver import SynapseHomeServer
from synapse.config.homeserver import HomeServerConfig
from synapse.events import EventBase, make_event_from_dict
from synapse.events.utils import FilteredEvent
from synapse.handlers.sync import JoinedSyncResult, SyncResult, TimelineBatch
from synapse.replication.tcp.streams._base import StickyEventsStream, StickyEventsStreamRow
from synapse.storage.database import LoggingTransaction
from synapse.storage.util.id_generators import (
    MultiWriterIdGenerator,
    advance_multiwriter_sharded_token_after_partial_read,
)
from synapse.types import MultiWriterStreamToken, StreamToken, UserID
from synapse.util.json import json_encoder
from twisted.internet.defer import Deferred, ensureDeferred, execute
from twisted.internet.testing import MemoryReactorClock

from synapse_sticky.handlers.delivery import present
from synapse_sticky.handlers.delivery.handler import DeliveryHandler
from synapse_sticky.handlers.delivery.pages import Question
from synapse_sticky.handlers.delivery.synapse import SynapseDelivery
from synapse_sticky.homeserver import Cancellable, Homeserver, Signal
from synapse_sticky.homeserver.access import Access
from synapse_sticky.homeserver.tokens import position_of
from synapse_sticky.homeserver.tokens import token_of as synapses
from synapse_sticky.index import IndexFollower, Position, StickyRow, follower
from synapse_sticky.index.key import MOST_READ_BYTES, key_of
from synapse_sticky.index.redactions import synapse as redactions
from synapse_sticky.index.synapse import SynapseStickyStream
from tests.lab.postgres import Postgres
from tests.unit.members import MOST_ARGUMENTS
from tests.unit.settable import METRICS
from tests.unit.test_limits import done

WRITERS = ["writer1", "writer2", "writer3"]
FORMER_WRITER = "writer0"
"""It has rows, and is no longer configured."""
ROOMS = ["!a:here", "!b:here", "!c:here"]
UNKNOWN_ROOM = "!unknown:here"
USERS = ["@user:here", "@user:there"]
EVENTS = 24
START_MS = 1_800_000_000_000
EXPIRE_IN_MS = [1, 1_000, 1_001, 2_000, 3_600_000]

Token = MultiWriterStreamToken
Answer = tuple[Token, dict[str, list[str]]]


class Reactor(MemoryReactorClock):
    """A reactor with no thread but this one, and that never runs."""

    def callFromThread(self, function: Callable[..., object], *args: Any) -> None:  # noqa: N802
        function(*args)


class Stream(SynapseStickyStream):
    """The real one, with a database that can take its time, or fail."""

    slow = False
    broken = False

    def __init__(self, homeserver: Homeserver) -> None:
        super().__init__(homeserver)
        self.read: list[Deferred[None]] = []
        self.asked_apart = 0

    async def rows_in_rooms(self, portion: Collection[str], **options: int) -> list[StickyRow]:
        self.asked_apart += 1
        return await super().rows_in_rooms(portion, **options)

    async def rows(self, *, after: int, up_to: int, limit: int) -> list[StickyRow]:
        return await self._answer(await super().rows(after=after, up_to=up_to, limit=limit))

    async def rows_at(self, stream_ids: Mapping[str, int]) -> list[StickyRow]:
        return await self._answer(await super().rows_at(stream_ids))

    async def _answer(self, rows: list[StickyRow]) -> list[StickyRow]:
        if self.slow:
            self.read.append(Deferred())
            await self.read[-1]
        if self.broken:
            raise OSError("the database is away")
        return rows


class PatientSignal(Signal):
    """The real one, which mostly takes too long."""

    def __init__(self, world: "World") -> None:
        super().__init__(self._call_later)
        self._world = world

    def _call_later(self, delay_ms: int, what: str, function: Any, /, *args: object) -> Cancellable:
        return self._world.reactor.callLater(delay_ms / 1000, lambda: done(function(*args)))

    async def wait(self, at_most_ms: int) -> None:
        if self._world.patient:
            await super().wait(at_most_ms)


class ThisProcess(Homeserver):
    """The real one, with timers that run when the test says."""

    def __init__(self, world: "World") -> None:
        super().__init__(world.hs.get_module_api())
        self._world = world

    def steady_ms(self) -> int:
        return int(self._world.reactor.seconds() * 1_000)

    def in_background(
        self, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> None:
        ensureDeferred(function(*args)).addErrback(self._world.failures.append)  # type: ignore[arg-type]

    def call_later(
        self, delay_ms: int, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> Cancellable:
        assert not args
        self._world.timers.append(function)
        return self._world.reactor.callLater(delay_ms / 1000, lambda: None)

    def new_signal(self) -> Signal:
        return PatientSignal(self._world)


@attr.s(auto_attribs=True, frozen=True)
class Query:
    room_ids: Collection[str]
    from_token: Token
    to_token: Token
    now: int
    limit: int | None

    def begin(self, method: Callable[..., Coroutine[Any, Any, Answer]]) -> Any:
        return method(
            self.room_ids,
            from_token=self.from_token,
            to_token=self.to_token,
            now=self.now,
            limit=self.limit,
        )

    def ask(self, method: Callable[..., Coroutine[Any, Any, Answer]]) -> Answer:
        answer: Answer = done(self.begin(method))
        return answer

    @property
    def is_first(self) -> bool:
        is_ordinary = self.limit is None or self.limit == 100
        return is_ordinary and self.from_token.is_before_or_eq(Token(stream=0))

    @property
    def is_empty(self) -> bool:
        return (
            self.limit == 0 or not self.room_ids or self.to_token.is_before_or_eq(self.from_token)
        )


class World:
    """A homeserver that reads what three others write, with the module's delivery in it."""

    patient = False

    def __init__(self, folder: str, database: dict[str, Any]) -> None:
        config = HomeServerConfig()
        config.parse_config_dict(
            {
                "server_name": "here",
                "database": database,
                "listeners": [],
                "signing_key": "ed25519 1 " + "A" * 43,
                "macaroon_secret_key": "macaroon",
                "media_store_path": f"{folder}/media",
                "report_stats": False,
                "trusted_key_servers": [],
                "experimental_features": {"msc4354_enabled": True},
                "stream_writers": {"events": WRITERS},
                "instance_map": {n: {"host": "here", "port": 1} for n in ["main", *WRITERS]},
            },
            "",
            "",
        )
        self.reactor = Reactor()  # type: ignore[no-untyped-call]
        reactor: Any = self.reactor
        self.hs = SynapseHomeServer("here", config=config, reactor=reactor)
        self.hs.setup()
        self.process = ThisProcess(self)
        self.store = self.process.store
        self.store.USE_DEDICATED_DB_THREADS_FOR_EVENT_FETCHING = False
        pool = self._pool = self.store.db_pool._db_pool
        # In this thread, and at once.
        pool.runWithConnection = lambda *args, **options: execute(
            pool._runWithConnection, *args, **options
        )
        self._theirs = self.store.get_sticky_events_in_rooms
        self.events = [_event(n) for n in range(EVENTS)]
        self.redactions = {
            (event.event_id, user_id): _redaction(event, user_id)
            for event in self.events
            for user_id in USERS
        }
        self.seen: Counter[str] = Counter()
        self._transact(self._insert_events_txn)

    def close(self) -> None:
        for connection in self._pool.connections.values():
            connection.close()

    def _transact(self, function: Callable[..., Any], *args: Any) -> Any:
        return done(self.store.db_pool.runInteraction("test", function, *args))

    def _insert_txn(self, txn: Any, table: str, rows: list[dict[str, Any]]) -> None:
        values = [tuple(row.values()) for row in rows]
        self.store.db_pool.simple_insert_many_txn(txn, table, keys=list(rows[0]), values=values)

    def _insert_events_txn(self, txn: Any) -> None:
        # Not what the tests are about, and the same for all of them.
        version = RoomVersions.V11
        rooms = [{"room_id": room_id, "room_version": version.identifier} for room_id in ROOMS]
        self._insert_txn(txn, "rooms", rooms)
        events = [*self.events, *self.redactions.values()]
        rows, bodies = [], []
        for number, event in enumerate(events):
            common = {"event_id": event.event_id, "room_id": event.room_id}
            rows.append(
                {
                    **common,
                    "stream_ordering": number + 1,
                    "topological_ordering": number + 1,
                    "depth": number + 1,
                    "type": event.type,
                    "sender": event.sender,
                    "processed": True,
                    "outlier": False,
                }
            )
            bodies.append(
                {
                    **common,
                    "internal_metadata": json_encoder.encode(event.internal_metadata.get_dict()),
                    "json": json_encoder.encode(event.get_dict()),
                    "format_version": version.event_format,
                }
            )
        self._insert_txn(txn, "events", rows)
        self._insert_txn(txn, "event_json", bodies)

    # One example

    @contextmanager
    def example(self) -> Iterator["World"]:
        """Begins with no sticky events, and a follower that is not started."""
        self._transact(self._clear_txn)
        done(self.store.db_pool.runWithConnection(self._new_generator))
        self.reactor.rightNow = START_MS / 1000
        self.last = 1
        self.reserved: list[tuple[str, int]] = []
        self.committed: dict[int, tuple[str, EventBase]] = {}
        self.announced = 1
        self.current: dict[str, int] = {}
        self.soft_failed: set[str] = set()
        self.redacted: set[str] = set()
        self.tokens = [Token(stream=0), self.token()]
        self.written: list[tuple[str, int]] = []
        self.timers: list[Callable[..., Awaitable[None]]] = []
        self.failures: list[Any] = []
        self.sql_queries = 0
        self.stream = Stream(self.process)
        self.store.get_sticky_events_in_rooms = self._count
        self.follower = IndexFollower(self.process, self.stream)
        delivery = SynapseDelivery(self.process)
        self.delivery = DeliveryHandler(self.process, self.follower, delivery)
        self.delivery.install()
        try:
            yield self
            self.settle()
            assert not self.failures
        finally:
            self.process.close()
            self.hs.get_replication_notifier()._replication_callbacks.clear()
            for room_id in ROOMS:
                self.store._invalidate_local_get_event_cache_room_id(room_id)

    def _clear_txn(self, txn: Any) -> None:
        for table in ("sticky_events", "redactions", "room_ban_redactions", "stream_positions"):
            txn.execute(f"DELETE FROM {table}")
        txn.execute(
            "UPDATE event_json SET internal_metadata = '{}' WHERE json LIKE ?", ("%sticky%",)
        )

    def _new_generator(self, connection: Any) -> None:
        self.store._sticky_events_id_gen = MultiWriterIdGenerator(
            db_conn=connection,
            db=self.store.db_pool,
            notifier=self.hs.get_replication_notifier(),
            stream_name="sticky_events",
            server_name="here",
            instance_name=self.hs.get_instance_name(),
            tables=[("sticky_events", "instance_name", "stream_id")],
            sequence_name="sticky_events_sequence",
            writers=WRITERS,
        )

    async def _count(
        self,
        room_ids: Collection[str],
        *,
        from_token: Token,
        to_token: Token,
        now: int,
        limit: int | None,
    ) -> Answer:
        self.sql_queries += 1
        answer: Answer = await self._theirs(
            room_ids, from_token=from_token, to_token=to_token, now=now, limit=limit
        )
        return answer

    @property
    def queries(self) -> int:
        """How often the database was asked for what the index does not say."""
        return self.sql_queries + self.stream.asked_apart

    def now_ms(self) -> int:
        return self.process.now_ms()

    def on_clock_set(self, listener: Any) -> None: ...

    # What happens: the writers

    def reserve(self, writer: str) -> int:
        """A writer takes a stream ID."""
        self.last += 1
        self.reserved.append((writer, self.last))
        return self.last

    def commit(self, number: int, stream_id: int, expires_in_ms: int, soft_failed: bool) -> None:
        """It writes an event's row there; or, if the event was soft-failed so far, moves it."""
        (writer,) = [w for w, reserved in self.reserved if reserved == stream_id]
        event = self.events[number % EVENTS]
        if event.event_id not in self.current:
            self._transact(
                self._insert_sticky_txn, event, writer, stream_id, expires_in_ms, soft_failed
            )
        elif event.event_id in self.soft_failed:
            self._transact(self._un_soft_fail_txn, event, writer, stream_id)
            soft_failed = False
        else:
            self.reserved.remove((writer, stream_id))  # a gap
            return
        self.reserved.remove((writer, stream_id))
        self.committed[stream_id] = (writer, event)
        self.written.append((writer, stream_id))
        self.current[event.event_id] = stream_id
        (self.soft_failed.add if soft_failed else self.soft_failed.discard)(event.event_id)

    def _insert_sticky_txn(
        self, txn: Any, event: EventBase, writer: str, stream_id: int, lasts_ms: int, soft: bool
    ) -> None:
        if soft:
            self._set_soft_failed_txn(txn, event, soft)
        row = {
            "stream_id": stream_id,
            "instance_name": writer,
            "event_id": event.event_id,
            "room_id": event.room_id,
            "event_stream_ordering": self.events.index(event) + 1,
            "sender": event.sender,
            "expires_at": self.now_ms() + lasts_ms,
        }
        self._insert_txn(txn, "sticky_events", [row])

    def _un_soft_fail_txn(self, txn: Any, event: EventBase, writer: str, stream_id: int) -> None:
        self._set_soft_failed_txn(txn, event, soft=False)
        self.store.db_pool.simple_update_txn(
            txn,
            "sticky_events",
            {"event_id": event.event_id},
            {"stream_id": stream_id, "instance_name": writer},
        )

    def _set_soft_failed_txn(self, txn: Any, event: EventBase, soft: bool) -> None:
        self.store.db_pool.simple_update_one_txn(
            txn,
            "event_json",
            {"event_id": event.event_id},
            {"internal_metadata": json_encoder.encode({"soft_failed": soft})},
        )

    def announce(self, writer: str, further: bool = False) -> None:
        """This process hears of what the writer has committed; or even that it has nothing more
        up to what all others have announced."""
        before = min((s for w, s in self.reserved if w == writer), default=self.last + 1)
        for stream_id in sorted(self.committed):
            of, event = self.committed[stream_id]
            if of == writer and stream_id < before:
                del self.committed[stream_id]
                row = StickyEventsStreamRow(event.room_id, event.event_id)
                name = StickyEventsStream.NAME
                self.store.process_replication_rows(name, writer, stream_id, [row])
                self._position(writer, stream_id)
        if further and self.announced < before:
            self._position(writer, self.announced)
        self.tokens.append(self.token())
        self.hs.get_notifier().notify_replication()

    def _position(self, writer: str, stream_id: int) -> None:
        self.store.process_replication_position(StickyEventsStream.NAME, writer, stream_id)
        self.announced = max(self.announced, stream_id)

    def announce_all(self) -> None:
        for _ in range(2):
            for writer in WRITERS:
                self.announce(writer, further=True)

    def token(self) -> Token:
        """How far this process has come."""
        token: Token = self.store.get_sticky_events_stream_token()
        return token

    # What happens: the rest

    def redact(self, number: int, kind: int) -> None:
        """By its sender's server, proven before or not; by another server; by nothing known."""
        # Often one that the index knows.
        known = [e for e in self.events if e.event_id in self.follower.index]
        choice = known if known and number < 60 else self.events
        event = choice[number % len(choice)]
        me, other = sorted(USERS, key=lambda user_id: user_id != event.sender)
        recheck = kind % 4 != 0
        redaction_id = (
            f"$of-{event.event_id}"
            if kind % 4 == 3
            else self.redactions[event.event_id, other if kind % 4 == 2 else me].event_id
        )

        def redact_txn(txn: Any) -> None:
            self.store.db_pool.simple_upsert_txn(
                txn,
                "redactions",
                {"event_id": redaction_id},
                {"redacts": event.event_id, "recheck": recheck},
            )
            self.store.invalidate_get_event_cache_after_txn(txn, event.event_id)

        if kind % 4 < 2:
            self.redacted.add(event.event_id)
        self._transact(redact_txn)

    def purge(self, room_id: str) -> None:
        """The room's events are gone."""

        def purge_txn(txn: Any) -> None:
            self.store.db_pool.simple_delete_txn(txn, "sticky_events", {"room_id": room_id})
            txn.call_after(self.store._invalidate_caches_for_room_events, room_id)

        self._transact(purge_txn)

    def set_ordering(self, number: int, ordering: int) -> None:
        """Gives the event's row another ordering, as that of one that was an outlier before."""
        self._transact(
            self.store.db_pool.simple_update_txn,
            "sticky_events",
            {"event_id": self.events[number].event_id},
            {"event_stream_ordering": ordering},
        )

    @contextmanager
    def statements(self) -> Iterator[list[tuple[str, Any]]]:
        """The module's statements on Synapse's sticky events meanwhile, with their arguments."""
        found: list[tuple[str, Any]] = []
        execute = LoggingTransaction.execute

        def note(self: LoggingTransaction, sql: str, parameters: Any = ()) -> None:
            if "sticky_events" in sql and sql.lstrip().startswith("SELECT"):
                found.append((sql, parameters))
            execute(self, sql, parameters)

        LoggingTransaction.execute = note  # type: ignore[method-assign]
        try:
            yield found
        finally:
            LoggingTransaction.execute = execute  # type: ignore[method-assign]

    def plan_of(self, sql: str, args: Any) -> list[str]:
        """How SQLite goes about it, a line for each table."""

        def explain_txn(txn: Any) -> list[str]:
            txn.execute(f"EXPLAIN QUERY PLAN {sql}", args)
            return [row[-1] for row in txn.fetchall()]

        found: list[str] = self._transact(explain_txn)
        return found

    def ban(self, room_id: str, user_id: str) -> None:
        """A ban that redacts all that the user sent there (MSC4293)."""
        ban_id = next(r.event_id for r in self.redactions.values() if r.room_id == room_id)

        def ban_txn(txn: Any) -> None:
            row = {"room_id": room_id, "user_id": user_id, "redacting_event_id": ban_id}
            self._insert_txn(txn, "room_ban_redactions", [row])

        self._transact(ban_txn)
        theirs = {e.event_id for e in self.events if (e.room_id, e.sender) == (room_id, user_id)}
        self.redacted |= theirs
        # As replication does, of what the process that persists events tells all others.
        told = f"{redactions.__name__}.user_redactions"
        self.store._attempt_to_invalidate_cache(told, (room_id, user_id))

    def pass_time(self, seconds: int) -> None:
        self.reactor.rightNow += seconds

    def go_on(self) -> None:
        """What the follower waits for has come: from the database, or else by the clock."""
        if self.stream.read:
            self.stream.read.pop(0).callback(None)
        else:
            timers, self.timers = self.timers, []
            for function in timers:
                done(function())

    def settle(self) -> None:
        """All that was to come has come, and the follower has dealt with it."""
        self.stream.slow = self.stream.broken = False
        self.reserved.clear()
        while self.stream.read:
            self.go_on()
        self.announce_all()
        self.go_on()  # tries again if it failed

    # The comparison

    def check(self, query: Query, *, by_index: bool | None = None) -> Answer:
        """The module's answer is Synapse's, without what is redacted."""
        queries = self.queries
        answer = query.ask(self.store.get_sticky_events_in_rooms)
        asked_sql = self.queries > queries
        if by_index is not None:
            assert asked_sql == (not by_index)
        if not asked_sql and not query.is_empty:
            in_doubt = self.follower._changed | self.follower._rechecking
            assert not in_doubt & {e for ids in answer[1].values() for e in ids}
            taken_in = self.follower.index.positions()
            for writer in WRITERS:
                up_to = query.to_token.get_stream_pos_for_instance(writer)
                assert up_to <= taken_in.get(writer, 0)

        if query.is_first and not query.is_empty:
            self._check_first(query, answer, asked_sql=asked_sql)
            return answer
        theirs = query.ask(self._theirs)
        if asked_sql or not any(e in self.redacted for ids in theirs[1].values() for e in ids):
            expected = (theirs[0], self._group(self._unredacted(theirs[1])))
        else:
            expected = self._without_redacted(query)
        assert answer[0] == expected[0]
        assert list(answer[1].items()) == list(expected[1].items())

        found = bool(answer[1])
        self.seen["SQL" if asked_sql else "index"] += found
        self.seen["page"] += answer[0] != query.from_token.copy_and_advance(query.to_token)
        self.seen["redacted"] += expected[1] != theirs[1]
        self.tokens.append(answer[0])
        return answer

    def _check_first(self, query: Query, answer: Answer, *, asked_sql: bool) -> None:
        """All that is not redacted; if it is more than was asked for, some now, and all of the rest
        after the token. It is the same whoever answers."""
        token, by_room = answer
        everything = attr.evolve(query, limit=None)
        up_to_now = attr.evolve(everything, to_token=query.to_token.copy_and_advance(self.token()))
        there = self._unredacted(everything.ask(self._theirs)[1])
        there_now = self._unredacted(up_to_now.ask(self._theirs)[1])
        found = [(room_id, e) for room_id, ids in by_room.items() for e in ids]
        assert len(found) == len(set(found))
        if query.limit is None:
            assert {*there} <= {*found} <= {*there_now}
        elif len(there) <= present.MOST_EVENTS:
            assert by_room == self._group(there)
        else:
            assert {*found} <= {*there}
            assert 0 < len(found) <= present.MOST_EVENTS
            rest = attr.evolve(everything, from_token=token).ask(self._theirs)[1]
            assert {*there} - {*self._unredacted(rest)} <= {*found}
            assert not token.is_before_or_eq(query.from_token)
            self.seen["page"] += 1
        if query.limit is None or len(there) <= present.MOST_EVENTS:
            assert token == query.from_token.copy_and_advance(query.to_token)
        if not asked_sql:
            after, up_to = position_of(query.from_token), position_of(query.to_token)
            question = Question(query.room_ids, after, up_to, query.now, query.limit)
            apart = done(self.delivery._first_by_database(question))
            if query.limit is not None:
                assert apart is not None
                assert apart[0] == by_room
                assert synapses(apart[1]) == token
        self.seen["SQL" if asked_sql else "index"] += bool(by_room)
        self.tokens.append(token)

    def _without_redacted(self, query: Query) -> Answer:
        """As Synapse's own would be, had its query left out what is redacted."""
        rows = [
            row
            for row in self._transact(
                lambda txn: self.store._get_sticky_events_in_rooms_txn(
                    txn,
                    query.room_ids,
                    from_token=query.from_token,
                    to_token=query.to_token,
                    now=query.now,
                    limit=None,
                )
            )
            if row[2] not in self.redacted
        ][: query.limit]
        reached = query.from_token.copy_and_advance(query.to_token)
        if query.limit == 0:
            reached = query.from_token
        elif len(rows) == query.limit:
            reached = advance_multiwriter_sharded_token_after_partial_read(
                from_token_exclusive=query.from_token,
                to_token_inclusive=query.to_token,
                last_read_stream_id=rows[-1][0],
            )
        return reached, self._group([(room_id, event_id) for _, room_id, event_id in rows])

    def _unredacted(self, by_room: dict[str, list[str]]) -> list[tuple[str, str]]:
        return [(r, e) for r, ids in by_room.items() for e in ids if e not in self.redacted]

    @staticmethod
    def _group(found: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
        by_room: dict[str, list[str]] = {}
        for room_id, event_id in found:
            by_room.setdefault(room_id, []).append(event_id)
        return by_room


def _event(number: int) -> EventBase:
    return make_event_from_dict(
        {
            "type": "m.test",
            "room_id": ROOMS[number % len(ROOMS)],
            "sender": USERS[number // len(ROOMS) % len(USERS)],
            # Some have a key, and of some there are several events.
            "content": {"sticky_key": f"ä{number % 4}"} if number % 3 else {},
            "origin_server_ts": START_MS,
            "depth": number + 1,
            "auth_events": [],
            "prev_events": [],
            "hashes": {},
            "signatures": {},
            "msc4354_sticky": {"duration_ms": 3_600_000},
        },
        RoomVersions.V11,
    )


def _redaction(event: EventBase, user_id: str) -> EventBase:
    return make_event_from_dict(
        {
            "type": "m.room.redaction",
            "room_id": event.room_id,
            "sender": user_id,
            "content": {"redacts": event.event_id},
            "origin_server_ts": START_MS,
            "depth": 1,
            "auth_events": [],
            "prev_events": [],
            "hashes": {},
            "signatures": {},
        },
        RoomVersions.V11,
        {"recheck_redaction": True},
    )


@pytest.fixture(
    scope="module",
    params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)],
)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    loggers = [logging.getLogger(name) for name in ("synapse", "synapse_sticky")]
    levels = [logger.level for logger in loggers]
    paging, most = follower._PAGE, (present.MOST_EVENTS, present.MOST_OLDEST)
    with tempfile.TemporaryDirectory(prefix="sticky-delivery-") as folder:
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            follower._PAGE = 3
            present.MOST_EVENTS, present.MOST_OLDEST = 6, 2
            if request.param == "sqlite":
                args = {"database": str(Path(folder) / "homeserver.db")}
                world = World(folder, {"name": "sqlite3", "args": args})
                yield world
                world.close()
            else:
                with Postgres() as postgres:
                    world = World(folder, postgres.new_database())
                    yield world
                    world.close()
        finally:
            follower._PAGE = paging
            present.MOST_EVENTS, present.MOST_OLDEST = most
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# Chance. Numbers are taken modulo what there is to choose from.

numbers = st.integers(0, 99)
room_lists = st.lists(st.sampled_from([*ROOMS, *ROOMS, UNKNOWN_ROOM]), max_size=6).flatmap(
    lambda rooms: st.sampled_from([list, tuple, set, frozenset]).map(lambda kind: kind(rooms))
)
limits = st.sampled_from([None, 0, 1, 1, 2, 3, 5, 100])
writers = st.sampled_from(WRITERS)
all_writers = st.sampled_from([*WRITERS, FORMER_WRITER])
expiries = st.sampled_from(EXPIRE_IN_MS)
rarely = numbers.map(lambda number: number % 4 == 0)


@st.composite
def wild_tokens(draw: st.DrawFn) -> Token:
    """Any token at all: a client can have one from another process, or made it up."""
    stream = draw(st.integers(0, 20))
    names = st.sampled_from([*WRITERS, *WRITERS, FORMER_WRITER, "never"])
    ahead = draw(st.dictionaries(names, st.integers(1, 10), max_size=3))
    return Token(
        stream=stream, instance_map=immutabledict({n: stream + by for n, by in ahead.items()})
    )


tokens = st.one_of(
    st.tuples(st.just("earlier"), numbers),
    st.tuples(st.just("at a row"), numbers, st.integers(0, 3)),
    st.tuples(st.just("any"), wild_tokens()),
)
a_bit_later_ms = st.sampled_from([0, 0, 1, 999, 1_000, 1_001])
queries = st.tuples(
    room_lists, st.just(("earlier", 0)) | tokens, st.none() | tokens, a_bit_later_ms, limits
)


def token_of(world: World, choice: Any) -> Token:
    if choice is None:
        return world.token()
    kind, *args = choice
    if kind == "any":
        assert isinstance(args[0], Token)
        return args[0]
    if kind == "earlier" or not world.written:
        earlier: Token = world.tokens[args[0] % len(world.tokens)]
        return earlier
    # The row's writer is exactly there, and the others a bit behind.
    writer, stream_id = world.written[args[0] % len(world.written)]
    ahead = {writer: stream_id} if args[1] else {}
    return Token(stream=stream_id - args[1], instance_map=immutabledict(ahead))


def query_of(world: World, drawn: Any) -> Query:
    rooms, after, up_to, later_ms, limit = drawn
    from_token, to_token = token_of(world, after), token_of(world, up_to)
    return Query(rooms, from_token, to_token, world.now_ms() + later_ms, limit)


former_rows = st.lists(st.tuples(numbers, expiries, rarely), max_size=3)


def begin(world: World, former: list[tuple[int, int, bool]]) -> None:
    """What a writer left behind before it was taken away."""
    for number, expires_in_ms, soft_failed in former:
        world.commit(number, world.reserve(FORMER_WRITER), expires_in_ms, soft_failed)
    world.committed.clear()
    for writer in WRITERS:
        world._position(writer, world.last)
    world.tokens.append(world.token())


@pytest.mark.requirement("D1", "D2", "D4", "S5")
def test_an_index_in_step_answers_as_the_database(world: World) -> None:
    world.seen.clear()
    rows = st.lists(st.tuples(writers, numbers, expiries, rarely), min_size=3, max_size=14)
    changes = st.lists(st.tuples(numbers, numbers), max_size=5)

    @given(
        st.booleans(),
        former_rows,
        rows,
        changes,
        changes,
        st.lists(queries, min_size=6, max_size=8),
    )
    @settings(max_examples=250)
    def compare(
        from_the_start: bool, former: Any, rows: Any, early: Any, late: Any, drawn: Any
    ) -> None:
        with world.example():
            begin(world, former)
            if from_the_start:
                world.follower.start()
            for writer, number, expires_in_ms, soft_failed in rows:
                world.commit(number, world.reserve(writer), expires_in_ms, soft_failed)
                if number % 3 == 0:
                    world.announce(writer, further=number % 2 == 0)
            for change in early:
                world.redact(*change)
            if not from_the_start:
                world.follower.start()
            world.announce_all()
            for change in late:
                world.redact(*change)
            for choices in drawn:
                query = query_of(world, choices)
                ahead = query.to_token.get_max_stream_pos() > world.announced
                world.check(query, by_index=None if ahead or query.is_empty else True)

    compare()
    assert world.seen["index"] > 150
    assert world.seen["page"] > 30
    assert world.seen["redacted"] > 30


@pytest.mark.requirement("D1", "D2", "D4", "S5")
def test_whatever_happens_meanwhile_the_answer_is_right(world: World) -> None:
    world.seen.clear()
    steps = st.one_of(
        st.tuples(st.just("write"), writers, numbers, expiries, rarely),
        st.tuples(st.just("write"), all_writers, numbers, expiries, rarely),
        st.tuples(st.just("reserve"), writers),
        st.tuples(st.just("commit"), numbers, numbers, expiries, rarely),
        st.tuples(st.just("announce"), writers, st.booleans()),
        st.tuples(st.just("announce"), writers, st.booleans()),
        st.tuples(st.just("redact"), numbers, numbers),
        st.tuples(st.just("purge"), st.sampled_from(ROOMS)),
        st.tuples(st.just("pass_time"), st.integers(1, 2)),
        st.tuples(st.just("slow"), rarely.map(lambda is_rare: not is_rare)),
        st.tuples(st.just("broken"), rarely),
        st.tuples(st.just("go_on")),
        st.tuples(st.just("go_on")),
    )

    def step(kind: str, *args: Any) -> None:
        if kind == "write":
            writer, number, expires_in_ms, soft_failed = args
            world.commit(number, world.reserve(writer), expires_in_ms, soft_failed)
        elif kind == "commit":
            if world.reserved:
                choice, number, expires_in_ms, soft_failed = args
                _, stream_id = world.reserved[choice % len(world.reserved)]
                world.commit(number, stream_id, expires_in_ms, soft_failed)
        elif kind in ("slow", "broken"):
            setattr(world.stream, kind, args[0])
        else:
            getattr(world, kind)(*args)

    @given(
        former_rows,
        st.lists(steps, max_size=8),
        st.lists(st.tuples(steps, st.none() | queries), min_size=10, max_size=30),
    )
    @settings(max_examples=300)
    def compare(former: Any, before: Any, drawn: Any) -> None:
        with world.example():
            begin(world, former)
            for one in before:
                step(*one)
            world.follower.start()
            for one, choices in drawn:
                step(*one)
                if choices is not None:
                    world.check(query_of(world, choices))
            world.settle()
            everything = Query(ROOMS, Token(stream=0), world.token(), world.now_ms(), None)
            world.check(everything, by_index=True)
            walk(everything)

    def walk(query: Query) -> None:
        _, all_there_is = world.check(query)
        for limit, at_most in ((2, 1), (100, 2)):
            found: list[tuple[str, str]] = []
            left = attr.evolve(query, limit=limit)
            while not left.is_empty:
                reached, page = world.check(left)
                found += [(room_id, e) for room_id, ids in page.items() for e in ids]
                left = attr.evolve(left, from_token=reached)
            assert max(Counter(found).values(), default=0) <= at_most
            assert {*found} == {(room_id, e) for room_id, ids in all_there_is.items() for e in ids}

    compare()
    assert world.seen["index"] > 100
    assert world.seen["SQL"] > 30


@pytest.mark.requirement("S5")
def test_what_changes_while_the_database_takes_its_time(world: World) -> None:
    with world.example():
        begin(world, [])
        for number in range(3):
            world.commit(number, world.reserve(WRITERS[0]), 1_000, False)
        world.follower.start()
        world.announce_all()
        query = Query(ROOMS, Token(stream=0), world.token(), world.now_ms(), None)
        world.check(query, by_index=True)

        world.stream.slow = True
        world.commit(3, world.reserve(WRITERS[0]), 1_000, False)
        world.announce_all()
        world.check(query, by_index=True)
        world.redact(0, 0)  # a page is being read
        world.check(query, by_index=False)
        world.go_on()
        world.redact(1, 0)  # the first one is being looked up
        world.check(query, by_index=False)
        world.go_on()
        world.check(query, by_index=False)
        world.go_on()
        assert not world.stream.read
        _, by_room = world.check(query, by_index=True)
        # Who asks for all of them gets those that came meanwhile as well.
        assert list(by_room.values()) == [[e.event_id] for e in world.events[2:4]]


@pytest.mark.requirement("S5")
@pytest.mark.parametrize("purged", [True, False])
def test_what_changes_in_a_page_that_is_being_read(world: World, purged: bool) -> None:
    with world.example():
        begin(world, [])
        world.follower.start()
        world.announce_all()
        world.stream.slow = True
        for number in range(2):
            world.commit(number, world.reserve(WRITERS[0]), 1_000, False)
        world.announce_all()
        if purged:
            world.purge(ROOMS[0])
        else:
            world.redact(0, 0)
        world.settle()
        query = Query(ROOMS, Token(stream=0), world.token(), world.now_ms(), None)
        _, by_room = world.check(query, by_index=True)
        assert list(by_room.values()) == [[world.events[1].event_id]]


@pytest.mark.requirement("D2")
def test_a_token_that_is_ahead_for_a_former_writer(world: World) -> None:
    with world.example():
        begin(world, [])
        world.follower.start()
        world.announce_all()
        world.commit(0, world.reserve(FORMER_WRITER), 1_000, False)
        to_token = Token(stream=1, instance_map=immutabledict({FORMER_WRITER: world.last}))
        query = Query(ROOMS, Token(stream=0), to_token, world.now_ms(), None)
        _, by_room = world.check(query, by_index=False)
        assert list(by_room.values()) == [[world.events[0].event_id]]


@pytest.mark.requirement("D1", "S5")
def test_an_index_that_fails_leaves_it_to_the_database(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with world.example():
        begin(world, [])
        for number in range(4):
            world.commit(number, world.reserve(WRITERS[0]), 1_000, False)
        world.redact(0, 0)
        world.follower.start()
        world.announce_all()
        query = Query(ROOMS, Token(stream=0), world.token(), world.now_ms(), 3)
        world.check(query, by_index=True)
        monkeypatch.setattr(world.follower, "holds", lambda up_to: 1 // 0)
        answer = query.ask(world.store.get_sticky_events_in_rooms)
        assert world.sql_queries == 1
        assert answer[0].stream == 4, "Synapse's page, of which one is redacted"
        assert [e for ids in answer[1].values() for e in ids] == [
            world.events[1].event_id,
            world.events[2].event_id,
        ]


class AnotherStore:
    """One that takes and gives other things than tokens and events by room."""

    async def get_sticky_events_in_rooms(
        self, room_ids: object, *, from_token: object, to_token: object, now: int, limit: int
    ) -> object:
        return to_token, ["something else"]


class OfThatStore(Homeserver):
    """A homeserver with this store and nothing else."""

    def __init__(self) -> None:
        self.hs: Any = SimpleNamespace(config=SimpleNamespace())
        self.store = AnotherStore()
        self._undo = []


@pytest.mark.requirement("H1", "H5")
def test_what_is_of_another_kind_is_left_to_synapse() -> None:
    async def nowhere(question: Any) -> None:
        raise AssertionError("it was asked")

    homeserver = OfThatStore()
    SynapseDelivery(homeserver).answer_from(nowhere)
    asked = homeserver.store.get_sticky_events_in_rooms(
        ROOMS, from_token=None, to_token="a token", now=START_MS, limit=1
    )
    assert done(asked) == ("a token", ["something else"])


@pytest.mark.requirement("S5")
def test_what_a_ban_redacts_is_left_out(world: World) -> None:
    with world.example():
        begin(world, [])
        for number in range(6):
            world.commit(number, world.reserve(WRITERS[0]), 1_000, False)
        world.follower.start()
        world.announce_all()
        world.ban(ROOMS[0], USERS[0])
        query = Query(ROOMS, Token(stream=0), world.token(), world.now_ms(), None)
        world.check(query)


@pytest.mark.requirement("D4")
def test_what_a_first_response_is_chosen_by(world: World) -> None:
    with world.example():
        begin(world, [])
        for number in range(EVENTS):
            world.commit(number, world.reserve(WRITERS[0]), 1_000, False)
        options = {"after": 0, "up_to": world.last, "now_ms": START_MS, "limit": EVENTS}
        rows = done(world.stream.rows_in_rooms(ROOMS, **options))
        for event, row in zip(world.events, rows, strict=True):
            assert row.event_id == event.event_id
            assert row.key == key_of("m.test", event.content)
            assert row.newness_ms == START_MS + 3_600_000
            assert row.size_bytes == len(json_encoder.encode(event.get_dict()).encode())
        assert len({row.key for row in rows}) == 5, "four, and none"
        # A large one is not read.
        event = world.events[1]
        large = json_encoder.encode({**event.get_dict(), "large": "ä" * MOST_READ_BYTES})
        world._transact(
            world.store.db_pool.simple_update_one_txn,
            "event_json",
            {"event_id": event.event_id},
            {"json": large},
        )
        row = done(world.stream.rows_in_rooms(ROOMS, **options))[1]
        small = json_encoder.encode(event.get_dict())
        world._transact(
            world.store.db_pool.simple_update_one_txn,
            "event_json",
            {"event_id": event.event_id},
            {"json": small},
        )
        assert (row.key, row.newness_ms, row.size_bytes) == (None, None, len(large.encode()))


@pytest.mark.requirement("D4")
def test_too_much_for_the_database_comes_in_its_order(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(present, "_MOST_READ", 4)
    monkeypatch.setattr(present, "_PAGE", 2)
    with world.example():
        begin(world, [])
        for number in range(4):
            world.commit(number, world.reserve(WRITERS[0]), 1_000, False)
        world.announce_all()
        query = Query(ROOMS, Token(stream=0), world.token(), world.now_ms(), 100)
        answer = query.ask(world.store.get_sticky_events_in_rooms)
        assert world.stream.asked_apart == 2
        assert world.sql_queries == 1
        assert answer == query.ask(world._theirs)


@pytest.mark.requirement("H3")
def test_few_at_a_time_read_much_from_the_database() -> None:
    """After a restart all clients come while the index is being filled from there."""
    reading: list[Deferred[list[StickyRow]]] = []

    async def rows_in_rooms(*args: Any, **options: Any) -> list[StickyRow]:
        reading.append(Deferred())
        return await reading[-1]

    async def catch_up(find: Callable[[], None]) -> None:
        return find()

    stream = SimpleNamespace(positions=dict, rows_in_rooms=rows_in_rooms)
    empty: Any = SimpleNamespace(holds=lambda _: False, catch_up=catch_up, stream=stream)
    here: Any = SimpleNamespace(metrics=METRICS)
    delivery = DeliveryHandler(here, empty, here)
    question = Question(ROOMS, Position(0), Position(5), 0, 100)
    asked = [ensureDeferred(delivery.answer(question)) for _ in range(5_000)]
    assert len(reading) == 3
    assert sum(answer.called for answer in asked) == 4_997
    assert asked[-1].result is None, "Synapse's own query serves"
    for rows in reading:
        rows.callback([])
    assert all(answer.called for answer in asked)
    assert asked[0].result == ({}, Position(5))
    ensureDeferred(delivery.answer(question))
    assert len(reading) == 4


@pytest.mark.requirement("D4", "H3")
def test_more_rooms_than_a_database_takes_arguments(world: World) -> None:
    with world.example():
        begin(world, [])
        world.commit(0, world.reserve(WRITERS[0]), 1_000, False)
        world.announce_all()
        rooms = {*ROOMS, *(f"!{n}:here" for n in range(MOST_ARGUMENTS + 1))}
        after, up_to = Position(0), position_of(world.token())
        question = Question(rooms, after, up_to, world.now_ms(), 100)
        by_room, reached = done(world.delivery.answer(question))
        assert by_room == {ROOMS[0]: [world.events[0].event_id]}
        assert reached == up_to


@contextmanager
def waiting(world: World, syncs: int) -> Iterator[list[Answer]]:
    """So many syncs that wait for an event that is just being read; and their answers to come."""
    with world.example():
        begin(world, [])
        world.follower.start()
        world.announce_all()
        world.stream.slow = True
        world.commit(0, world.reserve(WRITERS[0]), 1_000, False)
        world.announce_all()
        query = Query(ROOMS, Token(stream=0), world.token(), world.now_ms(), None)
        answers: list[Answer] = []
        for _ in range(syncs):
            asked = query.begin(world.store.get_sticky_events_in_rooms)
            ensureDeferred(asked).addCallback(answers.append)
        assert not answers
        assert len(world.stream.read) == 1, "one reads for all"
        yield answers
        found = [list(by_room.values()) for _, by_room in answers]
        assert found == [[[world.events[0].event_id]]] * syncs


@pytest.mark.requirement("D1", "D2")
def test_many_wait_for_the_one_who_reads(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "patient", True)
    with waiting(world, 3):
        world.settle()
        assert world.queries == 0


@pytest.mark.requirement("D1", "D2")
@pytest.mark.parametrize("broken", [True, False])
def test_who_has_waited_long_enough_asks_the_database(
    world: World, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    monkeypatch.setattr(world, "patient", True)
    with waiting(world, 1):
        if broken:
            world.stream.broken = True
            world.go_on()
        else:
            world.reactor.advance(1)
        assert world.queries == 1


# One event in doubt


@pytest.mark.requirement("H3", "S5")
def test_one_event_in_doubt_is_the_doubt_of_those_who_would_get_it(world: World) -> None:
    with world.example():
        begin(world, [])
        for number in range(6):
            world.commit(number, world.reserve(WRITERS[0]), 1_000, False)
        world.follower.start()
        world.announce_all()
        everything, now_ms = Token(stream=0), world.now_ms()
        world.stream.slow = True
        world.redact(0, 0)
        of_it = Query([ROOMS[0]], everything, world.token(), now_ms, None)
        of_others = Query(ROOMS[1:], everything, world.token(), now_ms, None)
        before_it = Query(ROOMS, everything, Token(stream=1), now_ms, 100)
        assert world.stream.read, "it is being looked up"
        world.check(of_others, by_index=True)
        world.check(before_it, by_index=True)
        world.check(of_it, by_index=False)
        world.settle()
        world.check(of_it, by_index=True)


@pytest.mark.requirement("H3", "S5")
def test_many_redactions_send_no_sync_to_the_database(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "patient", True)
    with world.example():
        begin(world, [])
        for number in range(EVENTS):
            world.commit(number, world.reserve(WRITERS[0]), 1_000, False)
        world.follower.start()
        world.announce_all()
        world.stream.slow = True
        answers: list[Answer] = []
        query = Query(ROOMS, Token(stream=0), world.token(), world.now_ms(), None)
        for number in range(EVENTS - 1):
            world.redact(number, number % 2)
            for _ in range(3):
                asked = query.begin(world.store.get_sticky_events_in_rooms)
                ensureDeferred(asked).addCallback(answers.append)
            if number % 5 == 0:
                world.go_on()
        world.settle()
        assert world.queries == 0
        assert len(answers) == 3 * (EVENTS - 1)
        last = {event_id for event_ids in answers[-1][1].values() for event_id in event_ids}
        assert len(world.redacted) > 5
        assert last == {event.event_id for event in world.events} - world.redacted


@pytest.mark.requirement("H3", "D1")
def test_new_events_are_taken_in_however_fast_others_change(world: World) -> None:
    """Each look-up takes until the next event has changed."""
    with world.example():
        begin(world, [])
        for number in range(EVENTS - 1):
            world.commit(number, world.reserve(WRITERS[0]), 1_000, False)
        world.follower.start()
        world.announce_all()
        world.stream.slow = True
        world.redact(0, 0)
        world.commit(EVENTS - 1, world.reserve(WRITERS[0]), 1_000, False)
        world.announce_all()
        assert not world.follower.in_step()
        for number in range(1, 6):
            world.redact(number, number % 2)
            world.go_on()
        assert world.follower.in_step()
        world.settle()


@pytest.mark.requirement("H3", "D1")
def test_rows_by_event_id(world: World) -> None:
    """Also of an event that was an outlier before: its row has another ordering than itself."""
    with world.example():
        begin(world, [])
        for number in range(4):
            world.commit(number, world.reserve(WRITERS[0]), 1_000, False)
        world.set_ordering(1, 1_000)
        asked = [event.event_id for event in world.events[:6]]
        rows = done(world.stream.rows_of([*asked, "$unknown"]))
        found = {row.event_id: (row.room_id, row.stream_id) for row in rows}
        assert found == {
            event.event_id: (event.room_id, number + 2)
            for number, event in enumerate(world.events[:4])
        }


@pytest.mark.requirement("H3")
def test_no_row_is_found_by_a_scan(world: World) -> None:
    if world.process.is_postgres:
        pytest.skip("Postgres scans a table as small as this one, whatever it has")
    event_ids = [event.event_id for event in world.events[:3]]
    with world.example():
        begin(world, [])
        for number in range(3):
            world.commit(number, world.reserve(WRITERS[0]), 1_000, False)
        world.follower.start()
        world.announce_all()
        with world.statements() as statements:
            done(world.stream.rows_of(event_ids))
            world.redact(0, 0)
            world.settle()
        plans = [line for sql, args in statements for line in world.plan_of(sql, args)]
        assert any("se " in line or "sticky_events" in line for line in plans)
        assert [line for line in plans if line.startswith("SCAN")] == []


# What goes out (D8)


@attr.s(auto_attribs=True, frozen=True)
class SyncConfig:
    user: UserID


def sync_result(sections: dict[str, list[EventBase]]) -> SyncResult:
    """An answer to /sync with these sections, by room."""
    empty = TimelineBatch(prev_batch=StreamToken.START, events=[], limited=False)
    result = SyncResult.empty(StreamToken.START, {}, [])
    for room_id, events in sections.items():
        sticky = [FilteredEvent(event=event, membership="join") for event in events]
        result.joined.append(JoinedSyncResult(room_id, empty, {}, [], [], sticky, {}, {}, None, 0))
    return result


@pytest.mark.requirement("D8", "S5")
def test_sections_as_they_go_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Synapse may have made them some time ago: it repeats its answer to the same request."""
    a, b, c, d = world.events[:4]
    assert [event.room_id for event in (a, b, c, d)] == [*ROOMS, ROOMS[0]]
    kept = sync_result({ROOMS[0]: [a, d], ROOMS[1]: [b], ROOMS[2]: []})
    shown = [list(room.sticky) for room in kept.joined]
    joined = set(ROOMS)

    async def wait_for_sync_for_user(*args: Any, **options: Any) -> SyncResult:
        assert (args[1:], options) == ((config, "key"), {"timeout": 5})
        return kept

    async def get_rooms_for_user(user_id: str) -> frozenset[str]:
        assert user_id == "@me:here"
        return frozenset(joined)

    def sections() -> dict[str, list[str]]:
        asked = handler.wait_for_sync_for_user("requester", config, "key", timeout=5)
        result = done(asked)
        assert [list(room.sticky) for room in kept.joined] == shown, "others get it, too"
        return {room.room_id: [s.event.event_id for s in room.sticky] for room in result.joined}

    config = SyncConfig(UserID.from_string("@me:here"))
    handler: Any = world.hs.get_sync_handler()
    with world.example(), monkeypatch.context() as patched:
        patched.setattr(handler, "wait_for_sync_for_user", wait_for_sync_for_user)
        patched.setattr(world.store, "get_rooms_for_user", get_rooms_for_user)
        assert Access(world.process).guard("delivery") == (True, [])
        whole = {
            ROOMS[0]: [a.event_id, d.event_id],
            ROOMS[1]: [b.event_id],
            ROOMS[2]: [],
        }
        assert sections() == whole
        joined.remove(ROOMS[1])
        assert sections() == {**whole, ROOMS[1]: []}
        world.follower.start()
        world.redact(0, 0)
        assert sections() == {**whole, ROOMS[0]: [d.event_id], ROOMS[1]: []}


@pytest.mark.requirement("S4", "S5")
@pytest.mark.parametrize("by_row", [True, False])
def test_sections_of_before_have_nothing_that_expired(world: World, by_row: bool) -> None:
    """An event expires when its row says; where none can be read, when its sender's server says."""
    a, b, _, d = world.events[:4]
    kept = sync_result({ROOMS[0]: [a, d], ROOMS[1]: [b]})
    shown = [list(room.sticky) for room in kept.joined]

    async def wait_for_sync_for_user(*args: Any, **options: Any) -> SyncResult:
        return kept

    async def get_rooms_for_user(user_id: str) -> frozenset[str]:
        return frozenset(ROOMS)

    async def rows_of(event_ids: Collection[str]) -> dict[str, StickyRow]:
        if not by_row:
            raise OSError("the database is away")
        return await world.follower.rows_of(event_ids)

    def sections() -> list[list[str]]:
        config = SyncConfig(UserID.from_string("@me:here"))
        result = done(handler.wait_for_sync_for_user("requester", config))
        assert [list(room.sticky) for room in kept.joined] == shown, "others get it, too"
        return [[s.event.event_id for s in room.sticky] for room in result.joined]

    handler: Any = world.hs.get_sync_handler()
    with world.example(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(handler, "wait_for_sync_for_user", wait_for_sync_for_user)
        patched.setattr(world.store, "get_rooms_for_user", get_rooms_for_user)
        assert Access(world.process, rows_of).guard("delivery") == (True, [])
        world.follower.start()
        for number, lasts_ms in ((0, 60_000), (1, 3_600_000), (3, 120_000)):
            world.commit(number, world.reserve(WRITERS[0]), lasts_ms, soft_failed=False)
        world.announce_all()
        whole = [[a.event_id, d.event_id], [b.event_id]]
        assert sections() == whole
        world.pass_time(60)
        assert sections() == ([[d.event_id], [b.event_id]] if by_row else whole)
        world.redact(1, 0)
        assert sections() == ([[d.event_id], []] if by_row else [whole[0], []])
        world.pass_time(3_540)
        assert sections() == [[], []]


@pytest.mark.requirement("H3")
def test_a_section_costs_no_query_while_the_index_is_in_step(world: World) -> None:
    config = SyncConfig(UserID.from_string("@me:here"))

    async def wait_for_sync_for_user(*args: Any, **options: Any) -> SyncResult:
        return sync_result({ROOMS[0]: world.events[:1]})

    async def get_rooms_for_user(user_id: str) -> frozenset[str]:
        return frozenset(ROOMS)

    handler: Any = world.hs.get_sync_handler()
    with world.example(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(handler, "wait_for_sync_for_user", wait_for_sync_for_user)
        patched.setattr(world.store, "get_rooms_for_user", get_rooms_for_user)
        assert Access(world.process, world.follower.rows_of).guard("delivery") == (True, [])
        world.follower.start()
        world.commit(0, world.reserve(WRITERS[0]), 60_000, soft_failed=False)
        world.announce_all()
        with world.statements() as found:
            result = done(handler.wait_for_sync_for_user("requester", config))
        assert [len(room.sticky) for room in result.joined] == [1]
        assert not found


@pytest.mark.requirement("H3")
def test_rows_that_the_index_has_are_not_asked_for_while_it_is_behind(world: World) -> None:
    a, b = (world.events[n].event_id for n in (0, 1))
    with world.example():
        world.follower.start()
        world.commit(0, world.reserve(WRITERS[0]), 60_000, soft_failed=False)
        world.announce_all()
        assert world.follower.in_step()
        world.stream.slow = True
        world.commit(1, world.reserve(WRITERS[0]), 60_000, soft_failed=False)
        world.announce_all()
        assert not world.follower.in_step()
        with world.statements() as found:
            assert list(done(world.follower.rows_of([a]))) == [a]
            assert not found
            waiting = ensureDeferred(world.follower.rows_of([a, b]))
            assert found
        while world.stream.read:
            world.go_on()
        assert sorted(done(waiting)) == sorted([a, b])
