"""All of a user's events that are redacted at once: by a ban or a kick, or by erasure (S5).

Two processes of one homeserver with their stores, caches and one database, which are real. What one
of them tells the other by replication is handed on as it is.
"""

import json
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import attr
import pytest
from synapse.api.room_versions import RoomVersions
from synapse.app.homeserver import SynapseHomeServer
from synapse.config.homeserver import HomeServerConfig
from synapse.events import EventBase, make_event_from_dict
from twisted.internet.defer import Deferred, ensureDeferred

import tests.unit.process
from synapse_sticky.handlers.joins.federation import LeftToSynapseError
from synapse_sticky.handlers.joins.synapse import SynapseFederation
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.clock import SetClock
from synapse_sticky.homeserver.rooms import Rooms
from synapse_sticky.homeserver.stream import NAME as STREAM
from synapse_sticky.homeserver.whole import still_whole
from synapse_sticky.index import IndexFollower, StickyRow
from synapse_sticky.index.redactions import synapse as redactions
from synapse_sticky.index.synapse import SynapseStickyStream
from tests.unit.configuration import configuration
from tests.unit.test_limits_in_synapse import (
    FIELD,
    HOUR_MS,
    Reactor,
    done,
    insert,
    run_sql,
    run_synchronously,
)
from tests.unit.test_panics import Stream, following, row

pytestmark = pytest.mark.requirement("S5")

ROOM, ALICE, BOB, MALLORY = "!room:here", "@alice:here", "@bob:there", "@mallory:here"
FLAG = "org.matrix.msc4293.redact_events"
TABLE = "room_ban_redactions"
ROW = f"SELECT redacting_event_id, redact_end_ordering FROM {TABLE} WHERE user_id = ?"


def make_homeserver(folder: Path) -> SynapseHomeServer:
    options = configuration(folder)
    options["experimental_features"]["msc4293_enabled"] = True
    config = HomeServerConfig()
    config.parse_config_dict(options, "", "")
    reactor: Any = Reactor()  # type: ignore[no-untyped-call]
    reactor.rightNow = 1_800_000_000
    hs = SynapseHomeServer("here", config=config, reactor=reactor)
    hs.setup()
    run_synchronously(hs)
    return hs


@attr.s(auto_attribs=True)
class Process:
    """A process with an index, and what it has told the others: a cache's name, and the entry."""

    hs: SynapseHomeServer
    homeserver: Homeserver = attr.ib(init=False)
    told: list[tuple[str, list[Any]]] = attr.Factory(list)
    failing: int = 0

    def __attrs_post_init__(self) -> None:
        api, reactor = self.hs.get_module_api(), cast("Any", self.hs.get_reactor())
        self.homeserver = Homeserver(api)
        self.homeserver._clock.close()
        # Time passes when a test says so.
        self.homeserver._clock = SetClock(
            api.get_current_time_msec,
            api.delayed_background_call,
            reactor.callFromThread,
            reactor.seconds,
        )
        send = self.store._send_invalidation_to_replication

        def note(txn: Cursor, cache_name: str, keys: Any) -> None:
            if self.failing:
                self.failing -= 1
                raise sqlite3.DatabaseError("for the test")
            send(txn, cache_name, keys)
            self.told.append((cache_name, list(keys)))

        self.homeserver.enter(self.store, "_send_invalidation_to_replication", note)

    @property
    def store(self) -> Any:
        return self.hs.get_datastores().main

    def start(self) -> IndexFollower:
        # Where it has persisted nothing itself, it hears of what others have.
        ids = self.store.get_sticky_events_stream_id_generator()
        ((last,),) = run_sql(self.homeserver, "SELECT MAX(stream_id) FROM sticky_events")
        if ids.get_current_token() < last:
            self.store.process_replication_position(STREAM, "master", last)
        self.follower = IndexFollower(self.homeserver, SynapseStickyStream(self.homeserver))
        self.follower.start()
        assert self.follower.in_step()
        return self.follower

    def hand_on_to(self, other: "Process") -> None:
        told, self.told = self.told, []
        for cache_name, keys in told:
            other.store._attempt_to_invalidate_cache(cache_name, keys)

    def shows(self, event: EventBase) -> bool:
        """Is it in the index, and is it whole in what Synapse loads?"""
        (loaded,) = done(self.store.get_events_as_list([event.event_id]))
        in_index = event.event_id in self.follower.index
        assert not self.follower.doubts([event.event_id])
        assert in_index is (loaded.sticky_duration() is not None)
        return in_index


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


