"""Where this server enforces retention, nothing is sticky for longer than it is kept (S2)."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from synapse.app.homeserver import SynapseHomeServer
from synapse.config.homeserver import HomeServerConfig
from synapse.events.utils import FilteredEvent

from synapse_sticky._core import StickyIndex
from synapse_sticky.handlers.deferral.handler import NewStickyEvent
from synapse_sticky.handlers.deferral.synapse import SynapseWriter
from synapse_sticky.handlers.delivery.ttl.synapse import SynapseTelling
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.received import Received
from synapse_sticky.homeserver.retention import SEAMS, Retention, earlier_end_ms
from synapse_sticky.homeserver.seams import Table
from synapse_sticky.index import IndexFollower, StickyRow
from synapse_sticky.index.gone import GoneRows
from synapse_sticky.index.rereads import Rereads
from synapse_sticky.index.synapse import SynapseStickyStream
from tests.unit.configuration import configuration
from tests.unit.test_limits_in_synapse import (
    FIELD,
    HOUR_MS,
    ROOM,
    Reactor,
    done,
    insert,
    run_sql,
    run_synchronously,
    sticky_event,
)

pytestmark = pytest.mark.requirement("S2")

NO_POLICY = "no policy"


def make_homeserver(folder: Path, **retention: Any) -> Homeserver:
    config = HomeServerConfig()
    options = configuration(folder)
    config.parse_config_dict({**options, "retention": retention}, "", "")
    reactor: Any = Reactor()  # type: ignore[no-untyped-call]
    reactor.rightNow = 1_800_000_000
    hs = SynapseHomeServer("here", config=config, reactor=reactor)
    hs.setup()
    run_synchronously(hs)
    homeserver = Homeserver(hs.get_module_api())
    run_sql(homeserver, "INSERT INTO rooms (room_id, room_version) VALUES (?, '11')", ROOM)
    return homeserver


@pytest.fixture
def homeserver(tmp_path: Path) -> Iterator[Homeserver]:
    homeserver = make_homeserver(tmp_path, enabled=True)
    yield homeserver
    homeserver.close()


def set_policy(homeserver: Homeserver, max_lifetime: object, room_id: str = ROOM) -> None:
    """As if an event of the room said so, with Synapse's word that it has persisted it."""
    run_sql(homeserver, "DELETE FROM room_retention")
    run_sql(homeserver, "DELETE FROM current_state_events")
    if max_lifetime != NO_POLICY:
        run_sql(
            homeserver,
            "INSERT INTO room_retention (room_id, event_id, max_lifetime) VALUES (?, ?, ?)",
            *(room_id, "$policy", max_lifetime),
        )
        run_sql(
            homeserver,
            "INSERT INTO current_state_events (event_id, room_id, type, state_key)"
            " VALUES ('$policy', ?, 'm.room.retention', '')",
            room_id,
        )
    homeserver.store.get_retention_policy_for_room.invalidate((room_id,))
    homeserver.store._invalidate_caches_for_event(
        *(1, "$policy", room_id, "m.room.retention", "", None, None), backfilled=False
    )


def persist(homeserver: Homeserver, number: int, age_ms: int = 0) -> str:
    """A sticky event that was sent so long ago, and has just come. Gives its ID."""
    sent_ms = homeserver.now_ms() - age_ms
    event = sticky_event(homeserver, number, origin_server_ts=sent_ms)
    run_sql(
        homeserver,
        "INSERT INTO events (event_id, room_id, type, sender, stream_ordering, depth,"
        " topological_ordering, processed, outlier, origin_server_ts)"
        " VALUES (?, ?, 'org.example.call', ?, ?, 1, 1, TRUE, FALSE, ?)",
        *(event.event_id, event.room_id, event.sender, number, sent_ms),
    )
    run_sql(
        homeserver,
        "UPDATE event_json SET json = ? WHERE event_id = ?",
        *(json.dumps(event.get_dict()), event.event_id),
    )
    insert(homeserver, [event])
    return event.event_id


