"""All of a user's events that are redacted at once: by a ban or a kick, or by erasure (S5).

Two processes of one homeserver, whose stores, caches and database are real.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attr
import pytest
from synapse.events import EventBase
from twisted.internet.defer import Deferred, ensureDeferred

import tests.unit.process
from synapse_sticky._core import StickyIndex
from synapse_sticky.handlers.joins.federation import LeftToSynapseError
from synapse_sticky.handlers.joins.synapse import SynapseFederation
from synapse_sticky.homeserver import access
from synapse_sticky.homeserver.rooms import Rooms
from synapse_sticky.homeserver.whole import still_whole
from synapse_sticky.index import StickyRow
from synapse_sticky.index.doubts import Doubts
from synapse_sticky.index.redactions import synapse as redactions
from tests.unit.processes import ALICE, BOB, MALLORY, ROOM, Process, Room, make_homeserver
from tests.unit.test_limits_in_synapse import done, run_sql
from tests.unit.test_panics import Stream, following, row

pytestmark = pytest.mark.requirement("S5")

TABLE = "room_ban_redactions"
ROW = f"SELECT redacting_event_id, redact_end_ordering FROM {TABLE} WHERE user_id = ?"


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[tuple[Process, Process]]:
    """The one that persists, and another one."""
    both = Process(make_homeserver(tmp_path)), Process(make_homeserver(tmp_path))
    Room(both[0].homeserver).make()
    yield both
    for process in both:
        process.homeserver.close()
        for connection in process.store.db_pool._db_pool.connections.values():
            connection.close()


async def write_row(process: Process, ban: EventBase) -> None:
    """As Synapse does after the ban's own transaction."""
    key = {"room_id": ROOM, "user_id": ban.state_key}
    values = {"redacting_event_id": ban.event_id, "redact_end_ordering": None}
    await process.store.db_pool.simple_upsert(TABLE, key, values, {**key, **values})
    process.store._invalidate_local_get_event_cache_room_id(ROOM)


async def end(process: Process, event: EventBase) -> None:
    """As Synapse does after each join, unban and kick."""
    await process.store.db_pool.simple_update(
        TABLE,
        {"room_id": ROOM, "user_id": event.state_key},
        {"redact_end_ordering": event.internal_metadata.stream_ordering},
        desc="test",
    )


@pytest.mark.requirement("E2")
@pytest.mark.parametrize("membership", ["ban", "leave"])
def test_the_other_processes_hear_of_it(
    processes: tuple[Process, Process], membership: str
) -> None:
    persister, other = processes
    room = Room(persister.homeserver)
    gone, kept = [room.sticky(BOB) for _ in range(3)], room.sticky(ALICE)
    for process in processes:
        process.start()
        assert all(process.shows(event) for event in (*gone, kept))
    ban = room.member(BOB, membership, ALICE, redacts=True)
    done(write_row(persister, ban))
    assert not any(persister.shows(event) for event in gone)
    # Nobody else knows anything yet: the row is there before it is told of.
    assert all(other.shows(event) for event in gone)
    (told,) = persister.told
    persister.hand_on_to(other)
    assert not any(other.shows(event) for event in gone), told
    assert all(process.shows(kept) for process in processes)


def test_it_is_told_again_if_that_fails(processes: tuple[Process, Process]) -> None:
    persister, other = processes
    room = Room(persister.homeserver)
    event = room.sticky(BOB)
    for process in processes:
        process.start()
    assert other.shows(event)
    persister.failing = 1
    done(write_row(persister, room.member(BOB, "ban", ALICE, redacts=True)))
    assert persister.told == []
    reactor: Any = persister.hs.get_reactor()
    reactor.advance(2)
    persister.hand_on_to(other)
    assert not other.shows(event)


def test_what_is_sent_after_an_unban_counts(processes: tuple[Process, Process]) -> None:
    """Also after a later change of the display name."""
    persister, other = processes
    room = Room(persister.homeserver)
    before = room.sticky(BOB)
    for process in processes:
        process.start()
    done(write_row(persister, room.member(BOB, "ban", ALICE, redacts=True)))
    done(end(persister, room.member(BOB, "leave", ALICE)))
    done(end(persister, join := room.member(BOB, "join", BOB)))
    ((_, ended),) = run_sql(persister.homeserver, ROW, BOB)
    assert ended < join.internal_metadata.stream_ordering
    after = room.sticky(BOB)
    done(end(persister, room.member(BOB, "join", BOB)))
    assert run_sql(persister.homeserver, ROW, BOB)[0][1] == ended
    persister.hand_on_to(other)
    for process in processes:
        whole = done(still_whole(process.homeserver, [before.event_id, after.event_id]))
        assert [*whole] == [after.event_id]
    assert persister.shows(after)
    # And it is banned once more.
    done(write_row(persister, room.member(BOB, "ban", ALICE, redacts=True)))
    assert not persister.shows(after)


