"""Whose staged PDU is processed next (D7): the rules, on a database of the test's own.

Staged PDUs, and events, are rows in tables like Synapse's. ``Process`` is one process of the
homeserver: it processes what it chooses, as Synapse does.
"""

import asyncio
import json
import random
import sqlite3
from collections.abc import Callable, Collection, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import attr
import pytest
from synapse.api.room_versions import RoomVersions

from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.turns import handler
from synapse_sticky.handlers.staging.turns.handler import TurnsHandler
from synapse_sticky.handlers.staging.turns.pdu import Key, WaitingPdu
from synapse_sticky.handlers.staging.turns.room import PRUNE_FROM, StagedRoom
from synapse_sticky.handlers.staging.turns.synapse import SynapseTurns
from synapse_sticky.homeserver import Cursor, Homeserver
from tests.unit.settable import Settable

ROOM = "!room:there"
FLOODERS = ("a", "c", "d")
STEP_MS = 30
"""How long the processing of one PDU takes."""

_TABLES = """
CREATE TABLE federation_inbound_events_staging (
    origin TEXT, room_id TEXT, event_id TEXT, received_ts BIGINT, event_json TEXT,
    internal_metadata TEXT
);
CREATE UNIQUE INDEX by_event ON federation_inbound_events_staging (origin, event_id);
CREATE TABLE events (
    stream_ordering INTEGER PRIMARY KEY, event_id TEXT UNIQUE, room_id TEXT, sender TEXT,
    received_ts BIGINT, outlier BOOLEAN
);
"""


class Database(Settable):
    """What all processes of the homeserver share: the time, staged PDUs, events."""

    def __init__(self) -> None:
        self.now = 1_000_000_000
        self.connection = sqlite3.connect(":memory:")
        self.connection.executescript(_TABLES)
        self.statements = 0
        self.rows = 0

    # As ``Homeserver`` has it

    def now_ms(self) -> int:
        return self.now + self.set_by_ms

    def steady_ms(self) -> int:
        return self.now

    def in_list(self, column: str, values: Collection[object]) -> tuple[str, list[Any]]:
        return f"{column} IN ({', '.join('?' * len(values))})", list(values)

    store = None

    # As a cursor has it

    def execute(self, sql: str, args: Iterable[Any] = ()) -> None:
        self.statements += 1
        self._found = self.connection.execute(sql, tuple(args)).fetchall()
        self.rows += len(self._found)

    def fetchall(self) -> list[Any]:
        return self._found

    def fetchone(self) -> Any:
        return self._found[0] if self._found else None

    # What happens

    def stage(
        self,
        origin: str,
        event_id: str,
        *prev_event_ids: str,
        depth: Any = 0,
        received_ms: int | None = None,
        room_id: str = ROOM,
        **fields: Any,
    ) -> Key:
        """By default it was received a millisecond after the last."""
        self.now += received_ms is None
        content = {
            "room_id": room_id,
            "prev_events": list(prev_event_ids),
            "depth": depth,
            "origin_server_ts": self.now,
            "msc4354_sticky": {"duration_ms": 3_600_000},
            **fields,
        }
        self.connection.execute(
            "INSERT INTO federation_inbound_events_staging VALUES (?, ?, ?, ?, ?, '{}')",
            (
                *(origin, room_id, event_id),
                self.now if received_ms is None else received_ms,
                json.dumps(content),
            ),
        )
        return origin, event_id

    def chain(self, origin: str, count: int, *prev_event_ids: str) -> list[Key]:
        """Each on top of the last."""
        staged: list[Key] = []
        for number in range(count):
            prevs = (staged[-1][1],) if staged else prev_event_ids
            staged.append(self.stage(origin, f"${origin}{number}", *prevs, depth=number))
        return staged

    def persist(self, event_id: str, server: str) -> None:
        self.connection.execute(
            "INSERT INTO events (event_id, room_id, sender, received_ts, outlier)"
            " VALUES (?, ?, ?, ?, FALSE) ON CONFLICT DO NOTHING",
            (event_id, ROOM, f"@user:{server}", self.now),
        )

    def pdus(self, *keys: Key) -> list[Key]:
        """Those that are staged."""
        sql = "SELECT origin, event_id FROM federation_inbound_events_staging"
        staged = set(self.connection.execute(sql))
        return [key for key in keys if key in staged]

    def unstage(self, key: Key) -> None:
        self.connection.execute(
            "DELETE FROM federation_inbound_events_staging WHERE origin = ? AND event_id = ?", key
        )


