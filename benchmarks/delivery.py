"""Which sticky events a sync is given: the index beside Synapse's own SQL, on the same data.

``python -m benchmarks.delivery``, or for a short look ``--seconds 0.2 --load 100000``
"""

import argparse
import gc
import os
import platform
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import attr

from tests.lab.postgres import Postgres
from tests.lab.say import say

T = TypeVar("T")
Answer = tuple[Any, dict[str, list[str]]]

ROOM_COUNTS = (10, 100, 1_000, 5_000)
ALL_ROOMS = 10_000
NEW = 20
"""Events since the client's last sync, in all rooms."""
NEW_ASKED = 5
"""Of these, in the first few rooms, which are always asked for."""
LEAST_ROUNDS = 9
SERVER = "bench.example"
INCREMENTAL, IDLE, FIRST, JOINED = "incremental", "idle", "first sync", "newly joined"
PAGE = 100
"""The most sticky events in a response of /sync."""
GOALS = {(INCREMENTAL, 1_000): 100, (INCREMENTAL, 5_000): 100, (JOINED, 1_000): 20}
"""How many times as fast the index is to be, on Postgres with 100,000 unexpired events."""
MOST_BYTES = 200
MOST_PAUSE_MS = 50


# The data


@attr.s(auto_attribs=True, frozen=True)
class Made:
    """A sticky event."""

    stream_id: int
    room_id: str
    event_id: str
    sender: str
    expires_at_ms: int


def room_name(number: int) -> str:
    """As long as a room's ID is."""
    return f"!{number:0>18}:{SERVER}"


def made(count: int, now_ms: int) -> Iterator[Made]:
    """Events of 20,000 users of 1,000 servers, by stream ID: 20 users in each of the rooms."""
    chance = random.Random(1)  # noqa: S311  # the same data every time
    for number in range(count):
        ends = count - number <= NEW_ASKED
        room = chance.randrange(min(ROOM_COUNTS) if ends else ALL_ROOMS)
        user = (room * 20 + chance.randrange(20)) * 7 % 20_000
        yield Made(
            stream_id=number + 2,
            room_id=room_name(room),
            event_id="$" + chance.randbytes(33).hex()[:43],
            sender=f"@user{user}:server{user % 1_000}.example",
            expires_at_ms=now_ms + chance.randrange(1_800_000, 3_600_000),
        )


def event_json(event: Made) -> str:
    """A member of a call, as a server receives it."""
    return (
        f'{{"auth_events":["${"a" * 43}","${"b" * 43}"],"content":{{"application":"m.call",'
        '"call_id":"","device_id":"ABCDEFGHIJ","foci_preferred":[{"livekit_alias":'
        f'"{event.room_id}","livekit_service_url":"https://livekit.example.org/sfu/get",'
        '"type":"livekit"}],"focus_active":{"focus_selection":"oldest_membership","type":'
        '"livekit"},"scope":"m.room","sticky_key":"ABCDEFGHIJ_m.call"},"depth":7,"hashes":'
        f'{{"sha256":"{event.event_id[1:]}"}},"msc4354_sticky":{{"duration_ms":3600000}},'
        f'"origin_server_ts":{event.expires_at_ms - 3_600_000},"prev_events":["${"c" * 43}"],'
        f'"room_id":"{event.room_id}","sender":"{event.sender}","signatures":{{"server.example":'
        f'{{"ed25519:a_name":"{event.event_id[1:] * 2}"}}}},"type":"m.rtc.member","unsigned":{{}}}}'
    )


def make_config(folder: str, database: dict[str, Any]) -> Any:
    """A homeserver's configuration with nothing in it but a database."""
    from synapse.config.homeserver import HomeServerConfig

    config = HomeServerConfig()
    config.parse_config_dict(
        {
            "server_name": SERVER,
            "database": database,
            "listeners": [],
            "signing_key": "ed25519 1 " + "A" * 43,
            "macaroon_secret_key": "macaroon",
            "media_store_path": f"{folder}/media",
            "report_stats": False,
            "trusted_key_servers": [],
            "experimental_features": {"msc4354_enabled": True},
        },
        "",
        "",
    )
    return config


def connect(config: Any) -> Any:
    """A connection as Synapse makes it for itself."""
    from synapse.storage.database import make_conn
    from synapse.storage.engines import create_engine

    (database,) = config.database.databases
    return make_conn(
        db_config=database,
        engine=create_engine(database.config),
        default_txn_name="benchmark",
        server_name=SERVER,
    )