class Room:
    """What the database has of a room."""

    def __init__(self, homeserver: Homeserver) -> None:
        self.homeserver = homeserver

    def make(self) -> None:
        sql = "INSERT INTO rooms (room_id, is_public, room_version) VALUES (?, FALSE, '11')"
        run_sql(self.homeserver, sql, ROOM)
        self.state("m.room.create", "", ALICE, {})
        levels = {ALICE: 100, BOB: 0}
        self.state("m.room.power_levels", "", ALICE, {"users": levels, "redact": 50})

    def event(self, sender: str, event_type: str, content: Any, **fields: Any) -> EventBase:
        ((number,),) = run_sql(
            self.homeserver, "SELECT 1 + COALESCE(MAX(stream_ordering), 0) FROM events"
        )
        event = make_event_from_dict(
            {
                "type": event_type,
                "room_id": ROOM,
                "sender": sender,
                "content": content,
                "origin_server_ts": self.homeserver.now_ms(),
                "depth": number,
                "auth_events": [],
                "prev_events": [],
                "hashes": {"sha256": "x"},
                "signatures": {},
                **fields,
            },
            RoomVersions.V11,
            {},
        )
        event.internal_metadata.stream_ordering = number
        event.internal_metadata.instance_name = "master"
        run_sql(
            self.homeserver,
            "INSERT INTO event_json (event_id, room_id, internal_metadata, json, format_version)"
            " VALUES (?, ?, '{}', ?, 3)",
            *(event.event_id, ROOM, json.dumps(event.get_dict())),
        )
        run_sql(
            self.homeserver,
            "INSERT INTO events (event_id, room_id, stream_ordering, topological_ordering, depth,"
            " type, processed, outlier, received_ts, sender, instance_name)"
            " VALUES (?, ?, ?, ?, ?, ?, TRUE, FALSE, ?, ?, 'master')",
            *(event.event_id, ROOM, number, number, number, event_type),
            *(self.homeserver.now_ms(), sender),
        )
        return event

    def sticky(self, sender: str) -> EventBase:
        event = self.event(sender, "m.room.message", {}, **{FIELD: {"duration_ms": HOUR_MS}})
        insert(self.homeserver, [event])
        return event

    def state(self, event_type: str, state_key: str, sender: str, content: Any) -> EventBase:
        event = self.event(sender, event_type, content, state_key=state_key)
        row = (event.event_id, ROOM, event_type, state_key)
        membership = content.get("membership")
        run_sql(
            self.homeserver,
            "INSERT OR REPLACE INTO current_state_events"
            " (event_id, room_id, type, state_key, membership) VALUES (?, ?, ?, ?, ?)",
            *(*row, membership),
        )
        run_sql(
            self.homeserver,
            "INSERT INTO current_state_delta_stream (event_id, room_id, type, state_key, stream_id,"
            " instance_name) VALUES (?, ?, ?, ?, ?, 'master')",
            *(*row, event.internal_metadata.stream_ordering),
        )
        if membership:
            run_sql(
                self.homeserver,
                "INSERT INTO room_memberships (event_id, room_id, user_id, sender, membership)"
                " VALUES (?, ?, ?, ?, ?)",
                *(event.event_id, ROOM, state_key, sender, membership),
            )
        return event

    def member(
        self, user_id: str, membership: str, sender: str, *, redacts: bool = False
    ) -> EventBase:
        content = {"membership": membership, **({FLAG: True} if redacts else {})}
        return self.state("m.room.member", user_id, sender, content)


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


def test_the_database_is_asked_whatever_is_cached(processes: tuple[Process, Process]) -> None:
    persister, other = processes
    room = Room(persister.homeserver)
    event = room.sticky(BOB)
    (loaded,) = done(other.store.get_events_as_list([event.event_id]))
    assert loaded.sticky_duration()
    done(write_row(persister, room.member(BOB, "ban", ALICE, redacts=True)))
    assert done(still_whole(other.homeserver, [event.event_id, "$unknown"])) == {}
    assert done(still_whole(other.homeserver, [])) == {}


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


@pytest.mark.requirement("H5")
def test_a_synapse_that_does_it_in_another_way(
    processes: tuple[Process, Process],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(redactions, "misfits", lambda seams: ["it is not there"])
    persister, _ = processes
    event = Room(persister.homeserver).sticky(BOB)
    persister.start()
    assert persister.shows(event)
    for without in redactions.WITHOUT.values():
        assert caplog.text.count(f"it is not there. So {without}.") == 1