class Process:
    """One process that has the lock of the room."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.held = Held()
        homeserver = cast(Homeserver, database)
        self.handler = TurnsHandler(homeserver, SynapseTurns(homeserver, self.held), self.held)
        self.held.is_heeded = True

    def choose(self) -> Key | None:
        return self.handler.choose_txn(cast(Cursor, self.database), ROOM)

    def process(self, *, fails: bool = False) -> Key | None:
        """One PDU."""
        key = self.choose()
        if key is not None:
            self.database.now += STEP_MS
            if not fails:
                self.database.persist(key[1], key[0])
            self.database.unstage(key)
        return key

    def until(self, key: Key | None) -> list[Key]:
        """What stands in front of this PDU, or of the end."""
        before = []
        while (found := self.process()) != key:
            assert found is not None, f"{key} is not staged"
            before.append(found)
        return before


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def process(database: Database) -> Process:
    return Process(database)


@pytest.mark.requirement("D7")
def test_one_origin_has_the_order_of_receipt_depth_and_id(
    database: Database, process: Process
) -> None:
    order = [
        ("$z", 5, database.now - 9),
        ("$y", 1, database.now),
        ("$b", 2, database.now),
        ("$c", 2, database.now),
        ("$a", 3, database.now),
    ]
    for event_id, depth, received_ms in reversed(order):
        database.stage("a", event_id, depth=depth, received_ms=received_ms)
    assert process.until(None) == [("a", event_id) for event_id, _, _ in order]


@pytest.mark.requirement("D7")
@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("flooders", [1, 3])
def test_another_origin_comes_after_one_of_each(
    database: Database, process: Process, flooders: int, chained: bool
) -> None:
    for origin in FLOODERS[:flooders]:
        if chained:
            database.chain(origin, 120)
        else:
            for number in range(120):
                database.stage(origin, f"${origin}{number}")
    for _ in range(7):
        process.process()
    bob = database.stage("b", "$bob", "$persisted")
    assert len(process.until(bob)) <= flooders
    rest = [origin for origin, _ in process.until(None)]
    assert rest[:60] == rest[:flooders] * (60 // flooders), "these take turns as well"


@pytest.mark.requirement("D7")
def test_newer_origins_do_not_keep_one_waiting(database: Database, process: Process) -> None:
    database.chain("a", 50)
    own = [database.stage("b", f"$b{number}") for number in range(3)]
    left = set(own)
    for number in range(20):
        database.stage(f"new{number}", f"$new{number}")
        database.stage(f"newer{number}", f"$newer{number}")
        if (found := process.process()) is not None:
            left.discard(found)
    # Its second one has those in front that waited when it had its first turn.
    assert len(left) <= 1


@pytest.mark.requirement("D7")
def test_what_fails_is_a_turn_all_the_same(database: Database, process: Process) -> None:
    database.chain("a", 40)
    database.chain("b", 40)
    taken = [process.process(fails=True) for _ in range(20)]
    assert [key and key[0] for key in taken] == ["a", "b"] * 10


@pytest.mark.requirement("D7")
def test_what_it_waits_for_comes_first(database: Database, process: Process) -> None:
    """Whatever order they were received in: Synapse would have to fetch it."""
    last = database.stage("a", "$3", "$2")
    second = database.stage("a", "$2", "$1")
    first = database.stage("a", "$1", "$persisted")
    assert process.until(None) == [first, second, last]


@pytest.mark.requirement("D7")
def test_few_that_it_waits_for_are_processed_in_its_turns(
    database: Database, process: Process
) -> None:
    flood = [database.stage("a", f"$a{number}") for number in range(300)]
    prevs = flood[200:210]
    bob = database.stage("b", "$bob", *(event_id for _, event_id in prevs))
    before = process.until(bob)
    assert set(prevs) <= set(before)
    assert len(before) <= 2 * len(prevs) + 1


@pytest.mark.requirement("D7")
@pytest.mark.parametrize("flooders", [1, 3])
def test_many_that_it_waits_for_are_fetched(
    database: Database, process: Process, flooders: int
) -> None:
    """As plain Synapse does it, which has pruned them."""
    floods = [database.chain(origin, 100) for origin in FLOODERS[:flooders]]
    bob = database.stage("b", "$bob", *(flood[-1][1] for flood in floods))
    before = process.until(bob)
    assert len(before) <= flooders
    assert len(before + process.until(None)) == 100 * flooders


@pytest.mark.requirement("D7")
def test_gaps_are_as_few_as_those_of_pruning(database: Database, process: Process) -> None:
    """The next one needs as many more PDUs; until then the ones before are taken first."""
    flood = database.chain("a", 150)
    first = database.stage("b", "$b1", flood[120][1])
    second = database.stage("c", "$c1", flood[121][1])
    later = database.stage("e", "$e1", flood[149][1])
    taken: list[Key] = []
    for _ in range(4):
        taken += [key] if (key := process.process()) else []
    # Each would be left when Synapse prunes.
    assert {first, second, later} <= set(taken)
    again = database.stage("b", "$b2", "$b1", database.chain("f", 60, flood[100][1])[-1][1])
    taken = process.until(again)
    assert {("f", f"$f{number}") for number in range(60)} <= set(taken)


@pytest.mark.requirement("D7")
def test_few_staged_leave_no_gap(database: Database, process: Process) -> None:
    flood = database.chain("a", PRUNE_FROM - 2)
    bob = database.stage("b", "$bob", flood[-1][1])
    assert process.until(bob) == flood


@pytest.mark.requirement("D7")
def test_what_was_fetched_and_is_still_staged_holds_nothing_up(
    database: Database, process: Process
) -> None:
    flood = database.chain("a", 99)
    database.persist(flood[-1][1], "a")
    bob = database.stage("b", "$bob", flood[-1][1])
    assert len(process.until(bob)) <= 2


@pytest.mark.requirement("D7")
@pytest.mark.parametrize("count", [1, 2, 150])
def test_events_that_name_each_other(database: Database, process: Process, count: int) -> None:
    """Event IDs of the first room versions are chosen freely."""
    for number in range(count):
        database.stage("a", f"${number}", f"${(number + 1) % count}")
    bob = database.stage("b", "$bob", "$0")
    assert len(process.until(bob)) <= count
    process.until(None)


@pytest.mark.requirement("D7")
def test_an_interleaved_flood_leaves_no_gap(database: Database, process: Process) -> None:
    previous = "$persisted"
    flood = []
    for number in range(120):
        flood.append(database.stage("ac"[number % 2], f"${number}", previous))
        previous = flood[-1][1]
    bob = database.stage("b", "$bob", "$persisted")
    before = process.until(bob)
    assert len(before) <= 2
    assert before + process.until(None) == flood


@pytest.mark.requirement("D7", "E4")
@pytest.mark.parametrize("processes", [1, 3])
def test_another_process_goes_on_with_the_same_turns(database: Database, processes: int) -> None:
    """``processes`` have the lock in turns; and then each is a new one, as after a restart."""
    for origin in FLOODERS:
        database.chain(origin, 60)
    several = [Process(database) for _ in range(processes)]
    taken = [several[number % processes].process() for number in range(30)]
    bob = database.stage("b", "$bob")
    while bob not in taken:
        taken.append(Process(database).process())
    assert len(taken) <= 30 + len(FLOODERS) + 1
    taken += [Process(database).process() for _ in range(30)]
    origins = [key[0] for key in taken if key and key != bob]
    assert max(origins.count(o) for o in FLOODERS) - min(origins.count(o) for o in FLOODERS) <= 1


@pytest.mark.requirement("D7")
def test_a_choice_stands_until_it_is_processed(database: Database, process: Process) -> None:
    """Synapse asks twice for one PDU; and it may ask without getting the lock."""
    database.chain("a", 5)
    bob = database.stage("b", "$bob")
    first = process.choose()
    database.stage("c", "$c")
    assert [process.choose(), process.choose(), process.process()] == [first] * 3
    assert len(process.until(bob)) <= 2


@pytest.mark.requirement("L3", "D7")
def test_what_becomes_visible_late_is_found(database: Database, process: Process) -> None:
    database.chain("a", 200)
    process.process()
    late = database.stage("b", "$late", received_ms=database.now - 150)
    assert len(process.until(late)) <= 1
    # Much later than that it is found by the comparison of all.
    later = database.stage("b", "$later", received_ms=database.now - 100_000)
    database.now += 10_000
    assert len(process.until(later)) <= 1


@pytest.mark.requirement("L3", "D7")
def test_what_another_process_has_processed_or_pruned(database: Database, process: Process) -> None:
    flood = database.chain("a", 300)
    bob = database.stage("b", "$bob")
    process.process()
    for key in (*flood[:250], bob):
        database.unstage(key)
    assert process.until(None) == flood[250:]


@pytest.mark.requirement("E4", "L3")
@pytest.mark.parametrize("others", [0, 1, 250])
def test_what_is_held_stays_staged_and_is_passed_over(
    database: Database, process: Process, others: int
) -> None:
    first = database.stage("a", "$first")
    flood = database.chain("a", others, "$first")
    assert process.choose() == first
    process.held.hold(first, ROOM)
    bob = database.stage("b", "$bob") if others > 1 else None
    if bob is not None:
        assert len(process.until(bob)) <= 1
    left = process.until(None)
    assert set(left) <= set(flood)
    assert not database.pdus(*flood)
    # Also what comes later, and when all are compared.
    for _ in range(2):
        late = database.stage("b", f"$late{database.now}")
        assert process.until(None) == [late]
        database.now += handler._LOOK_AGAIN_AFTER_MS
    assert database.pdus(first) == [first]
    # Another process need not know of it; and this one takes it when it can.
    assert Process(database).choose() == first
    process.held.release(first)
    assert process.until(None) == [first]


@pytest.mark.requirement("H3", "D7")
def test_many_that_are_held_are_read_once(database: Database, process: Process) -> None:
    flood = [database.stage("a", f"${number}") for number in range(1_000)]
    for key in flood:
        process.held.hold(key, ROOM)
    assert process.choose() is None
    database.now += handler._OVERLAP_MS
    database.rows = 0
    for number in range(20):
        late = database.stage("b", f"$late{number}")
        assert process.until(None) == [late]
    # All IDs, each time that nothing is left.
    assert database.rows <= 21 * (len(flood) + 10)


@pytest.mark.requirement("H3", "D7")
def test_a_choice_reads_what_is_new(database: Database, process: Process) -> None:
    for origin in FLOODERS:
        database.chain(origin, 500)
    process.process()  # this one reads all, once
    database.now += handler._OVERLAP_MS
    database.statements = database.rows = 0
    for _ in range(100):
        process.process()
    assert database.statements <= 100 * 8
    assert database.rows <= 100 * 8


@pytest.mark.requirement("D7", "H1")
def test_what_is_wrong_with_one_choice_is_not_with_the_next(
    database: Database, process: Process
) -> None:
    flood = database.chain("a", 150)
    bob = database.stage("b", "$bob")
    first = process.process()
    process.handler._rooms[ROOM].room._places.clear()
    with pytest.raises(KeyError):
        process.choose()
    before = process.until(bob)
    assert len(before) <= 1
    assert [first, *before, *process.until(None)] == flood


@pytest.mark.requirement("H3", "D7")
def test_many_rooms_are_read_once(database: Database, process: Process) -> None:
    for room in range(300):
        for number in range(10):
            database.stage("a", f"${room}-{number}", room_id=f"!{room}")

    def choose_in_all() -> int:
        database.rows = 0
        for room in range(300):
            process.handler.choose_txn(cast(Cursor, database), f"!{room}")
        return database.rows

    choose_in_all()
    database.now += handler._OVERLAP_MS
    assert choose_in_all() <= 300 * 3


@pytest.mark.requirement("H3")
def test_one_pdu_at_a_time_is_one_query(database: Database, process: Process) -> None:
    for number in range(5):
        database.stage("a", f"${number}")
        database.statements = 0
        assert process.process() == ("a", f"${number}")
        assert database.statements == 1


@pytest.mark.requirement("H3", "L3")
def test_memory_is_bounded(
    database: Database, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "_MOST_KNOWN", 250)
    flood = database.chain("a", 600)
    for number in range(300):
        for origin in ("a", "b"):
            database.stage(origin, f"${origin}-{number}", room_id=f"!{number}")
        process.handler.choose_txn(cast(Cursor, database), f"!{number}")
    assert sum(len(known.room) for known in process.handler._rooms.values()) <= 250 + 2
    assert process.until(None) == flood
    assert len(process.handler._rooms) <= handler._MOST_ROOMS


@pytest.mark.requirement("H3", "L3")
def test_memory_is_bounded_if_the_ids_are_long(
    database: Database, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first two room versions a PDU brings its ID along, of up to 60 kB."""
    monkeypatch.setattr(handler, "_MOST_KNOWN", 3 * 200)
    staged = [database.stage("a", f"${number:03d}" + 59_000 * "x") for number in range(150)]
    behind = database.stage("b", "$behind")
    assert process.handler.choose_txn(cast(Cursor, database), ROOM) == staged[0]
    (known,) = process.handler._rooms.values()
    # A page, as the first of it count for all there may be.
    assert len(known.room) == handler.PAGE
    assert known.room.weight == handler.PAGE * (1 + 59_004 // 256)
    assert sorted(process.until(None)) == sorted([*staged, behind]), "none is passed over"


@pytest.mark.requirement("H1", "H3")
def test_a_room_with_long_ids_costs_other_rooms_nothing(
    database: Database, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "_MOST_KNOWN", 500)
    for number in range(150):
        database.stage("a", f"${number:03d}" + 59_000 * "x", room_id="!long")
        for room_id in ("!one", "!two"):
            database.stage("a", f"{room_id}{number}", room_id=room_id)

    def choose(room_id: str) -> int:
        database.rows = 0
        process.handler.choose_txn(cast(Cursor, database), room_id)
        return database.rows

    for room_id in ("!one", "!two", "!long"):
        choose(room_id)
    database.now += handler._OVERLAP_MS
    for _ in range(3):
        assert choose("!long") <= handler.PAGE + 5
        assert choose("!one") <= 5
        assert choose("!two") <= 5


@pytest.mark.requirement("D7")
@pytest.mark.parametrize(
    "fields",
    [
        {"prev_events": None},
        {"prev_events": "$0"},
        {"prev_events": [5, None, [], [5], {}]},
        {"prev_events": [["$0", {"sha256": "x"}]]},
        {"prev_events": [f"${number}" for number in range(5_000)]},
        {"prev_events": ["$nul\0"]},
        {"prev_events": ["$" + "0" * 60_000]},
        {"depth": "text"},
        {"depth": -(2**70)},
        {"depth": 2**70},
        {"depth": None},
        {"msc4354_sticky": 5, "origin_server_ts": "then"},
    ],
)
def test_pdus_of_every_shape(database: Database, process: Process, fields: dict[str, Any]) -> None:
    database.stage("a", "$0")
    odd = database.stage("a", "$odd", **fields)
    bob = database.stage("b", "$bob", "$nul\0", "$odd")
    assert {odd, bob} < set(process.until(None))


@pytest.mark.requirement("H1")
@pytest.mark.parametrize("wrap", [lambda event_id: event_id, lambda event_id: [event_id, {}]])
def test_prev_events_that_no_event_is_are_not_remembered(
    database: Database, wrap: Callable[[str], Any]
) -> None:
    """Whoever sends PDUs chooses what they refer to, 60 kB each; all of these are in memory."""
    longest, longer = "$" + "0" * 254, "$" + "0" * 255
    database.stage("a", "$1", prev_events=[wrap(longest), *(wrap(longer) for _ in range(19))])
    area = SynapseTurns(cast(Homeserver, database), Held())
    (pdu,) = area.page_txn(cast(Cursor, database), ROOM, 0)
    assert pdu.prev_event_ids == (longest,)


class _Store:
    """What Synapse does without the module."""

    async def get_next_staged_event_id_for_room(self, room_id: str) -> Any:
        return "original", room_id

    async def get_next_staged_event_for_room(self, room_id: str, room_version: Any) -> Any:
        return "original", SimpleNamespace(event_id=room_version)


class _InPlace(Database):
    def __init__(self) -> None:
        super().__init__()
        self.replaced: dict[str, Any] = {}

    def replace(self, owner: object, name: str, make: Any) -> None:
        self.replaced[name] = make(getattr(_Store(), name))

    async def transact(self, what: str, function: Any, *args: Any) -> Any:
        return function(self, *args)


@pytest.mark.requirement("D7")
def test_a_transaction_that_is_tried_again_reads_all_anew() -> None:
    class Retried(_InPlace):
        async def transact(self, what: str, function: Any, *args: Any) -> Any:
            function(self, *args)
            self.connection.execute(
                "UPDATE federation_inbound_events_staging SET internal_metadata = 'anew'"
            )
            return function(self, *args)

    database = Retried()
    area = SynapseTurns(cast(Homeserver, database), Held())
    area.choose_by(lambda txn, room_id: area.first_txn(txn, room_id)[0])
    database.stage("a", "$1")
    store: Any = database.replaced["get_next_staged_event_id_for_room"]
    assert asyncio.run(store(ROOM)) == ("a", "$1")
    assert area._first.rows == {}, "no more memory than while it runs"
    get = database.replaced["get_next_staged_event_for_room"]
    # What was read the second time is no JSON, so Synapse chooses.
    assert asyncio.run(get(ROOM, RoomVersions.V11))[0] == "original"


@pytest.mark.requirement("D7", "H1")
def test_if_it_cannot_be_chosen_synapse_chooses(caplog: pytest.LogCaptureFixture) -> None:
    database = _InPlace()
    fails = True

    def choose_txn(txn: Cursor, room_id: str) -> Key | None:
        if fails:
            raise ValueError(room_id)
        return "a", "$1"

    held = Held()
    SynapseTurns(cast(Homeserver, database), held).choose_by(choose_txn)
    get_id = database.replaced["get_next_staged_event_id_for_room"]
    get = database.replaced["get_next_staged_event_for_room"]
    for _ in range(3):
        assert asyncio.run(get_id(ROOM)) == ("original", ROOM)
        origin, event = asyncio.run(get(ROOM, RoomVersions.V11))
        assert (origin, event.event_id) == ("original", RoomVersions.V11)
    # Nothing, rather than what is held: Synapse would take that again and again.
    held.is_heeded = True
    for name, get_one in ((ROOM, get_id), (RoomVersions.V11, partial(get, ROOM))):
        key: Any = ("original", name)
        held.hold(key, ROOM)
        assert asyncio.run(get_one(name)) is None
        held.release(key)
    # Each PDU asks: what went wrong is said once, until it goes well again.
    assert len(caplog.records) == 1
    fails = False
    required: dict[str, Any] = {"auth_events": [], "hashes": {}, "signatures": {}, "content": {}}
    database.stage("a", "$1", type="m.room.message", sender="@a:a", **required)
    assert asyncio.run(get_id(ROOM)) == ("a", "$1")
    origin, event = asyncio.run(get(ROOM, RoomVersions.V11))
    assert (origin, event.sender) == ("a", "@a:a")
    database.unstage(("a", "$1"))
    assert asyncio.run(get(ROOM, RoomVersions.V11)) is None
    assert asyncio.run(get_id(ROOM)) is None
    fails = True
    asyncio.run(get_id(ROOM))
    assert len(caplog.records) == 2


def test_the_clock_is_set_back(database: Database, process: Process) -> None:
    for origin in FLOODERS:
        database.chain(origin, 30)
    for _ in range(9):
        process.process()
    database.now -= 3_600_000
    origins = [key[0] for _ in range(30) if (key := process.process())]
    assert max(origins.count(o) for o in FLOODERS) - min(origins.count(o) for o in FLOODERS) <= 1


@attr.s(auto_attribs=True, frozen=True)
class _Never:
    """Nothing is known to be persisted."""

    def __call__(self, event_ids: Collection[str]) -> set[str]:
        assert len(event_ids) <= PRUNE_FROM + 1
        return set()


@pytest.mark.requirement("D7", "L3")
@pytest.mark.parametrize("seed", range(30))
def test_any_graph(seed: int) -> None:
    """Each is chosen once; one that waits for another is chosen before it only past 100 PDUs."""
    rng = random.Random(seed)
    room, event_ids, chosen = StagedRoom(), ["$start"], list[Key]()
    origins = [f"s{number}" for number in range(rng.randint(1, 6))]
    staged: dict[Key, WaitingPdu] = {}
    gaps, now_ms = 0, 0
    for number in range(rng.randint(50, 400)):
        prevs = rng.sample(event_ids[-rng.choice([1, 5, 300]) :], 1)
        pdu = WaitingPdu(rng.choice(origins), f"${number}", number // 3, number, tuple(prevs))
        event_ids.append(pdu.event_id)
        staged[pdu.key] = pdu
    order = list(staged.values())
    rng.shuffle(order)
    left = dict(staged)
    while order or left:
        for pdu in order[: rng.choice([0, 5, 200])]:
            room.add(pdu)
        order = [pdu for pdu in order if pdu.key not in room]
        now_ms += 1
        choice = room.choose(now_ms, _Never())
        if choice is None:
            continue
        known = {event_id for _, event_id in room.received(0, None)}
        gaps += any(prev in known for prev in choice.pdu.prev_event_ids)
        chosen.append(choice.pdu.key)
        room.remove(choice.pdu.key)
        room.waiting.had_turn(choice.turn_of, now_ms)
        del left[choice.pdu.key]
        order = [pdu for pdu in order if pdu.key != choice.pdu.key]
    assert sorted(chosen) == sorted(staged)
    assert len(room) == 0
    assert not any((room._dependents, room._places, room._in_ready, room._persisted, room._plain))
    assert gaps <= len(origins) * len(staged) // PRUNE_FROM