# When an event ends


@pytest.mark.parametrize(
    ("max_lifetime", "config", "lifetime_ms"),
    [
        (5_000, {}, 5_000),
        (0, {}, 0),
        (NO_POLICY, {}, HOUR_MS),
        (None, {}, HOUR_MS),
        (NO_POLICY, {"default_policy": {"max_lifetime": "7s"}}, 7_000),
        (None, {"default_policy": {"max_lifetime": "7s"}}, 7_000),
        (5_000, {"default_policy": {"max_lifetime": "7s"}}, 5_000),
        (9_000, {"default_policy": {"max_lifetime": "7s"}}, 9_000),
        (HOUR_MS, {"allowed_lifetime_max": "8s"}, 8_000),
        # As Synapse's filter for clients has it: by the purge alone it would be kept for longer.
        (5_000, {"allowed_lifetime_min": "6s"}, 5_000),
        (NO_POLICY, {"allowed_lifetime_max": "8s"}, HOUR_MS),
        (2**62, {}, HOUR_MS),
    ],
)
def test_the_effective_lifetime(
    tmp_path: Path, max_lifetime: object, config: dict[str, Any], lifetime_ms: int
) -> None:
    homeserver = make_homeserver(tmp_path, enabled=True, **config)
    stream = SynapseStickyStream(homeserver)
    set_policy(homeserver, max_lifetime)
    event_id = persist(homeserver, 1, age_ms=1_000)
    (row,) = done(stream.rows_of([event_id]))
    alone_ms = homeserver.now_ms() + HOUR_MS - 1_000
    ends_ms = done(stream._retention.ends_ms(ROOM, alone_ms, row_sent_ms(homeserver)))
    assert row.expires_at_ms == ends_ms == row_sent_ms(homeserver) + lifetime_ms
    homeserver.close()


def row_sent_ms(homeserver: Homeserver) -> int:
    ((sent_ms,),) = run_sql(homeserver, "SELECT origin_server_ts FROM events")
    return int(sent_ms)


def test_without_retention_a_policy_is_nothing(tmp_path: Path) -> None:
    homeserver = make_homeserver(tmp_path, enabled=False)
    stream = SynapseStickyStream(homeserver)
    told: list[str] = []
    stream.on_retention_changed(told.append)
    set_policy(homeserver, 5_000)
    event_id = persist(homeserver, 1)
    (row,) = done(stream.rows_of([event_id]))
    assert row.expires_at_ms == row_sent_ms(homeserver) + HOUR_MS
    assert told == []
    assert done(stream._retention.kept([event_id])) == {event_id}
    homeserver.close()


