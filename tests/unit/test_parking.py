"""Parked PDUs: which are tried again, and how many there may be (L3, L6)."""

import asyncio
import json
import sqlite3
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import pytest
from synapse.api.errors import EventSizeError
from synapse.api.room_versions import RoomVersions
from synapse.event_auth import _check_size_limits
from synapse.events import make_event_from_dict, relation_from_event

from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.parking import places, synapse, tables
from synapse_sticky.handlers.staging.parking.handler import ParkingHandler
from synapse_sticky.handlers.staging.parking.pdus import Here, Outcome, ParkedPdu, ScheduledPdu
from synapse_sticky.handlers.staging.parking.possible import is_possible
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.handlers.staging.pdu import StagedPdu
from synapse_sticky.homeserver.causes import Verdict
from synapse_sticky.homeserver.layout import migrate
from tests.unit.settable import Settable

T = TypeVar("T")
ROOM = "!room:test"


class _Cursor(sqlite3.Cursor):
    execute_batch = sqlite3.Cursor.executemany


class _Staging:
    def __init__(self) -> None:
        self.staged: list[str] = []
        self.fails_for = ""
        self.there: set[str] = set()
        self.outliers: set[str] = set()
        self.joining = False
        self.unstaged: list[str] = []
        self.processed: list[str] = []

    def is_joining(self, room_id: str) -> bool:
        return self.joining

    async def persisted(self, event_ids: set[str]) -> set[str]:
        if self.fails_for in event_ids:
            raise ValueError(self.fails_for)
        return self.there

    async def existing(self, event_ids: set[str]) -> set[str]:
        return self.there | self.outliers

    async def process(self, room_id: str) -> None:
        self.processed.append(room_id)

    # Nobody is backed off, and nothing takes any time.

    def on_up(self, listener: Callable[[str], None]) -> None:
        pass

    async def is_backed_off(self, origin: str) -> bool:
        return False

    async def ask(self, origin: str) -> None:
        raise AssertionError(origin)

    async def still_staged(self, origin: str, event_ids: Collection[str]) -> set[str]:
        return set()

    async def unstage(self, origin: str, event_id: str) -> None:
        self.unstaged.append(event_id)

    def verdict_of(self, e: Exception) -> None: ...

    def known_txn(self, txn: object, room_ids: Collection[str]) -> set[str]:
        return {*room_ids}

    def stage_txn(self, txn: object, room_id: str, pdus: list[ParkedPdu]) -> None:
        assert room_id == ROOM
        self.staged += [pdu.event_id for pdu in pdus]


class _Homeserver(Settable):
    """A database of its own, and a clock that stands still until it is set."""

    is_postgres = False

    def __init__(self) -> None:
        self.now = 0
        self.in_room = True
        self.staging = _Staging()
        self.held = Held()
        self._connection = sqlite3.connect(":memory:")

    def now_ms(self) -> int:
        return self.now + self.set_by_ms

    def steady_ms(self) -> int:
        return self.now

    async def is_in_room(self, room_id: str) -> bool:
        return self.in_room

    def call_later(self, *args: Any) -> Any: ...

    def on_room_purged(self, callback: Any) -> None: ...
    def on_user_redacted(self, callback: Any) -> None: ...

    async def transact(self, what: str, function: Callable[..., T], *args: Any) -> T:
        with self._connection:
            return function(self._connection.cursor(_Cursor), *args)

    transact_alone = transact

    async def transact_briefly(self, what: str, function: Any) -> Any:
        return await self.transact(what, function)


@pytest.fixture
def homeserver() -> Any:
    return _Homeserver()


@pytest.fixture
def table(homeserver: Any) -> ParkedTable:
    made = ParkedTable(homeserver)
    asyncio.run(migrate(homeserver, made))
    return made


def handler_of(homeserver: Any, table: ParkedTable) -> ParkingHandler:
    staging = homeserver.staging
    return ParkingHandler(
        homeserver, homeserver, staging, staging, table, homeserver.held, homeserver
    )


def is_parked(answer: tuple[Outcome, object]) -> bool:
    return answer[0] in (Outcome.PARKED, Outcome.STILL_PARKED)


def park(table: ParkedTable, origin: str, *event_ids: str, due_ms: int = 0) -> list[bool]:
    async def all_of_them() -> list[bool]:
        return [
            is_parked(
                await table.park(
                    ParkedPdu(origin, event_id, ROOM, "{}", "{}", ("$before",)), 3_600_000, due_ms
                )
            )
            for event_id in event_ids
        ]

    return asyncio.run(all_of_them())


