"""PDUs that could not be persisted yet: which are tried again, and how many are kept (L3, L6)."""

import asyncio
import sqlite3
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from synapse_sticky import storage as storage_module
from synapse_sticky.handlers.staging import StagingHandler
from synapse_sticky.homeserver import IncompletePdu
from synapse_sticky.storage import Storage, WaitingPdu

T = TypeVar("T")
ROOM = "!room:test"


class _Cursor(sqlite3.Cursor):
    execute_batch = sqlite3.Cursor.executemany


class _Staging:
    def __init__(self) -> None:
        self.staged: list[str] = []
        self.fails_for = ""
        self.there: set[str] = set()
        self.held_up = False

    def holds_up(self, room_id: str) -> bool:
        return self.held_up

    async def persisted(self, event_ids: set[str]) -> set[str]:
        if self.fails_for in event_ids:
            raise ValueError(self.fails_for)
        return self.there

    async def process(self, room_id: str) -> None: ...

    def stage_txn(self, txn: object, room_id: str, pdus: list[IncompletePdu]) -> None:
        assert room_id == ROOM
        self.staged += [pdu.event_id for pdu in pdus]


class _Homeserver:
    """A database of its own, and a clock that stands still until it is set."""

    federation = None

    def __init__(self) -> None:
        self.now = 0
        self.in_room = True
        self.rooms = self
        self.staging = _Staging()
        self._connection = sqlite3.connect(":memory:")

    def now_ms(self) -> int:
        return self.now

    async def is_in_room(self, room_id: str) -> bool:
        return self.in_room

    def call_later(self, *args: object) -> None: ...

    async def transact(self, what: str, function: Callable[..., T], *args: Any) -> T:
        with self._connection:
            return function(self._connection.cursor(_Cursor), *args)

    transact_alone = transact


@pytest.fixture
def homeserver() -> Any:
    return _Homeserver()


@pytest.fixture
def storage(homeserver: Any) -> Storage:
    made = Storage(homeserver)
    asyncio.run(made.migrate())
    return made


def keep(storage: Storage, origin: str, *event_ids: str, due_ms: int = 0) -> list[bool]:
    async def all_of_them() -> list[bool]:
        return [
            await storage.set_aside(
                IncompletePdu(origin, event_id, ROOM, "{}", "{}", ("$before",)), 3_600_000, due_ms
            )
            for event_id in event_ids
        ]

    return asyncio.run(all_of_them())


def kept(storage: Storage, origin: str) -> list[str]:
    return [pdu.event_id for pdu in asyncio.run(storage.incomplete(origin, ROOM))]


def waiting(event_id: str, *prev_event_ids: str) -> WaitingPdu:
    return WaitingPdu(event_id, prev_event_ids, 0, 1, 0)


@pytest.mark.requirement("L3", "F1")
def test_a_chain_is_complete_as_a_whole(homeserver: Any, storage: Storage) -> None:
    chain = [waiting("$b", "$a"), waiting("$c", "$b"), waiting("$e", "$d"), waiting("$f", "$e")]

    def complete(pdus: list[WaitingPdu], there: set[str]) -> list[WaitingPdu]:
        return StagingHandler(homeserver, storage)._complete("a.test", pdus, there)

    assert complete(chain, {"$a"}) == chain[:2]
    assert complete(chain, {"$a", "$d"}) == chain
    assert complete(chain, set()) == []
    assert complete([waiting("$x", "$a", "$z")], {"$a"}) == []


@pytest.mark.requirement("L3", "E4")
def test_what_is_staged_again_is_kept_until_it_is_over(homeserver: Any, storage: Storage) -> None:
    assert keep(storage, "a.test", "$1", "$2") == [True, True]
    assert asyncio.run(storage.due_incomplete()) == [("a.test", ROOM)]
    asyncio.run(
        storage.stage_again("a.test", ROOM, ["$2", "$1"], over=[], due={"$1": 50, "$2": 60})
    )
    assert homeserver.staging.staged == ["$2", "$1"]
    assert kept(storage, "a.test") == ["$1", "$2"]
    assert asyncio.run(storage.due_incomplete()) == []
    assert asyncio.run(storage.next_incomplete_ms()) == 50
    # It failed again, or was sent again: neither is a new one.
    assert keep(storage, "a.test", "$1", due_ms=7) == [True]
    assert asyncio.run(storage.next_incomplete_ms()) == 50
    asyncio.run(storage.stage_again("a.test", ROOM, [], over=["$1", "$2"], due={}))
    assert asyncio.run(storage.next_incomplete_ms()) is None


@pytest.mark.requirement("L3", "L6")
def test_what_fails_is_tried_one_by_one(homeserver: Any, storage: Storage) -> None:
    """All at once when their prev_events are there; and not again, as some may fail for ever."""
    handler = StagingHandler(homeserver, storage)
    homeserver.staging.there = {"$before"}
    keep(storage, "a.test", "$1", "$2", "$3")
    asyncio.run(handler._look())
    assert homeserver.staging.staged == ["$1", "$2", "$3"]
    tried = look_for(homeserver, storage, handler, 60)
    assert {len(at_once) for at_once in tried} == {0, 1}
    # As long as it is the oldest's turn, and the others' in theirs.
    assert {event_id for (event_id,) in filter(None, tried)} == {"$1", "$2", "$3"}


