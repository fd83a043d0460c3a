"""The Rust core as Python sees it: the rules against Synapse's own, and the index's arguments.

rust/tests/index_model.rs tests the index's answers against a model.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
from immutabledict import immutabledict
from synapse.api.room_versions import RoomVersions
from synapse.events import make_event_from_dict

from synapse_sticky._core import MAX_STICKY_DURATION_MS, StickyIndex, sticky_until_ms

HOUR_MS = 3_600_000
MISSING = object()
UNTIL: Any = sticky_until_ms  # what mypy forbids must fail


def sticky_duration_ms(field: object) -> int | None:
    """How long an event with this field is sticky."""
    return sticky_until_ms(field, 0, 0)


def synapse_sticky_duration_ms(field: object) -> int | None:
    """What Synapse itself makes of an event with this field."""
    event: dict[str, Any] = {
        "type": "m.room.message",
        "sender": "@alice:example.org",
        "room_id": "!room:example.org",
        "content": {},
        "origin_server_ts": 1,
        "depth": 1,
        "prev_events": [],
        "auth_events": [],
        "hashes": {},
        "signatures": {},
    }
    if field is not MISSING:
        event["msc4354_sticky"] = field
    duration = make_event_from_dict(event, RoomVersions.V11).sticky_duration()
    return None if duration is None else duration.as_millis()


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (MISSING, None),
        (None, None),
        (1, None),
        (1.0, None),
        (True, None),
        ("1", None),
        ([], None),
        ([{"duration_ms": 5}], None),
        ({}, None),
        ({"duration": 5}, None),
        ({"msc4354_sticky": {"duration_ms": 5}}, None),
        ({"duration_ms": None}, None),
        ({"duration_ms": True}, None),
        ({"duration_ms": False}, None),
        ({"duration_ms": 1.0}, None),
        ({"duration_ms": 1e300}, None),
        ({"duration_ms": "5"}, None),
        ({"duration_ms": ""}, None),
        ({"duration_ms": [5]}, None),
        ({"duration_ms": {"duration_ms": 5}}, None),
        ({"duration_ms": -1}, None),
        ({"duration_ms": -(2**63)}, None),
        ({"duration_ms": -(2**63) - 1}, None),
        ({"duration_ms": -(2**100)}, None),
        ({"duration_ms": 0}, 0),
        ({"duration_ms": 1}, 1),
        ({"duration_ms": 5, "other": "key"}, 5),
        ({"duration_ms": HOUR_MS - 1}, HOUR_MS - 1),
        ({"duration_ms": HOUR_MS}, HOUR_MS),
        ({"duration_ms": HOUR_MS + 1}, HOUR_MS),
        ({"duration_ms": 2**31}, HOUR_MS),
        ({"duration_ms": 2**53 - 1}, HOUR_MS),
        ({"duration_ms": 2**53}, HOUR_MS),
        ({"duration_ms": 2**63 - 1}, HOUR_MS),
        ({"duration_ms": 2**63}, HOUR_MS),
        ({"duration_ms": 2**64 - 1}, HOUR_MS),
    ],
)
def test_sticky_duration_is_what_synapse_makes_of_it(field: object, expected: int | None) -> None:
    """S1"""
    assert sticky_duration_ms(None if field is MISSING else field) == expected
    assert synapse_sticky_duration_ms(field) == expected


@pytest.mark.parametrize("duration_ms", [2**64, 2**100])
def test_a_duration_beyond_64_bits_is_an_hour(duration_ms: int) -> None:
    """S1. Synapse takes it for none; only room versions that allow ints beyond 2^53 have it."""
    assert sticky_duration_ms({"duration_ms": duration_ms}) == HOUR_MS
    assert synapse_sticky_duration_ms({"duration_ms": duration_ms}) is None


@pytest.mark.parametrize("mapping", [dict, immutabledict, MappingProxyType])
def test_the_field_may_be_any_mapping(mapping: Callable[..., Mapping[str, object]]) -> None:
    assert sticky_duration_ms(mapping({"duration_ms": 5})) == 5
    assert sticky_duration_ms(mapping({})) is None


@pytest.mark.parametrize(
    ("duration_ms", "origin_server_ts", "received_ts_ms", "expected"),
    [
        (10, 100, 200, 110),
        (10, 200, 100, 110),
        (0, 100, 100, 100),
        (-5, 100, 100, None),
        (HOUR_MS + 1, 0, 0, HOUR_MS),
        (2**100, 0, 0, HOUR_MS),
        (10, 2**100, 100, 110),
        (10, -(2**100), 100, -(2**63) + 10),
        (10, 2**100, 2**63 - 1, 2**63 - 1),
    ],
)
def test_sticky_until(
    duration_ms: int, origin_server_ts: int, received_ts_ms: int, expected: int | None
) -> None:
    """S2"""
    field = {"duration_ms": duration_ms}
    assert sticky_until_ms(field, origin_server_ts, received_ts_ms) == expected


@pytest.mark.parametrize(
    "origin_server_ts", [None, True, False, 1.0, 1e300, float("nan"), "1", "", [1], {"ts": 1}]
)
def test_an_event_whose_time_is_not_an_int_is_not_sticky(origin_server_ts: object) -> None:
    """S1"""
    field = {"duration_ms": 10}
    assert sticky_until_ms(field, 1, 1) == 11
    assert sticky_until_ms(field, origin_server_ts, 1) is None


def test_the_maximum_is_an_hour() -> None:
    assert MAX_STICKY_DURATION_MS == HOUR_MS


ROWS = [
    (1, "w1", "!a", "$1", "@alice:own", 100),
    (2, "w2", "!b", "$2", "@bob:far:8448", 50),
    (3, "w1", "!a", "$3", "@carol:else", 100),
    (4, "w2", "!a", "$4", "@dave:own", 100),
]


@pytest.fixture
def index() -> StickyIndex:
    index = StickyIndex("own")
    index.insert(ROWS)
    return index


def test_the_index_answers(index: StickyIndex) -> None:
    assert len(index) == 4
    assert "$1" in index
    assert "$9" not in index
    assert index.get("$2") == (2, "!b", "$2", "@bob:far:8448", 50)
    assert index.get("$9") is None
    assert index.own_events("!a", 1, 0, 10) == [(1, "$1", "@alice:own"), (4, "$4", "@dave:own")]
    assert index.own_events("!a", 2, 0, 10) == [(4, "$4", "@dave:own")]
    assert index.own_events("!b", 1, 0, 10) == []
    assert index.server_count("!a", 0) == 2
    assert index.server_count("!b", 49) == 1
    assert index.server_count("!b", 50) == 0
    assert index.server_count("!unknown", 0) == 0
    assert index.expire(50, 10) == 1
    assert index.remove("$1") is True
    assert index.remove("$1") is False
    assert len(index) == 2


def test_rows_can_be_read_again(index: StickyIndex) -> None:
    index.insert(ROWS)
    assert len(index) == 4
    index.insert([(9, "w1", "!b", "$1", "@alice:own", 100), (0, "w1", "!b", "$3", "@x:y", 1)])
    assert index.get("$1") == (9, "!b", "$1", "@alice:own", 100)
    assert index.get("$3") == (3, "!a", "$3", "@carol:else", 100)


@pytest.mark.parametrize("collection", [list, tuple, set, frozenset, dict.fromkeys])
@pytest.mark.parametrize("others", [0, 1000])
def test_events_in_rooms_takes_any_collection(
    index: StickyIndex, collection: Any, others: int
) -> None:
    # With many rooms the stream is scanned, with few the rooms are.
    index.insert([(10 + n, "w1", "!far", f"$far{n}", "@a:b", 100) for n in range(50)])
    rooms = collection(["!a", "!b", *(f"!other{n}" for n in range(others))])
    found = index.events_in_rooms(rooms, 0, {}, 100, {}, 0, None)
    assert found == [(1, "!a", "$1"), (2, "!b", "$2"), (3, "!a", "$3"), (4, "!a", "$4")]
    assert index.events_in_rooms(rooms, 0, {}, 100, {}, 50, 2) == [(1, "!a", "$1"), (3, "!a", "$3")]
    assert index.events_in_rooms(rooms, 0, {}, 100, {}, 0, 0) == []


def test_positions_are_those_of_synapses_tokens(index: StickyIndex) -> None:
    def stream_ids(
        after: int, afters: Mapping[str, int], up_to: int, up_tos: Mapping[str, int]
    ) -> list[int]:
        found = index.events_in_rooms({"!a", "!b"}, after, afters, up_to, up_tos, 0, None)
        return [stream_id for stream_id, _, _ in found]

    assert stream_ids(1, {}, 3, {}) == [2, 3]
    assert stream_ids(0, immutabledict({"w1": 3}), 4, immutabledict()) == [2, 4]
    assert stream_ids(0, {}, 1, {"w2": 4}) == [1, 2, 4]
    assert stream_ids(4, {}, 1, {}) == []


def present_of(
    rows: Sequence[tuple[str, str, int | None, int]], **most: int
) -> tuple[list[int], int | None]:
    """Which of these rows are given first. A row is a room, a sender, a key and the end that is
    claimed. Each has 10 bytes."""
    index = StickyIndex("own")
    index.insert(
        (number, "w", room, f"${number}", sender, 100, key, newness_ms, 10)
        for number, (room, sender, key, newness_ms) in enumerate(rows, 1)
    )
    of = {"events": 1_000, "bytes": 4_000, "keys": 20, "oldest": 1, **most}
    rooms = {room for room, *_ in rows}
    by_room, whole_up_to = index.present_by_room(rooms, len(rows), {}, 0, *of.values())
    assert all(ids == sorted(ids, key=lambda e: int(e[1:])) for ids in by_room.values())
    return sorted(int(event_id[1:]) for ids in by_room.values() for event_id in ids), whole_up_to


ALICE, BOB, EVE = "@alice:own", "@bob:far", "@eve:far"


def test_first_is_all_there_is() -> None:
    rows = [("!a", ALICE, 1, 100)] * 5
    assert present_of(rows) == ([1, 2, 3, 4, 5], None)
    assert present_of(rows, events=5, bytes=50) == ([1, 2, 3, 4, 5], None)
    assert present_of([]) == ([], None)


def test_or_the_newest_of_each_key_and_the_oldest() -> None:
    rows: list[tuple[str, str, int | None, int]] = [
        *[("!a", ALICE, 1, 300), ("!a", ALICE, 1, 200), ("!a", ALICE, 2, 100)],
        *[("!a", BOB, 1, 200), ("!a", BOB, 1, 200), ("!b", ALICE, 1, 100), ("!a", BOB, 1, 190)],
    ]
    # The first one is the newest by its own times; of 4 and 5, which end together, it is 5.
    assert present_of(rows, events=6) == ([1, 3, 5, 6], 1)
    assert present_of(rows, events=6, oldest=2) == ([1, 2, 3, 5, 6], 3)
    assert present_of(rows, events=6, oldest=3) == ([1, 2, 3, 4, 5, 6], 6)
    # Without a key each is one of its own.
    alone: list[tuple[str, str, int | None, int]] = [("!a", ALICE, None, 100 + n) for n in range(9)]
    assert present_of(alone, events=6) == ([1, 5, 6, 7, 8, 9], 1)
    assert present_of(alone, events=6, keys=2) == ([1, 8, 9], 1)


def test_rooms_servers_and_senders_take_turns() -> None:
    flood: list[tuple[str, str, int | None, int]] = [("!a", EVE, n, 900 + n) for n in range(30)]
    rows = [("!a", ALICE, 1, 100), ("!b", BOB, 1, 100), ("!a", BOB, 1, 100), *flood]
    # The oldest; one of each room; the other server is through; the other sender; the flood.
    assert present_of(rows, events=3) == ([1, 2, 33], 2)
    assert present_of(rows, events=4) == ([1, 2, 3, 33], 3)
    assert present_of(rows, events=5) == ([1, 2, 3, 32, 33], 3)


def test_what_does_not_fit_by_its_size_is_left_out() -> None:
    rows: list[tuple[str, str, int | None, int]] = [("!a", ALICE, n, 100 + n) for n in range(9)]
    assert present_of(rows, bytes=45) == ([1, 7, 8, 9], 1)
    assert present_of(rows, bytes=5) == ([1], 1), "one in any case"


def test_in_step(index: StickyIndex) -> None:
    assert index.in_step({})
    assert index.in_step({"w1": 0})
    assert not index.in_step({"w1": 1})
    index.advance("w1", 5)
    index.advance("w1", 3)
    assert index.positions() == {"w1": 5}
    assert index.in_step(immutabledict({"w1": 5}))
    assert not index.in_step({"w1": 5, "w2": 1})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: StickyIndex(""), ValueError, "server_name"),
        (lambda i: type(i)(None), TypeError, "server_name"),
        (lambda i: i.insert(5), TypeError, "rows"),
        (lambda i: i.insert([ROWS[0], 5]), TypeError, r"rows\[1\] must be a tuple"),
        (lambda i: i.insert([(1, "w")]), ValueError, r"rows\[0\] must be a tuple"),
        (lambda i: i.insert([("1", *ROWS[0][1:])]), TypeError, r"rows\[0\].stream_id"),
        (lambda i: i.insert([(True, *ROWS[0][1:])]), TypeError, r"rows\[0\].stream_id"),
        (lambda i: i.insert([(2**63, *ROWS[0][1:])]), ValueError, r"rows\[0\].stream_id"),
        (lambda i: i.insert([(*ROWS[0][:5], 1.5)]), TypeError, r"rows\[0\].expires_at_ms"),
        (lambda i: i.insert([(*ROWS[0], "a", 1, 1)]), TypeError, r"rows\[0\].key"),
        (lambda i: i.insert([(*ROWS[0], 1, None, 1)]), TypeError, r"rows\[0\].newness_ms"),
        (lambda i: i.insert([(*ROWS[0], 1, 1, -1)]), ValueError, r"rows\[0\].size_bytes"),
        (lambda i: i.insert([(*ROWS[0], 1)]), ValueError, r"rows\[0\] must be a tuple"),
        (lambda i: i.present_by_room("!a", 9, {}, 0, 1, 1, 1, 1), TypeError, "room_ids"),
        (lambda i: i.present_by_room([], 9, {}, 0, 1, -1, 1, 1), ValueError, "max_bytes"),
        (lambda i: i.remove(b"$1"), TypeError, "event_id"),
        (lambda i: i.remove("\ud800"), ValueError, "event_id"),
        (lambda i: i.server_count(None, 0), TypeError, "room_id"),
        (lambda i: i.expire(0, -1), ValueError, "max_rows"),
        (lambda i: i.expire(0.5, 1), TypeError, "now_ms"),
        (lambda i: i.advance("w1", None), TypeError, "stream_id"),
        (lambda i: i.in_step([("w1", 1)]), TypeError, "positions"),
        (lambda i: i.in_step({"w1": "1"}), TypeError, "positions"),
        (lambda i: i.events_in_rooms("!a", 0, {}, 9, {}, 0, None), TypeError, "room_ids"),
        (lambda i: i.events_in_rooms(5, 0, {}, 9, {}, 0, None), TypeError, "room_ids"),
        (lambda i: i.events_in_rooms([[]], 0, {}, 9, {}, 0, None), TypeError, "room_ids"),
        (lambda i: i.events_in_rooms([], 0, {}, 9, {}, 0, -1), ValueError, "limit"),
        (lambda i: i.own_events("!a", 0, 0, None), TypeError, "limit"),
        (lambda i: i.get(1), TypeError, "event_id"),
        (lambda i: 1 in i, TypeError, "event_id"),
        (lambda i: UNTIL({}, 0, 1.0), TypeError, "received_ts_ms"),
        (lambda i: UNTIL({}, 0, False), TypeError, "received_ts_ms"),
        (lambda i: UNTIL({}, 0, 2**63), ValueError, "received_ts_ms"),
    ],
)
def test_a_bad_argument_is_named(
    index: StickyIndex, call: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        call(index)
    # Not in a note of the exception: Python 3.10 has none.
    assert re.search(message, str(raised.value))


def test_a_bad_row_leaves_the_index_as_it_was(index: StickyIndex) -> None:
    bad: Any = (10, "w1", None, "$10", "@a:b", 100)
    with pytest.raises(TypeError):
        index.insert([(9, "w1", "!a", "$9", "@a:b", 100), bad])
    assert len(index) == 4