def park_outside(table: ParkedTable, origin: str, event_id: str, room_id: str = ROOM) -> bool:
    pdu = ParkedPdu(origin, event_id, room_id, "{}", "{}", ("$before",), is_outside=True)
    return is_parked(asyncio.run(table.park(pdu, 3_600_000, 0)))


def parked(table: ParkedTable, origin: str) -> list[str]:
    return [pdu.event_id for pdu in asyncio.run(table.of_room(origin, ROOM))]


def of_table(event_id: str, *prev_event_ids: str, auths: tuple[str, ...] = ()) -> ScheduledPdu:
    return ScheduledPdu(event_id, prev_event_ids, 0, 1, 0, auth_event_ids=auths)


@pytest.mark.requirement("L3", "F1")
def test_a_chain_is_complete_as_a_whole(homeserver: Any, table: ParkedTable) -> None:
    chain = [of_table("$b", "$a"), of_table("$c", "$b"), of_table("$e", "$d"), of_table("$f", "$e")]

    def complete(
        pdus: list[ScheduledPdu], there: set[str], existing: tuple[str, ...] = ()
    ) -> list[ScheduledPdu]:
        here = Here(there, {*existing})
        return handler_of(homeserver, table)._trying._complete("a.test", pdus, here)

    assert complete(chain, {"$a"}) == chain[:2]
    assert complete(chain, {"$a", "$d"}) == chain
    assert complete(chain, set()) == []
    assert complete([of_table("$x", "$a", "$z")], {"$a"}) == []
    # An outlier is enough to authorise it.
    member = of_table("$x", "$a", auths=("$member",))
    assert complete([member], {"$a"}) == []
    assert complete([member], {"$a"}, ("$member",)) == [member]


@pytest.mark.requirement("L3", "E4")
def test_what_is_staged_again_stays_parked_until_it_has_ended(
    homeserver: Any, table: ParkedTable
) -> None:
    stage_txn = homeserver.staging.stage_txn
    assert park(table, "a.test", "$1", "$2") == [True, True]
    assert asyncio.run(table.due()) == [("a.test", ROOM)]
    first, second = asyncio.run(table.of_room("a.test", ROOM))
    for _ in range(2):  # also by another process that has read the same
        asyncio.run(
            table.stage_again(
                *("a.test", ROOM, [second, first]),
                ended=[],
                due_ms={first: 50, second: 60},
                stage_txn=stage_txn,
            )
        )
    assert homeserver.staging.staged == ["$2", "$1"]
    assert parked(table, "a.test") == ["$1", "$2"]
    assert asyncio.run(table.due()) == []
    assert asyncio.run(table.ahead())[0] == 50
    # It failed again, or was sent again: neither is a new one.
    assert park(table, "a.test", "$1", due_ms=7) == [True]
    assert asyncio.run(table.ahead())[0] == 50
    assert asyncio.run(table.ahead())[1] == {"unknown": 2}
    ended = {"ended": [first, second], "due_ms": {}, "stage_txn": stage_txn}
    assert asyncio.run(table.stage_again("a.test", ROOM, [], **ended)) == {"$1", "$2"}
    assert asyncio.run(table.stage_again("a.test", ROOM, [], **ended)) == set(), "counted once"
    assert asyncio.run(table.ahead()) == (None, {})


@pytest.mark.requirement("L3", "L6")
def test_what_fails_is_tried_a_few_at_a_time(homeserver: Any, table: ParkedTable) -> None:
    """All at once when they lack nothing; and not again, as some may fail for ever."""
    handler = handler_of(homeserver, table)
    homeserver.staging.there = {"$before"}
    park(table, "a.test", "$1", "$2", "$3")
    asyncio.run(handler._trying.try_due())
    assert homeserver.staging.staged == ["$1", "$2", "$3"]
    tried = try_for(homeserver, handler, 60)
    assert max(len(at_once) for at_once in tried) == 2
    assert {event_id for at_once in tried for event_id in at_once} == {"$1", "$2", "$3"}


@pytest.mark.requirement("L3", "F1")
def test_others_have_their_turn(homeserver: Any, table: ParkedTable) -> None:
    """What the oldest lacks may be nowhere; Synapse takes it all the same on the newest's way."""
    handler = handler_of(homeserver, table)
    park(table, "a.test", "$1", "$2", "$3")
    tried = [at_once for at_once in try_for(homeserver, handler, 60) if at_once]
    assert tried[0] == ["$1", "$2"]
    assert set(tried[1]) >= {"$3"}
    order = [event_id for at_once in tried for event_id in at_once]
    assert min(order.count(event_id) for event_id in order) > len(order) // 4