@pytest.mark.requirement("E4")
@pytest.mark.parametrize("is_written", [False, True])
def test_a_crash_before_or_after_the_row(
    processes: tuple[Process, Process], *, is_written: bool
) -> None:
    """The process that persists starts again, all others have run on."""
    persister, other = processes
    room = Room(persister.homeserver)
    event, kept = room.sticky(BOB), room.sticky(MALLORY)
    other.start()
    assert other.shows(event)
    ban = room.member(BOB, "ban", ALICE, redacts=True)
    # Neither of these redacts: one may not, the other does not want to.
    room.member(MALLORY, "ban", BOB, redacts=True)
    room.member("@carol:there", "ban", ALICE)
    if is_written:
        run_sql(
            persister.homeserver,
            f"INSERT INTO {TABLE} (room_id, user_id, redacting_event_id) VALUES (?, ?, ?)",
            *(ROOM, BOB, ban.event_id),
        )
    persister.start()
    assert run_sql(persister.homeserver, ROW, BOB) == [(ban.event_id, None)]
    assert run_sql(persister.homeserver, f"SELECT user_id FROM {TABLE}") == [(BOB,)]
    persister.hand_on_to(other)
    for process in processes:
        assert not process.shows(event)
        assert process.shows(kept)


@pytest.mark.requirement("P6")
def test_erased(processes: tuple[Process, Process]) -> None:
    room = Room(processes[0].homeserver)
    events = [room.sticky(MALLORY), room.sticky(ALICE)]
    for process in processes:
        process.start()
    done(processes[1].store.mark_user_erased(MALLORY))
    processes[1].hand_on_to(processes[0])
    for process in processes:
        assert [e.event_id in process.follower.index for e in events] == [False, True]
        rows = done(process.follower.stream.rows(after=0, up_to=9, limit=9))
        assert [row.deliverable for row in rows] == [False, True]


@pytest.mark.requirement("H5")
def test_whoever_guards_events_needs_to_know_who_is_erased() -> None:
    """Else a guard would fail each sync, where its layer should be off."""
    guards_events = {"sync_response", "sliding_section", "sliding_response"}
    asks = {
        layer
        for layer, seams in access.SEAMS.items()
        if any(seam.name == "are_users_erased" for seam in seams)
    }
    assert asks == guards_events


def test_the_database_is_asked_whatever_is_cached(processes: tuple[Process, Process]) -> None:
    persister, other = processes
    room = Room(persister.homeserver)
    event = room.sticky(BOB)
    (loaded,) = done(other.store.get_events_as_list([event.event_id]))
    assert loaded.sticky_duration()
    done(write_row(persister, room.member(BOB, "ban", ALICE, redacts=True)))
    assert done(still_whole(other.homeserver, [event.event_id, "$unknown"])) == {}
    assert done(still_whole(other.homeserver, [])) == {}


class Without:
    """The same object, without one of its attributes."""

    def __init__(self, whole: Any, name: str) -> None:
        self._whole, self._name = whole, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._whole, name)


