"""How long clients are told that an event is sticky: as this server's own row says (S2, S4)."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from typing import Any

import pytest
from synapse.api.room_versions import RoomVersions
from synapse.app.homeserver import SynapseHomeServer
from synapse.events import make_event_from_dict
from synapse.events.utils import FilteredEvent

from synapse_sticky.handlers.delivery.ttl.synapse import _TTL, SynapseTelling
from synapse_sticky.homeserver import Homeserver
from tests.unit.test_limits_in_synapse import FIELD, HOUR_MS, ROOM, done, make_homeserver

NOW_MS = 1_700_000_000_000


@pytest.fixture(scope="module")
def hs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SynapseHomeServer]:
    hs = make_homeserver(tmp_path_factory.mktemp("homeserver"))
    yield hs
    for connection in hs.get_datastores().main.db_pool._db_pool.connections.values():
        connection.close()


@pytest.fixture
def homeserver(hs: SynapseHomeServer) -> Iterator[Homeserver]:
    with closing(Homeserver(hs.get_module_api())) as homeserver:
        yield homeserver


def event_of(ahead_ms: int, **fields: Any) -> FilteredEvent:
    """Dated so much ahead of now."""
    content = {
        "type": "org.example.call",
        "room_id": ROOM,
        "sender": "@mallory:there",
        "content": {"ahead": ahead_ms},
        "origin_server_ts": NOW_MS + ahead_ms,
        "depth": 1,
        "auth_events": [],
        "prev_events": [],
        "hashes": {},
        "signatures": {},
        FIELD: {"duration_ms": HOUR_MS},
        **fields,
    }
    return FilteredEvent(event=make_event_from_dict(content, RoomVersions.V11), membership=None)


def told(homeserver: Homeserver, *events: FilteredEvent) -> list[int | None]:
    serializer = homeserver.hs.get_event_client_serializer()
    shown = done(serializer.serialize_events(events, NOW_MS))
    one_by_one = [done(serializer.serialize_event(event, NOW_MS)) for event in events]
    assert shown == one_by_one
    return [one.get("unsigned", {}).get(_TTL) for one in shown]


@pytest.mark.requirement("S2", "S4")
def test_no_more_is_told_than_is_left(homeserver: Homeserver) -> None:
    """Of one that is dated ahead Synapse tells that all of its hour is left, at any time."""
    ahead, ended, unknown, past = (event_of(ms) for ms in (3 * HOUR_MS, 5_000, 7_000, -60_000))
    plain = event_of(0, **{FIELD: None})
    events = [ahead, plain, ended, unknown, past]
    assert told(homeserver, *events) == [HOUR_MS, None, HOUR_MS, HOUR_MS, HOUR_MS - 60_000]
    asked: list[set[str]] = []

    async def left_ms(event_ids: Collection[str], now_ms: int) -> Mapping[str, int]:
        asked.append({*event_ids})
        left = ((ahead, 600_000), (ended, -1), (past, HOUR_MS))
        known = {event.event.event_id: ms for event, ms in left}
        return {event_id: ms for event_id, ms in known.items() if event_id in event_ids}

    SynapseTelling(homeserver).shorten_by(left_ms)
    assert told(homeserver, *events) == [600_000, None, None, HOUR_MS, HOUR_MS - 60_000]
    # Nothing is asked about what is not sticky.
    assert not any(plain.event.event_id in event_ids for event_ids in asked)
    assert len(asked) == 1 + 4


@pytest.mark.requirement("S4", "H1")
def test_an_event_is_shown_whatever_fails(homeserver: Homeserver) -> None:
    async def fails(event_ids: Collection[str], now_ms: int) -> Mapping[str, int]:
        raise ValueError(event_ids)

    SynapseTelling(homeserver).shorten_by(fails)
    assert told(homeserver, event_of(3 * HOUR_MS)) == [HOUR_MS]