def try_for(homeserver: Any, handler: ParkingHandler, seconds: int) -> list[list[str]]:
    """Tries every second. Gives what was staged each time."""
    found = []
    for _ in range(seconds):
        homeserver.now += 1_000
        homeserver.staging.staged.clear()
        asyncio.run(handler._trying.try_due())
        found.append([*homeserver.staging.staged])
    return found


@pytest.mark.requirement("L3", "P7")
def test_nothing_is_staged_for_a_room_that_is_being_joined(
    homeserver: Any, table: ParkedTable
) -> None:
    handler = handler_of(homeserver, table)
    homeserver.staging.there = {"$before"}
    homeserver.staging.joining = True
    park(table, "a.test", "$1")
    asyncio.run(handler._trying.try_due())
    assert homeserver.staging.staged == []
    homeserver.now, homeserver.staging.joining = 1_000, False
    asyncio.run(handler._trying.try_due())
    assert homeserver.staging.staged == ["$1"]


@pytest.mark.requirement("L3")
def test_no_server_has_more_than_its_share(
    homeserver: Any, table: ParkedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "MOST_OF_SERVER", 3)
    assert park(table, "evil.test", "$1", "$2", "$3", "$4") == [True, True, True, False]
    assert park(table, "evil.test", "$1") == [True]
    assert park(table, "good.test", "$1") == [True]
    assert parked(table, "evil.test") == ["$1", "$2", "$3"]


@pytest.mark.requirement("L3", "L6")
def test_many_servers_cannot_shut_others_out(
    homeserver: Any, table: ParkedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "MOST", 6)
    for homeserver.now, event_id in enumerate(["$1", "$2", "$3"]):
        park(table, "evil.test", event_id)
        park(table, "worse.test", event_id)
    assert park(table, "good.test", "$good") == [True]
    assert parked(table, "good.test") == ["$good"]
    # The last of the one with the most gave way; who has as many as any gets no more.
    assert parked(table, "evil.test") == ["$1", "$2"]
    assert park(table, "worse.test", "$4") == [False]
    assert parked(table, "worse.test") == ["$1", "$2", "$3"]


def test_places_are_counted_without_a_look_at_the_pdus(homeserver: Any, table: ParkedTable) -> None:
    assert park_outside(table, "bad.test", "$first")
    counts: list[str] = []

    def park_txn(txn: Any) -> None:
        class Explaining:
            fetchall, fetchone = txn.fetchall, txn.fetchone

            def execute(self, sql: str, args: Any = ()) -> None:
                plan = txn.execute(f"EXPLAIN QUERY PLAN {sql}", args).fetchall()
                counts.extend(detail for *_, detail in plan if "COUNT" in sql)
                txn.execute(sql, args)

        pdu = ParkedPdu("bad.test", "$second", ROOM, "{}", "{}", ("$before",), is_outside=True)
        assert places.make_place_txn(Explaining(), pdu)  # type: ignore[arg-type]

    asyncio.run(homeserver.transact("park", park_txn))
    looks = [detail for detail in counts if "synapse_sticky_incomplete" in detail]
    assert len(looks) == 4
    assert all("COVERING INDEX" in detail for detail in looks), looks