@pytest.mark.requirement("L3", "F1")
def test_others_have_their_turn(homeserver: Any, storage: Storage) -> None:
    """What the oldest lacks may be nowhere; Synapse takes it all the same on the newest's way."""
    handler = StagingHandler(homeserver, storage)
    keep(storage, "a.test", "$1", "$2", "$3")
    tried = [at_once for at_once in look_for(homeserver, storage, handler, 60) if at_once]
    assert all(len(at_once) == 1 for at_once in tried)
    order = [event_id for (event_id,) in tried]
    others = [event_id for event_id in order if event_id != "$1"]
    assert order[0] == "$1"
    assert others[0] == "$3"
    assert "$2" in others
    assert len(others) < 2 * order.count("$1")


def look_for(
    homeserver: Any, storage: Storage, handler: StagingHandler, times: int
) -> list[list[str]]:
    """Looks whenever something is due. Gives what was staged at each look."""
    found = []
    for _ in range(times):
        next_ms = asyncio.run(storage.next_incomplete_ms())
        assert next_ms is not None
        homeserver.now = next_ms
        homeserver.staging.staged.clear()
        asyncio.run(handler._look())
        found.append([*homeserver.staging.staged])
    return found


@pytest.mark.requirement("L3", "P7")
def test_nothing_is_staged_for_a_room_that_is_being_joined(
    homeserver: Any, storage: Storage
) -> None:
    handler = StagingHandler(homeserver, storage)
    homeserver.staging.there = {"$before"}
    homeserver.staging.held_up = True
    keep(storage, "a.test", "$1")
    asyncio.run(handler._look())
    assert homeserver.staging.staged == []
    homeserver.now, homeserver.staging.held_up = 1_000, False
    asyncio.run(handler._look())
    assert homeserver.staging.staged == ["$1"]


@pytest.mark.requirement("L3")
def test_nobody_has_more_than_their_share(
    homeserver: Any, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "_MAX_INCOMPLETE_OF_SERVER", 3)
    assert keep(storage, "evil.test", "$1", "$2", "$3", "$4") == [True, True, True, False]
    assert keep(storage, "evil.test", "$1") == [True]
    assert keep(storage, "good.test", "$1") == [True]
    assert kept(storage, "evil.test") == ["$1", "$2", "$3"]


@pytest.mark.requirement("L3", "L6")
def test_many_servers_cannot_shut_others_out(
    homeserver: Any, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "_MAX_INCOMPLETE", 6)
    for homeserver.now, event_id in enumerate(["$1", "$2", "$3"]):
        keep(storage, "evil.test", event_id)
        keep(storage, "worse.test", event_id)
    assert keep(storage, "good.test", "$good") == [True]
    assert kept(storage, "good.test") == ["$good"]
    # The last of the one with the most gave way; who has as many as any gets no more.
    assert kept(storage, "evil.test") == ["$1", "$2"]
    assert keep(storage, "worse.test", "$4") == [False]
    assert kept(storage, "worse.test") == ["$1", "$2", "$3"]


@pytest.mark.requirement("L3", "L6")
def test_those_of_one_server_do_not_hold_up_those_of_another(
    homeserver: Any, storage: Storage
) -> None:
    handler = StagingHandler(homeserver, storage)
    keep(storage, "evil.test", "$evil", due_ms=-1)
    keep(storage, "good.test", "$good")
    homeserver.staging.fails_for = "$evil"
    asyncio.run(handler._look())
    assert homeserver.staging.staged == ["$good"]
    # It is due again some time later, and forgotten when it is expired.
    assert [origin for origin, _ in asyncio.run(storage.due_incomplete())] == []
    homeserver.now = 20_000
    assert asyncio.run(storage.due_incomplete()) == [("good.test", ROOM), ("evil.test", ROOM)]
    homeserver.now = 3_600_000
    asyncio.run(handler._look())
    assert asyncio.run(storage.next_incomplete_ms()) is None


@pytest.mark.requirement("L3", "L6")
def test_what_comes_for_a_room_that_is_left_waits_until_it_is_joined(
    homeserver: Any, storage: Storage
) -> None:
    handler = StagingHandler(homeserver, storage)
    homeserver.in_room = False
    keep(storage, "a.test", "$1")
    asyncio.run(handler._look())
    assert homeserver.staging.staged == []
    homeserver.now, homeserver.in_room = 1_000, True
    asyncio.run(handler._look())
    assert homeserver.staging.staged == ["$1"]
    # Left once more, for good.
    homeserver.now, homeserver.in_room = 3_600_000, False
    asyncio.run(handler._look())
    assert asyncio.run(storage.next_incomplete_ms()) is None