def fill(config: Any, count: int) -> None:
    """Synapse's schema, and so many unexpired sticky events in it."""
    from synapse.storage.database import DatabasePool
    from synapse.storage.engines import PostgresEngine
    from synapse.storage.prepare_database import prepare_database

    connection = connect(config)
    engine: Any = connection.engine
    prepare_database(connection, engine, config)
    connection.commit()
    txn = connection.cursor(txn_name="fill")
    if not isinstance(engine, PostgresEngine):
        txn.execute("PRAGMA synchronous = OFF")
        txn.execute("PRAGMA cache_size = -1000000")
    events = made(count, int(time.time() * 1000))
    while chunk := [event for _, event in zip(range(10_000), events, strict=False)]:
        DatabasePool.simple_insert_many_txn(
            txn,
            "event_json",
            ("event_id", "room_id", "internal_metadata", "json", "format_version"),
            [(e.event_id, e.room_id, "{}", event_json(e), 3) for e in chunk],
        )
        DatabasePool.simple_insert_many_txn(
            txn,
            "sticky_events",
            (
                *("stream_id", "instance_name", "event_id", "room_id"),
                *("event_stream_ordering", "sender", "expires_at"),
            ),
            [
                (
                    *(e.stream_id, "master", e.event_id, e.room_id),
                    *(e.stream_id, e.sender, e.expires_at_ms),
                )
                for e in chunk
            ],
        )
        connection.commit()
    if isinstance(engine, PostgresEngine):
        txn.execute("SELECT setval('sticky_events_sequence', ?)", (count + 1,))
        connection.commit()
        connection.conn.autocommit = True
        txn.execute("VACUUM ANALYZE")
    else:
        txn.execute("ANALYZE")
        connection.commit()
    connection.close()


class Synapse:
    """Synapse's own store, with the module's index and its delivery in place."""

    def __init__(self, config: Any) -> None:
        import logging

        from synapse.app.homeserver import SynapseHomeServer
        from synapse.metrics._gc import install_gc_manager

        from synapse_sticky.handlers.delivery.handler import DeliveryHandler
        from synapse_sticky.handlers.delivery.synapse import SynapseDelivery
        from synapse_sticky.homeserver import Homeserver
        from synapse_sticky.index import IndexFollower
        from synapse_sticky.index.synapse import SynapseStickyStream

        logging.getLogger("synapse").setLevel(logging.ERROR)
        self.hs = SynapseHomeServer(SERVER, config=config)
        self.hs.setup()
        datastores: Any = self.hs.get_datastores()
        self.store = datastores.main
        self.theirs: Callable[..., Awaitable[Answer]] = self.store.get_sticky_events_in_rooms
        homeserver = Homeserver(self.hs.get_module_api())
        self.follower = IndexFollower(homeserver, SynapseStickyStream(homeserver))
        DeliveryHandler(homeserver, self.follower, SynapseDelivery(homeserver)).install()
        self.ours: Callable[..., Awaitable[Answer]] = self.store.get_sticky_events_in_rooms
        assert self.ours != self.theirs
        # As Synapse does when it starts.
        install_gc_manager()
        gc.collect()
        gc.freeze()

    async def load(self, reactor: Any) -> float:
        """Fills the index. How many seconds that took."""
        from twisted.internet.task import deferLater

        start_s = time.monotonic()
        self.follower.start()
        while not self.follower.in_step():
            await deferLater(reactor, 0.005)
        return time.monotonic() - start_s


def in_reactor(function: Callable[[Any], Awaitable[T]]) -> T:
    """Runs the function in Twisted's reactor, which runs once in a process."""
    from twisted.internet import reactor
    from twisted.internet.defer import ensureDeferred

    the_reactor: Any = reactor
    results: list[Any] = []

    def begin() -> None:
        done: Any = ensureDeferred(function(the_reactor))  # type: ignore[arg-type]
        done.addBoth(results.append).addBoth(lambda _: the_reactor.stop())

    the_reactor.callWhenRunning(begin)
    the_reactor.run(installSignalHandlers=False)
    (result,) = results
    if hasattr(result, "raiseException"):
        result.raiseException()
    answer: T = result
    return answer


# Queries