@pytest.mark.requirement("H5")
def test_tables_of_another_kind_end_nothing_earlier(
    homeserver: Homeserver, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing asks for a column that is not there, least of all where Synapse persists events."""
    columns = {seam.name: dict(seam.columns) for seam in SEAMS if isinstance(seam, Table)}
    homeserver.columns = columns
    assert Retention(homeserver).is_on
    columns["room_retention"]["longest"] = columns["room_retention"].pop("max_lifetime")
    retention = Retention(homeserver)
    assert (retention.is_on, retention.columns) == (False, "")
    assert "table room_retention has no column max_lifetime" in caplog.text


@pytest.mark.requirement("H3")
@pytest.mark.parametrize("sent_ms", [-(2**63), -1, 0, 1, 2**63 - 1])
@pytest.mark.parametrize("lifetime_ms", [-(2**63), -1, 0, 1, 2**63 - 1])
def test_whatever_number_a_stranger_chooses(sent_ms: int, lifetime_ms: int) -> None:
    ends_ms = earlier_end_ms(1_000, sent_ms, lifetime_ms)
    assert 0 <= ends_ms <= 1_000
    StickyIndex("here").insert([(1, "master", "!room", "$event", "@me:here", ends_ms)])


# The index


@pytest.fixture
def follower(homeserver: Homeserver) -> IndexFollower:
    follower = IndexFollower(homeserver, SynapseStickyStream(homeserver))
    follower.start()
    assert follower.in_step()
    return follower


def shown(follower: IndexFollower) -> list[str]:
    """What the index gives, to whomever."""
    now_ms = follower._hs.now_ms()
    rows = follower.index.events_in_rooms([ROOM], 0, {}, 1_000, {}, now_ms, None)
    return [event_id for _, _, event_id in rows]


def test_the_index_goes_by_it(homeserver: Homeserver, follower: IndexFollower) -> None:
    set_policy(homeserver, 10_000)
    old, new = persist(homeserver, 1, age_ms=10_000), persist(homeserver, 2, age_ms=9_000)
    assert follower.in_step()
    assert shown(follower) == [new]
    fresh = IndexFollower(homeserver, SynapseStickyStream(homeserver))
    fresh.start()
    assert shown(fresh) == [new], "also one that reads the table"
    assert done(follower.stream.rows_of([old]))[0].expires_at_ms <= homeserver.now_ms()


def test_a_policy_that_changes(homeserver: Homeserver, follower: IndexFollower) -> None:
    ids = [persist(homeserver, 1, age_ms=10_000), persist(homeserver, 2, age_ms=5_000)]
    assert shown(follower) == ids
    set_policy(homeserver, 7_000)
    assert shown(follower) == ids[1:]
    done(follower._expire())
    assert follower.index.get(ids[0]) is None
    # Longer again: what had ended is back.
    set_policy(homeserver, 60_000)
    done(follower._expire())
    assert shown(follower) == ids


@pytest.mark.requirement("H3")
def test_a_room_is_read_once_between_two_ticks() -> None:
    rereads, read = Rereads(), list[str]()

    class Reading:
        async def rows_in_room(self, room_id: str, *, after: int, limit: int) -> list[StickyRow]:
            read.append(room_id)
            return []

    stream: Any = Reading()

    def take_in() -> list[str]:
        read.clear()
        while rereads.due:
            done(rereads.read(stream, StickyIndex("here"), lambda rows: None))
        return sorted(read)

    assert take_in() == []
    for _ in range(5_000):
        rereads.add("!a")
    rereads.add("!b")
    assert take_in() == ["!a", "!b"]
    for _ in range(5_000):
        rereads.add("!a")
        assert not rereads.due
    rereads.tick()
    assert take_in() == ["!a"], "as it has changed since"
    rereads.tick()
    assert not rereads.due
    rereads.tick()
    rereads.add("!a")
    assert take_in() == ["!a"]


@pytest.mark.requirement("H3")
def test_new_rows_are_taken_in_between_rooms(homeserver: Homeserver) -> None:
    stream = SynapseStickyStream(homeserver)
    follower, read, shown_then = IndexFollower(homeserver, stream), list[str](), list[list[str]]()
    follower.start()

    async def rows_in_room(room_id: str, *, after: int, limit: int) -> list[StickyRow]:
        read.append(room_id)
        if len(read) == 1:
            follower._rereads.add("!another:there")
            shown_then.append([persist(homeserver, 1)])
        else:
            shown_then.append(shown(follower))
        return []

    stream.rows_in_room = rows_in_room  # type: ignore[method-assign]
    set_policy(homeserver, 60_000)
    assert sorted(read) == sorted([ROOM, "!another:there"])
    assert shown_then[0] == shown_then[1]


@pytest.mark.requirement("H1")
def test_a_room_that_cannot_be_read_stays_due() -> None:
    class Failing:
        async def rows_in_room(self, room_id: str, *, after: int, limit: int) -> list[StickyRow]:
            raise OSError("the database is away")

    rereads, stream = Rereads(), Failing()
    rereads.add("!a")
    with pytest.raises(OSError, match="away"):
        done(rereads.read(stream, StickyIndex("here"), lambda rows: None))  # type: ignore[arg-type]
    assert rereads.due


# Others


@pytest.mark.requirement("S4", "D9")
def test_clients_are_told_of_the_earlier_end(homeserver: Homeserver) -> None:

    async def nothing_known(event_ids: Collection[str], now_ms: int) -> dict[str, int]:
        return {}

    SynapseTelling(homeserver).shorten_by(nothing_known)
    serializer = homeserver.hs.get_event_client_serializer()
    set_policy(homeserver, 10_000)
    events = [sticky_event(homeserver, 1, origin_server_ts=homeserver.now_ms() - 4_000)]
    events.append(sticky_event(homeserver, 2, origin_server_ts=homeserver.now_ms() - 10_000))
    # It ends earlier anyway.
    short: dict[str, Any] = {FIELD: {"duration_ms": 3_000}}
    events.append(sticky_event(homeserver, 3, origin_server_ts=homeserver.now_ms(), **short))
    shown: list[Any] = [FilteredEvent(event=event, membership=None) for event in events]
    presence = {"type": "m.presence"}
    now_ms = homeserver.now_ms()
    together = done(serializer.serialize_events([presence, *shown], now_ms))
    assert together[0] == presence
    alone = [done(serializer.serialize_event(one, now_ms)) for one in shown]
    for found in (together[1:], alone):
        assert [one["unsigned"].get("msc4354_sticky_duration_ttl_ms") for one in found] == [
            *(6_000, None, 3_000)
        ]


@pytest.mark.requirement("P3", "D1")
def test_what_synapse_selects_itself_is_looked_at(homeserver: Homeserver) -> None:
    """While there is no index, the module has Synapse's own queries."""
    stream = SynapseStickyStream(homeserver)
    set_policy(homeserver, 10_000)
    ids = [persist(homeserver, 1, age_ms=10_000), persist(homeserver, 2, age_ms=9_000)]
    assert done(stream._retention.kept([*ids, "$gone"])) == {ids[1]}


@pytest.mark.requirement("L4")
def test_a_deferred_event_ends_by_it(homeserver: Homeserver, follower: IndexFollower) -> None:
    set_policy(homeserver, 10_000)
    asked: list[NewStickyEvent] = []

    def defer_txn(txn: Cursor, events: Any) -> list[str]:
        asked.extend(events)
        return [event.event_id for event in events]

    writer = SynapseWriter(homeserver, Received(homeserver))
    writer.defer_by(defer_txn)
    over, left = persist(homeserver, 1, age_ms=10_000), persist(homeserver, 2, age_ms=4_000)
    assert [event.event_id for event in asked] == [left]
    # What is not kept waits for nothing. The rows are Synapse's own, as ever, with their own ends.
    done(homeserver.transact("release", writer.enter_txn, asked))
    sent_ms = dict(run_sql(homeserver, "SELECT event_id, expires_at - 3600000 FROM sticky_events"))
    assert {e: homeserver.now_ms() - ms for e, ms in sent_ms.items()} == {over: 10_000, left: 4_000}
    assert follower.in_step()
    # A policy that is lengthened gives it back.
    for policy_ms, then in ((10_000, 1), (3_000, 0), (20_000, 2)):
        set_policy(homeserver, policy_ms)
        done(follower._expire())
        assert len(shown(follower)) == then


def test_rows_without_events_go_with_a_purge(homeserver: Homeserver) -> None:
    stream = SynapseStickyStream(homeserver)
    GoneRows(homeserver, stream).install()
    gone, stays = persist(homeserver, 1), persist(homeserver, 2)
    for table in ("events", "event_json"):
        run_sql(homeserver, f"DELETE FROM {table} WHERE event_id = ?", gone)
    homeserver.store._invalidate_caches_for_room_events("!another:there")
    assert len(run_sql(homeserver, "SELECT event_id FROM sticky_events")) == 2
    homeserver.store._invalidate_caches_for_room_events(ROOM)
    assert run_sql(homeserver, "SELECT event_id FROM sticky_events") == [(stays,)]