@pytest.mark.requirement("F3", "H3", "L6")
def test_little_is_kept_for_rooms_that_this_server_is_not_in(
    homeserver: Any, table: ParkedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever says that this server is about to join them. A room has its share of that."""
    monkeypatch.setattr(places, "MOST_OUTSIDE_OF_ROOM", 4)
    monkeypatch.setattr(places, "MOST_OUTSIDE", 6)
    for homeserver.now in range(3):
        for origin in ("evil.test", "worse.test"):
            assert park_outside(table, origin, f"${homeserver.now}") == (homeserver.now < 2)
    assert park_outside(table, "good.test", "$good"), "a place of who has the most"
    assert parked(table, "evil.test") == ["$0"]
    assert parked(table, "worse.test") == ["$0", "$1"]
    # The places of all these rooms together.
    assert [park_outside(table, "other.test", f"${n}", "!other") for n in range(3)] == [
        *(True, True, False)
    ]
    assert [park_outside(table, "new.test", f"${n}", "!new") for n in range(2)] == [True, False]
    assert len(asyncio.run(table.of_room("other.test", "!other"))) == 1
    # None of these take a place of the rooms that this server is in.
    assert park(table, "evil.test", *(f"$in{number}" for number in range(9))) == [True] * 9
    assert park_outside(table, "good.test", "$good"), "it is there"


@pytest.mark.requirement("L3", "L6")
def test_pdus_of_one_server_do_not_delay_those_of_another(
    homeserver: Any, table: ParkedTable
) -> None:
    handler = handler_of(homeserver, table)
    park(table, "evil.test", "$evil", due_ms=-1)
    park(table, "good.test", "$good")
    homeserver.staging.fails_for = "$evil"
    asyncio.run(handler._trying.try_due())
    assert homeserver.staging.staged == ["$good"]
    # It is due again some time later, and deleted once it has expired.
    assert [origin for origin, _ in asyncio.run(table.due())] == []
    homeserver.now = 20_000
    assert sorted(asyncio.run(table.due())) == [("evil.test", ROOM), ("good.test", ROOM)]
    homeserver.now = 3_600_000
    asyncio.run(handler._trying.try_due())
    assert asyncio.run(table.ahead())[0] is None


@pytest.mark.requirement("H1", "L3", "L6")
def test_pdus_that_cannot_be_put_off_do_not_delay_others(
    homeserver: Any, table: ParkedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many servers have such: they are not the first of each round."""
    handler, attempts = handler_of(homeserver, table), list[str]()
    monkeypatch.setattr(tables, "_ROOMS_AT_ONCE", 2)
    homeserver.staging.fails_for = "$evil"

    async def postpone(origin: str, room_id: str, by_ms: int) -> None:
        attempts.append(origin)
        raise ValueError(origin)

    monkeypatch.setattr(table, "postpone", postpone)
    evil = [f"evil{number}.test" for number in range(5)]
    for origin in evil:
        park(table, origin, "$evil", due_ms=-1)
    park(table, "good.test", "$good")
    for _ in range(3):
        asyncio.run(handler._trying.try_due())
    assert homeserver.staging.staged == ["$good"]
    assert sorted(attempts) == evil
    # Some time later they are tried again, also if the clock was set back.
    for homeserver.now in (10_000, 5_000):
        asyncio.run(handler._trying.try_due())
    assert len(attempts) == len(evil) + 4


@pytest.mark.requirement("H3", "L3")
@pytest.mark.parametrize("expired", [True, False])
def test_no_parked_pdu_is_compared_with_all_others(
    homeserver: Any, table: ParkedTable, monkeypatch: pytest.MonkeyPatch, expired: bool
) -> None:
    handler = handler_of(homeserver, table)
    event_ids = [f"${number}" for number in range(100)]
    park(table, "a.test", *event_ids)
    homeserver.staging.there = {"$before"}
    compared = 0
    equals = ScheduledPdu.__eq__

    def count(pdu: ScheduledPdu, other: object) -> bool:
        nonlocal compared
        compared += 1
        return bool(equals(pdu, other))

    monkeypatch.setattr(ScheduledPdu, "__eq__", count)
    homeserver.now = 3_600_000 if expired else 0
    asyncio.run(handler._trying.try_due())
    assert compared <= 2 * len(event_ids)
    assert len(homeserver.staging.staged) == (0 if expired else len(event_ids))
    assert len(parked(table, "a.test")) == (0 if expired else len(event_ids))


@pytest.mark.requirement("L3", "L6")
def test_what_comes_for_a_room_that_was_left_is_tried_once_it_is_joined(
    homeserver: Any, table: ParkedTable
) -> None:
    handler = handler_of(homeserver, table)
    homeserver.in_room = False
    park(table, "a.test", "$1")
    asyncio.run(handler._trying.try_due())
    assert homeserver.staging.staged == []
    homeserver.now, homeserver.in_room = 1_000, True
    asyncio.run(handler._trying.try_due())
    assert homeserver.staging.staged == ["$1"]
    # However long that was, it is not much longer until it is seen.
    homeserver.now, homeserver.in_room = 600_000, False
    asyncio.run(handler._trying.try_due())
    due_ms = asyncio.run(table.ahead())[0]
    assert due_ms is not None
    assert due_ms <= homeserver.now + 15_000
    # Left once more, for good.
    homeserver.now, homeserver.in_room = 3_600_000, False
    asyncio.run(handler._trying.try_due())
    assert asyncio.run(table.ahead())[0] is None


@pytest.mark.requirement("L3", "E4")
def test_what_comes_before_the_table_is_there_is_parked_then(
    homeserver: Any, table: ParkedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the table, and what is in memory until then is bounded."""
    handler = handler_of(homeserver, table)
    homeserver.staging.receives = False
    homeserver.staging.begin_on_staged_pdus = lambda: None
    monkeypatch.setattr("synapse_sticky.handlers.staging.parking.writing._MOST_IN_MEMORY", 2)

    async def park_three() -> None:
        for event_id in ("$1", "$2", "$3"):
            staged = StagedPdu(event_id, {"duration_ms": 60_000}, 0, 0)
            pdu = ParkedPdu("a.test", event_id, ROOM, "{}", "{}", ("$before",))
            await handler.fail(pdu, staged, "a reason", Verdict.PASSES)

    asyncio.run(park_three())
    assert parked(table, "a.test") == []
    asyncio.run(handler.load())
    assert parked(table, "a.test") == ["$1", "$2"]
    # Loaded once more, as after a failure: nothing is there twice.
    asyncio.run(handler.load())
    assert parked(table, "a.test") == ["$1", "$2"]


@pytest.mark.requirement("L3")
@pytest.mark.parametrize(
    "relation",
    [
        {"rel_type": "a\0"},
        {"event_id": "a\0"},
        {"rel_type": 1, "event_id": "a\0"},
        {"rel_type": "m.thread", "event_id": "$e", "key": "a\0"},
        {"rel_type": "m.thread", "event_id": "$e"},
        {"rel_type": "m.thread", "event_id": "a\0"},
        {"rel_type": "a\0", "event_id": "$e"},
        {"rel_type": "m.annotation", "event_id": "$e", "key": "a\0"},
        {"rel_type": "m.annotation", "event_id": "a\0", "key": "a"},
        {"rel_type": "m.annotation", "event_id": "a\0", "key": 1},
        {"m.in_reply_to": {"event_id": "a\0"}},
        "a\0",
    ],
)
def test_only_what_synapse_stores_of_a_relation_can_be_impossible(relation: object) -> None:
    content: dict[str, Any] = {
        "type": "m.test",
        "room_id": ROOM,
        "sender": "@user:test",
        "origin_server_ts": 1,
        "content": {"m.relates_to": relation},
        "depth": 1,
        "hashes": {},
        "signatures": {},
        "prev_events": ["$before"],
        "auth_events": ["$create"],
    }
    pdu = make_event_from_dict(content, RoomVersions.V10)
    stored = relation_from_event(pdu)
    texts = [stored.parent_id, stored.rel_type, stored.aggregation_key] if stored else []
    assert is_possible(pdu) == all("\0" not in text for text in texts if text)


@pytest.mark.requirement("H1")
@pytest.mark.parametrize("length", [255, 256])
@pytest.mark.parametrize("field", ["event_id", "room_id", "sender", "type", "state_key"])
def test_a_name_that_synapse_takes_in_no_event_is_impossible(field: str, length: int) -> None:
    """In the first room versions a server chooses the IDs of its events as well."""
    content: dict[str, Any] = {
        "event_id": "$event:test",
        "type": "m.test",
        "room_id": ROOM,
        "sender": "@user:test",
        "state_key": "",
        "origin_server_ts": 1,
        "content": {},
        "depth": 1,
        "hashes": {},
        "signatures": {},
        "prev_events": [],
        "auth_events": [],
    }
    ends = {"event_id": ("$", ":test"), "room_id": ("!", ":test"), "sender": ("@", ":test")}
    begin, end = ends.get(field, ("", ""))
    content[field] = begin.ljust(length - len(end), "é") + end
    pdu = make_event_from_dict(content, RoomVersions.V1)
    refused = False
    try:
        _check_size_limits(pdu)
    except EventSizeError as e:
        refused = e.unpersistable
    assert refused == (length > 255)
    assert is_possible(pdu) is not refused


@pytest.mark.requirement("H1", "L3")
def test_ids_that_no_event_has_are_stored_and_read_once() -> None:
    """A server chooses what its PDUs refer to, 60 kB each; all of a room is read at each try."""
    longest, longer = "$" + "0" * 254, "$" + "0" * 255
    content: dict[str, Any] = {
        "type": "m.test",
        "room_id": ROOM,
        "sender": "@user:test",
        "origin_server_ts": 1,
        "content": {},
        "depth": 1,
        "hashes": {},
        "signatures": {},
        "prev_events": [longest, *(f"{longer}{n}" for n in range(19))],
        "auth_events": [longer],
    }
    pdu = synapse._parked_pdu_of("a.test", make_event_from_dict(content, RoomVersions.V10))
    assert (pdu.prev_event_ids, pdu.auth_event_ids) == ((longest, ""), ("",))
    # It never seems to lack nothing, and what Synapse gets is as it was received.
    scheduled = ScheduledPdu(pdu.event_id, pdu.prev_event_ids, 0, 0, 0)
    assert not Here({longest}, set()).has_all_before(scheduled)
    assert json.loads(pdu.event_json)["prev_events"] == content["prev_events"]