@attr.s(auto_attribs=True, frozen=True)
class Case:
    """What was asked, and the times of each round."""

    database: str
    events: int
    kind: str
    rooms: int
    found: int
    sql_s: list[float] = attr.Factory(list)
    """Synapse's query alone."""
    call_s: list[float] = attr.Factory(list)
    """Synapse's method, which has a database thread run the query in a transaction."""
    cold_s: list[float] = attr.Factory(list)
    """The module's method in its place, called after the process has waited for the database."""
    index_s: list[float] = attr.Factory(list)
    """The same, called again: as warm as the query."""

    @property
    def ratios(self) -> list[float]:
        return [sql_s / index_s for sql_s, index_s in zip(self.sql_s, self.index_s, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def to_its_end(awaitable: Any) -> Any:
    """The result of a coroutine that never waits."""
    try:
        awaitable.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("the module asked the database")


async def time_case(
    synapse: Synapse, connection: Any, case: Case, rooms: Collection[str], seconds: float
) -> Case:
    """Asks in turns, until the time is over."""
    from immutabledict import immutabledict
    from synapse.types import MultiWriterStreamToken

    last = case.events + 1
    first = {INCREMENTAL: last - NEW, IDLE: last, FIRST: 0, JOINED: 0}[case.kind]
    options: dict[str, Any] = {
        "from_token": MultiWriterStreamToken(stream=first, instance_map=immutabledict()),
        "to_token": MultiWriterStreamToken(stream=last, instance_map=immutabledict()),
        "now": int(time.time() * 1000),
        "limit": None if case.kind == JOINED else PAGE,
    }
    txn = connection.cursor(txn_name="get_sticky_events_in_rooms")
    clock = time.perf_counter
    expected = await synapse.theirs(rooms, **options)
    ours = to_its_end(synapse.ours(rooms, **options))
    # A first response has more than Synapse's, which is the oldest.
    assert case.kind == FIRST or ours == expected
    case = attr.evolve(case, found=sum(map(len, ours[1].values())))
    ends_s = clock() + seconds
    while clock() < ends_s or len(case.sql_s) < LEAST_ROUNDS:
        start_s = clock()
        await synapse.theirs(rooms, **options)
        case.call_s.append(clock() - start_s)
        start_s = clock()
        synapse.store._get_sticky_events_in_rooms_txn(txn, rooms, **options)
        case.sql_s.append(clock() - start_s)
        connection.rollback()
        for times_s in (case.cold_s, case.index_s):
            start_s = clock()
            to_its_end(synapse.ours(rooms, **options))
            times_s.append(clock() - start_s)
    txn.close()
    return case


def queries(database: str, events: int, seconds: float) -> tuple[str, list[Case]]:
    """The version of the database and its cases. In a process of its own."""
    postgres = Postgres() if database == "Postgres" else nullcontext()
    with tempfile.TemporaryDirectory(prefix="sticky-bench-") as folder, postgres as server:
        if server is not None:
            section = server.new_database()
        else:
            section = {"name": "sqlite3", "args": {"database": f"{folder}/homeserver.db"}}
        config = make_config(folder, section)
        fill(config, events)
        connection = connect(config)

        async def run(reactor: Any) -> tuple[str, list[Case]]:
            synapse = Synapse(config)
            await synapse.load(reactor)
            assert len(synapse.follower.index) == events
            names = [room_name(number) for number in range(max(ROOM_COUNTS))]
            cases = []
            for kind in (INCREMENTAL, IDLE, FIRST, JOINED):
                for count in ROOM_COUNTS if kind == INCREMENTAL else (1_000,):
                    # As Synapse gives them.
                    rooms = names[:count] if kind == JOINED else frozenset(names[:count])
                    case = Case(database, events, kind, count, 0)
                    cases.append(await time_case(synapse, connection, case, rooms, seconds))
            synapse.store.db_pool._db_pool.close()
            connection.close()
            return synapse.store.database_engine.server_version, cases

        return in_reactor(run)


def duration(seconds: float) -> str:
    """With three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            break
    return f"{seconds * scale:#.3g}".rstrip(".") + f" {unit}"


def factor(number: float) -> str:
    """With two digits at least."""
    return f"{number:.0f}" if number >= 100 else f"{number:#.2g}".rstrip(".")


def say_cases(cases: Sequence[Case]) -> None:
    """The table."""
    line = "{:<10}{:>8}  {:<13}{:>6}{:>7}{:>10}{:>10}{:>10}{:>10}{:>8}  {}"
    titles = ("database", "events", "sync", "rooms", "found", "SQL", "SQL call", "cold", "index")
    say(line.format(*titles, "ratio", "middle half"))
    for case in cases:
        times = (case.sql_s, case.call_s, case.cold_s, case.index_s)
        quarters = statistics.quantiles(case.ratios, n=4)
        say(
            line.format(
                *(case.database, case.events, case.kind, case.rooms, case.found),
                *(duration(statistics.median(times_s)) for times_s in times),
                factor(case.ratio),
                f"{factor(quarters[0])} to {factor(quarters[2])}",
            )
        )


# Memory and loading


def bytes_per_row(rows: int) -> float:
    """What a row of the index costs beyond its event ID and, once each, the names of rooms, users
    and servers, by the growth of a fresh process."""
    from synapse_sticky._core import StickyIndex

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def take_in(index: StickyIndex, count: int) -> None:
        events = made(count, 0)
        while chunk := [event for _, event in zip(range(500), events, strict=False)]:
            index.insert(
                (
                    *(e.stream_id, "master", e.room_id, e.event_id, e.sender, e.expires_at_ms),
                    *(e.stream_id, e.expires_at_ms, 1_000),
                )
                for e in chunk
            )

    names = {name for e in made(rows, 0) for name in (e.room_id, e.sender)}
    names |= {e.sender.partition(":")[2] for e in made(rows, 0)}
    strings = sum(len(e.event_id) for e in made(rows, 0)) + sum(map(len, names))
    take_in(StickyIndex(SERVER), 500)  # what Python itself takes is there from now on
    before = resident()
    index = StickyIndex(SERVER)
    take_in(index, rows)
    assert len(index) == rows
    return (resident() - before - strings) / rows


@attr.s(auto_attribs=True, frozen=True)
class Loading:
    """How long it took, and how long the reactor could not do anything else meanwhile."""

    seconds: float
    pauses: list[tuple[float, float]]
    """Each with the CPU time of the reactor's thread in it, in ms. More than that is waiting: for
    the other thread, which reads from the database, or for other programs."""
    idle_pauses: list[tuple[float, float]]
    """The same for some seconds in which nothing was loaded."""


class Ticker:
    """Notes how late each tick of a millisecond comes."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._pauses: list[tuple[float, float]] = []
        self._last = (time.perf_counter(), time.thread_time())
        self._call = reactor.callLater(0.001, self._tick)

    def _tick(self) -> None:
        now = (time.perf_counter(), time.thread_time())
        clock_s, cpu_s = (after - before for after, before in zip(now, self._last, strict=True))
        self._pauses.append((clock_s * 1000, cpu_s * 1000))
        self._last = now
        self._call = self._reactor.callLater(0.001, self._tick)

    def stop(self) -> list[tuple[float, float]]:
        """Gives the pauses."""
        self._call.cancel()
        return self._pauses


def loading(rows: int) -> Loading:
    """Fills the index through the follower, from SQLite."""
    with tempfile.TemporaryDirectory(prefix="sticky-bench-") as folder:
        section = {"name": "sqlite3", "args": {"database": f"{folder}/homeserver.db"}}
        config = make_config(folder, section)
        fill(config, rows)

        async def run(reactor: Any) -> Loading:
            from twisted.internet.task import deferLater

            synapse = Synapse(config)
            idle = Ticker(reactor)
            await deferLater(reactor, 3)
            idle_pauses = idle.stop()
            ticker = Ticker(reactor)
            seconds = await synapse.load(reactor)
            pauses = ticker.stop()
            assert len(synapse.follower.index) == rows
            synapse.store.db_pool._db_pool.close()
            return Loading(seconds, pauses, idle_pauses)

        return in_reactor(run)


# The figures


def draw(cases: Sequence[Case], path: Path) -> None:
    """Rooms against the time of an incremental sync's question, with the most events."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "the same names in every drawing"
    most = max(case.events for case in cases)
    shown = [case for case in cases if case.kind == INCREMENTAL and case.events == most]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    lines: list[tuple[str, str, list[tuple[int, float]]]] = []
    for database, colour in (("Postgres", "#2f6db5"), ("SQLite", "#d9822b")):
        of_it = [case for case in shown if case.database == database]
        if of_it:
            points = [(case.rooms, statistics.median(case.sql_s)) for case in of_it]
            lines.append((f"SQL, {database}", colour, points))
    for label, colour in (("index, cold", "#8cc49c"), ("index", "#2a8c4a")):
        points = []
        for count in ROOM_COUNTS:
            of_it = [case for case in shown if case.rooms == count]
            times = [case.index_s if label == "index" else case.cold_s for case in of_it]
            points.append((count, statistics.median(t for times_s in times for t in times_s)))
        lines.append((label, colour, points))
    for label, colour, points in lines:
        counts, times_s = [p[0] for p in points], [p[1] for p in points]
        axes.plot(counts, times_s, marker="o", color=colour)
        axes.annotate(
            label,
            (counts[-1], times_s[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ROOM_COUNTS, [f"{count:,}" for count in ROOM_COUNTS])
    axes.set_xticks([], minor=True)
    axes.set_xlim(8, 16_000)
    axes.set_yticks([1e-6, 1e-5, 1e-4, 1e-3, 1e-2], ["1 µs", "10 µs", "100 µs", "1 ms", "10 ms"])
    axes.set_xlabel("rooms of the user")
    axes.set_title(
        f"Which sticky events are new? {most:,} unexpired in the table, {NEW} of them new",
        fontsize=10,
    )
    axes.grid(visible=True, which="major", color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


@contextmanager
def fresh_process() -> Iterator[ProcessPoolExecutor]:
    """Runs one function, in a process that has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        yield executor


def alone(function: Callable[..., T], *args: Any) -> T:
    """Runs the function in a process of its own."""
    with fresh_process() as executor:
        return executor.submit(function, *args).result()


def main() -> None:
    """Prints the table and which goals are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["queries", "memory", "loading"])
    parser.add_argument("--databases", nargs="+", default=["SQLite", "Postgres"])
    parser.add_argument("--events", nargs="+", type=int, default=[1_000, 100_000])
    parser.add_argument("--seconds", type=float, default=3, help="for each line of the table")
    parser.add_argument("--load", type=int, default=1_000_000, help="events to fill the index with")
    parser.add_argument("--plot", type=Path, help="an SVG file to draw (needs matplotlib)")
    args = parser.parse_args()
    goals: list[tuple[str, bool]] = []
    if "queries" in args.parts:
        cases: list[Case] = []
        for database in args.databases:
            for events in args.events:
                say(f"{database} with {events} events", end=" ")
                version, some = alone(queries, database, events, args.seconds)
                say(f"({version})")
                cases += some
        say_cases(cases)
        for case in cases:
            least = GOALS.get((case.kind, case.rooms))
            if least and (case.database, case.events) == ("Postgres", 100_000):
                what = f"{case.kind}, {case.rooms} rooms: {case.ratio:.0f} times as fast"
                goals.append((f"{what} (at least {least})", case.ratio >= least))
        if args.plot:
            draw(cases, args.plot)
    if "memory" in args.parts:
        cost = alone(bytes_per_row, args.load)
        what = f"a row of the index beyond its strings: {cost:.0f} bytes (at most {MOST_BYTES})"
        goals.append((what, cost <= MOST_BYTES))
    if "loading" in args.parts:
        say(f"SQLite with {args.load} events")
        loaded = alone(loading, args.load)
        longest_ms, cpu_ms = max(loaded.pauses)
        say(
            f"loaded in {loaded.seconds:.1f} s; the reactor's longest pause was {longest_ms:.1f} ms"
            f" ({cpu_ms:.1f} ms of its own CPU time, in no other more than "
            f"{max(cpu for _, cpu in loaded.pauses):.1f} ms), the median "
            f"{statistics.median(p for p, _ in loaded.pauses):.1f} ms; without loading the longest "
            f"{max(loaded.idle_pauses)[0]:.1f} ms"
        )
        what = f"longest pause as {args.load} events are loaded: {longest_ms:.0f} ms"
        goals.append((f"{what} (under {MOST_PAUSE_MS})", longest_ms < MOST_PAUSE_MS))
    python, sqlite = platform.python_version(), sqlite3.sqlite_version
    say(f"Python {python}, SQLite {sqlite}, {os.cpu_count()} cores")
    for what, met in goals:
        say(f"{'met   ' if met else 'MISSED'}  {what}")
    if not all(met for _, met in goals):
        sys.exit("That is not what it should be.")


if __name__ == "__main__":
    main()