@pytest.mark.requirement("H5")
def test_without_synapses_way_past_its_cache_the_cache_counts(
    processes: tuple[Process, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, _ = processes
    event = Room(process.homeserver).sticky(BOB)
    monkeypatch.setattr(process.homeserver, "store", Without(process.store, "_get_events_from_db"))
    whole = done(still_whole(process.homeserver, [event.event_id, "$unknown"]))
    assert whole.keys() == {event.event_id}


@pytest.mark.requirement("P2")
def test_synapses_own_selection_is_pushed_without_them(
    processes: tuple[Process, Process],
) -> None:
    persister, sending = processes
    room = Room(persister.homeserver)
    gone, kept = room.sticky(MALLORY), room.sticky(ALICE)
    assert sending.start()
    assert sending.shows(gone)
    federation = SynapseFederation(sending.homeserver, Rooms(sending.homeserver))

    async def leave(destination: str, limit: int) -> None:
        raise LeftToSynapseError

    federation.serve_backlog_from(leave)
    sql = "INSERT INTO destination_rooms_sticky_events_backlog VALUES ('there', ?, 0)"
    run_sql(persister.homeserver, sql, ROOM)
    done(write_row(persister, room.member(MALLORY, "ban", ALICE, redacts=True)))
    select = sending.store.get_backlogged_sticky_events_for_destination
    _, _, event_ids = done(select("there", limit=50))
    assert event_ids == [kept.event_id]


class Reading(Stream):
    """A database that gives a page when it is told to, and by then has all of it redacted."""

    def __init__(self, *rows: StickyRow) -> None:
        super().__init__(*rows)
        self.pages: list[Deferred[None]] = []

    async def rows(self, *, after: int, up_to: int, limit: int) -> list[StickyRow]:
        found = await super().rows(after=after, up_to=up_to, limit=limit)
        self.pages.append(Deferred())
        await self.pages[-1]
        return found

    async def rows_at(self, stream_ids: Mapping[str, int]) -> list[StickyRow]:
        found = await super().rows_at(stream_ids)
        return [attr.evolve(row, deliverable=row.sender != ALICE) for row in found]

    async def rooms_of(self, user_id: str) -> list[str]:
        return ["!room", "!nowhere"]

    def on_user_redacted(self, callback: Callable[[str, str], None]) -> None:
        self.tell = callback


class Patient(tests.unit.process.Process):
    """A process whose jobs take their time."""

    def in_background(
        self, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> None:
        ensureDeferred(function(*args))  # type: ignore[arg-type]


@pytest.mark.parametrize("room_id", ["!room", ""])
def test_while_a_page_is_being_read(room_id: str) -> None:
    stream = Reading(row(1), attr.evolve(row(2), sender=BOB))
    follower = following(Patient(), stream)
    stream.tell(room_id, ALICE)
    stream.pages.pop().callback(None)
    assert follower.in_step()
    assert "$1" not in follower.index
    assert "$2" in follower.index


class Turns:
    """Counts how often others had their turn."""

    def __init__(self) -> None:
        self.given = 0

    async def give_way(self) -> None:
        self.given += 1


@pytest.mark.requirement("H3")
def test_many_bans_of_a_room_cost_one_look_in_steps() -> None:
    """A stranger bans whom he likes in his room, also who has sent nothing."""
    index, changed, turns = StickyIndex("here"), set[str](), Turns()
    index.insert([(n, "master", "!room", f"${n}", f"@{n}:there", 2**53) for n in range(1, 2_001)])
    stream: Any = Reading()
    doubts = Doubts(stream, turns.give_way)
    for number in range(501, 1_501):
        doubts.add("!room", f"@{number}:there")
    assert doubts.concern(index.get("$501"))
    assert not doubts.concern(index.get("$500"))
    done(doubts.look_for(index, changed))
    assert changed == {f"${number}" for number in range(501, 1_501)}
    assert turns.given == 2_000 / 500
    assert not doubts.pairs


@pytest.mark.requirement("H3")
def test_a_purged_room_is_looked_through_in_steps() -> None:
    index, changed, turns = StickyIndex("here"), set[str](), Turns()
    index.insert([(n, "master", "!room", f"${n}", ALICE, 2**53) for n in range(1, 1_001)])
    index.insert([(1_001, "master", "!other", "$1001", ALICE, 2**53)])
    stream: Any = Reading()
    doubts = Doubts(stream, turns.give_way)
    doubts.add("!room", "")
    assert [doubts.concern(index.get(event_id)) for event_id in ("$7", "$1001")] == [True, False]
    done(doubts.look_for(index, changed))
    assert changed == {f"${number}" for number in range(1, 1_001)}
    assert turns.given == 2


@pytest.mark.requirement("H5")
def test_a_synapse_that_does_it_in_another_way(
    processes: tuple[Process, Process],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(redactions, "misfits", lambda seams, columns: ["it is not there"])
    persister, _ = processes
    event = Room(persister.homeserver).sticky(BOB)
    persister.start()
    assert persister.shows(event)
    for without in redactions.WITHOUT.values():
        assert caplog.text.count(f"it is not there. So {without}.") == 1
