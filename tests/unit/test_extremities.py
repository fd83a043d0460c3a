"""Dummy events are sent by who may; where nobody can, work is bounded by what changed (F2, H2)."""

import sqlite3
from collections.abc import Callable, Collection
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synapse.api.errors import AuthError
from synapse.api.room_versions import RoomVersion, RoomVersions
from synapse.event_auth import check_state_dependent_auth_rules
from synapse.events import EventBase, make_event_from_dict

from synapse_sticky.config import ExtremitiesConfig
from synapse_sticky.handlers.extremities import senders
from synapse_sticky.handlers.extremities.handler import ExtremitiesHandler
from synapse_sticky.handlers.extremities.senders import Able
from synapse_sticky.handlers.extremities.synapse import able_among
from tests.unit.process import Timer
from tests.unit.settable import Settable
from tests.unit.test_limits import done

ROOM = "!room:here"
GOOD = "!good:here"
HOUR_MS = 3_600_000
ROUND_MS = 5_000
NOW_MS = 1_800_000_000_000
AWAY = sqlite3.OperationalError("database is locked")
BAD = sqlite3.OperationalError("for the test")


class Here(Settable):
    """A homeserver's clock and rooms, and all that was done to these.

    counts: the forward extremities of rooms, 100 if nothing is said.
    may: who has the power; a room that is not named has ``@alice:here``.
    refused: those whose events are refused, whatever their power; not in the room ``GOOD``.
    bad: the rooms in which sending fails for a cause that passes.
    """

    threshold = 10

    def __init__(self) -> None:
        self.at_ms = NOW_MS
        self.timers: list[Timer] = []
        self.counts: dict[str, int] = {}
        self.may: dict[str, Able] = {}
        self.refused: set[str] = set()
        self.error: Exception | None = None
        self.bad: set[str] = set()
        self.left_out: dict[str, int] = {}
        self.looks: list[str] = []
        self.sent: list[tuple[str, str]] = []
        self.attempts: list[tuple[str, str]] = []
        self.during: Callable[[], None] = lambda: None
        config = ExtremitiesConfig(per_minute=60)
        there: Any = self
        self.handler = ExtremitiesHandler(there, there, there, config)
        self.handler.install()

    # The homeserver

    def now_ms(self) -> int:
        return self.at_ms + self.set_by_ms

    def steady_ms(self) -> int:
        return self.at_ms

    def call_later(self, delay_ms: int, what: str, function: Any) -> Timer:
        there: Any = self
        self.timers.append(timer := Timer(there, self.at_ms + delay_ms, what, function))
        return timer

    def in_background(self, what: str, function: Any) -> None:
        done(function())

    def on_new_events(self, listener: Callable[[Collection[str]], None]) -> None:
        self.sticky = listener

    # The extremities

    def on_state_changed(self, callback: Callable[[str], None]) -> None:
        self.change = callback

    async def count(self, room_id: str) -> int:
        return self.counts.setdefault(room_id, 100)

    async def able(self, room_id: str) -> Able:
        self.looks.append(room_id)
        found = self.may.get(room_id, Able(["@alice:here"], 1))
        self.during()
        return found

    async def send(self, room_id: str, user_id: str) -> str | None:
        self.attempts.append((room_id, user_id))
        if self.error is not None:
            raise self.error
        if room_id in self.bad:
            raise BAD
        if room_id != GOOD and user_id in self.refused:
            return "no"
        self.sent.append((room_id, user_id))
        self.counts[room_id] -= 9
        return None

    def left_out_since_ms(self, room_id: str) -> int | None:
        return self.left_out.get(room_id)

    def leave_out(self, room_id: str) -> None:
        self.left_out[room_id] = self.at_ms

    def leave_in(self, room_id: str) -> None:
        self.left_out.pop(room_id, None)

    # What time does

    def round(self) -> None:
        """Five seconds go by."""
        self.at_ms += ROUND_MS
        for timer in [timer for timer in self.timers if timer.due_ms <= self.at_ms]:
            timer.cancel()
            done(timer.function())

    def rounds_with_sticky_events(self, until_ms: int, *rooms: str) -> None:
        while self.at_ms + ROUND_MS < until_ms:
            self.sticky(rooms)
            self.round()


@pytest.fixture
def here() -> Here:
    return Here()


def all_members(count: int = 300) -> list[str]:
    return [f"@user{number}:here" for number in range(count)]


@pytest.mark.requirement("H2")
def test_who_has_no_power_is_not_tried(here: Here) -> None:
    here.may[ROOM] = Able([], 1)
    here.rounds_with_sticky_events(NOW_MS + HOUR_MS, ROOM)
    assert (here.attempts, here.looks) == ([], [ROOM])
    assert here.left_out == {ROOM: NOW_MS + ROUND_MS}


@pytest.mark.requirement("H2")
@pytest.mark.parametrize("count", [1, 300])
def test_one_attempt_an_hour_where_all_are_refused(here: Here, count: int) -> None:
    """Whatever the cause, and however many members there are; another one each time."""
    members = all_members(count)
    here.may[ROOM] = Able(members, 1)
    here.refused = {*members}
    for hour in range(1, 4):
        here.rounds_with_sticky_events(NOW_MS + ROUND_MS + hour * HOUR_MS, ROOM)
        assert here.attempts == [(ROOM, members[n % count]) for n in range(hour)]
    # Of several one might be allowed: that is for Synapse to find out.
    assert (ROOM in here.left_out) is (count == 1)


@pytest.mark.requirement("F2")
def test_another_member_may_be_allowed(here: Here) -> None:
    members = all_members(2)
    here.may[ROOM] = Able(members, 1)
    here.refused = {members[0]}
    here.rounds_with_sticky_events(NOW_MS + HOUR_MS + 4 * ROUND_MS, ROOM)
    assert here.attempts[0] == (ROOM, members[0])
    assert {*here.attempts[1:]} == {(ROOM, members[1])}
    assert here.counts[ROOM] <= here.threshold


@pytest.mark.requirement("H2")
@pytest.mark.parametrize("users", [[], ["@alice:here"]], ids=["no power", "refused"])
def test_again_at_once_when_what_it_depends_on_changes(here: Here, users: list[str]) -> None:
    """No sticky event has to come for that."""
    here.may[ROOM] = Able(users, 1)
    here.refused = {*users}
    here.sticky([ROOM])
    here.round()
    looks, attempts = len(here.looks), len(here.attempts)
    # Any state may have changed: one look a round, and no attempt.
    for _ in range(1_000):
        here.change(ROOM)
        here.change("!another:here")
    here.round()
    here.round()
    assert (len(here.looks), len(here.attempts)) == (looks + 1, attempts)
    assert not here.timers
    # Power levels that help nobody.
    here.may[ROOM] = Able(users, 2)
    here.change(ROOM)
    here.round()
    assert len(here.attempts) == attempts + len(users)
    assert ROOM in here.left_out
    # A local member who may.
    here.may[ROOM] = Able(["@bob:here"], 3)
    here.change(ROOM)
    here.round()
    here.round()
    assert here.counts[ROOM] <= here.threshold
    assert {user for _, user in here.sent} == {"@bob:here"}
    assert ROOM not in here.left_out


@pytest.mark.requirement("H2")
def test_a_change_while_it_is_tried_is_not_missed(here: Here) -> None:
    here.may[ROOM] = Able([], 1)

    def change() -> None:
        here.during = lambda: None
        here.may[ROOM] = Able(["@bob:here"], 2)
        here.change(ROOM)

    here.during = change
    here.sticky([ROOM])
    here.round()
    assert not here.sent
    here.round()
    assert here.sent


@pytest.mark.requirement("H2")
def test_a_change_in_a_room_that_needs_nothing_is_remembered(here: Here) -> None:
    here.may[ROOM] = Able([], 1)
    here.sticky([ROOM])
    here.round()
    here.counts[ROOM] = 1
    here.may[ROOM] = Able(["@bob:here"], 2)
    here.change(ROOM)
    here.round()
    assert here.looks == [ROOM]
    here.counts[ROOM] = 100
    here.sticky([ROOM])
    here.round()
    assert here.sent


@pytest.mark.requirement("H2")
def test_what_synapse_leaves_out_is_left_out(here: Here) -> None:
    tried_ms = NOW_MS - HOUR_MS // 2
    here.left_out[ROOM] = tried_ms
    here.rounds_with_sticky_events(tried_ms + HOUR_MS - ROUND_MS, ROOM)
    assert (here.attempts, here.looks) == ([], [ROOM])
    assert here.left_out == {ROOM: tried_ms}
    here.change(ROOM)
    here.round()
    assert here.attempts == [], "nothing that matters has changed"
    here.round()
    here.sticky([ROOM])
    here.round()
    assert here.sent, "the hour is over"
    assert here.left_out == {}


@pytest.mark.requirement("H2")
def test_what_synapse_leaves_out_is_tried_after_a_change(here: Here) -> None:
    here.left_out[ROOM] = NOW_MS
    here.sticky([ROOM])
    here.round()
    here.may[ROOM] = Able(["@bob:here"], 2)
    here.change(ROOM)
    here.round()
    assert here.sent
    assert here.left_out == {}


@pytest.mark.requirement("H3")
def test_many_rooms_cost_a_bounded_number_of_looks_a_round(here: Here) -> None:
    rooms = [f"!{number}:here" for number in range(5_000)]
    here.refused = {"@alice:here"}
    most = 0
    while here.at_ms < NOW_MS + HOUR_MS:
        before = len(here.attempts)
        here.sticky(rooms)
        here.round()
        most = max(most, len(here.attempts) - before)
    assert most == 50
    # Each once within the hour.
    assert sorted(here.attempts) == sorted((room, "@alice:here") for room in rooms)


@pytest.mark.requirement("H1")
def test_rooms_where_nobody_can_do_not_use_up_what_others_may_send(here: Here) -> None:
    here.refused = {"@alice:here"}
    here.sticky([f"!{number}:here" for number in range(45)])
    here.sticky([GOOD])
    here.round()
    assert len(here.sent) == 5


@pytest.mark.requirement("H1")
def test_nor_do_rooms_that_fail(here: Here) -> None:
    """Each is tried again by itself; all at once, after the fault, they send what a round sends."""
    here.bad = {f"!{number}:here" for number in range(45)}
    here.sticky(sorted(here.bad))
    here.sticky([GOOD])
    here.round()
    assert here.sent == [(GOOD, "@alice:here")] * 5
    assert len(here.attempts) == 50
    bad, here.bad = here.bad, set()
    while len({room for room, _ in here.sent}) == 1:
        sent = len(here.sent)
        here.round()
        assert len(here.sent) - sent <= 10
    start_ms, sent = here.at_ms, len(here.sent)
    while any(here.counts[room] > here.threshold for room in bad):
        here.round()
        assert len(here.sent) - sent <= 5 * ((here.at_ms - start_ms) // ROUND_MS + 1)


@pytest.mark.requirement("H1", "H3")
def test_however_many_rooms_there_are_where_nobody_can_one_where_somebody_can_has_its_turn(
    here: Here,
) -> None:
    """Whatever changes in those rooms, and though more of them come all the time."""
    hopeless = [f"!{number}:here" for number in range(5_000)]
    here.may = {room: Able([], 1) for room in hopeless}

    def pass_round() -> int:
        before = len(here.looks)
        here.sticky(hopeless)
        here.round()
        for room in hopeless:
            here.change(room)
        return len(here.looks) - before

    # Each has been looked at, and would be at any change.
    assert max(pass_round() for _ in range(120)) == 50
    assert len({*here.looks}) == 5_000
    here.sticky([GOOD])
    rounds = 0
    while not here.sent:
        assert pass_round() <= 55
        rounds += 1
    assert rounds <= 20
    assert here.attempts == here.sent


@pytest.mark.requirement("H3")
def test_memory_is_bounded(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(senders, "_MAX_ROOMS", 100)
    here.refused = {"@alice:here"}
    rooms = [f"!{number}:here" for number in range(250)]
    here.sticky(rooms)
    for _ in range(10):
        here.round()
    assert len(here.attempts) == 250
    assert here.handler._senders._verdicts.keys() == {*here.left_out} == {*rooms[-100:]}


@pytest.mark.requirement("H2")
def test_the_bound_of_memory_is_above_what_an_hour_has() -> None:
    from synapse_sticky.handlers.extremities import handler

    assert handler._MAX_FAILURES * HOUR_MS // ROUND_MS < senders._MAX_ROOMS


@pytest.mark.requirement("H7")
@pytest.mark.parametrize("error", [AWAY, BAD, OSError("the persister cannot be reached")], ids=str)
def test_a_cause_that_passes_says_nothing_of_the_room(here: Here, error: Exception) -> None:
    here.error = error
    here.sticky([ROOM])
    here.round()
    assert len(here.attempts) == 1
    assert (here.left_out, here.handler._senders._verdicts) == ({}, {})
    here.error = None
    # After a delay, which no sticky event ends.
    for _ in range(4):
        here.round()
    assert here.sent


@pytest.mark.requirement("H2")
def test_nor_does_it_end_what_is_known_of_it(here: Here) -> None:
    here.may[ROOM] = Able(["@alice:here"], 1)
    here.refused = {"@alice:here"}
    here.sticky([ROOM])
    here.round()
    here.error = AWAY
    here.may[ROOM] = Able(["@alice:here"], 2)
    here.change(ROOM)
    here.round()
    assert len(here.attempts) == 2
    here.error = None
    here.may[ROOM] = Able(["@alice:here"], 1)
    looks = len(here.looks)
    here.sticky([ROOM])
    for _ in range(4):
        here.round()
    assert len(here.looks) == looks + 1
    assert len(here.attempts) == 2, "the same as what was refused, within the hour"


# Power


def event(version: RoomVersion, kind: str, sender: str, content: Any, **fields: Any) -> EventBase:
    pdu = {
        "type": kind,
        "sender": sender,
        "content": content,
        "origin_server_ts": 1,
        "depth": 1,
        "auth_events": [],
        "prev_events": [],
        "hashes": {},
        "signatures": {},
        **fields,
    }
    if kind != "m.room.create" or not version.msc4291_room_ids_as_hashes:
        pdu["room_id"] = ROOM
    return make_event_from_dict(pdu, version)


MEMBERS = [f"@{name}:here" for name in "abcdef"]
LEVELS: st.SearchStrategy[Any] = st.one_of(
    st.integers(-1, 3), st.sampled_from(["2", "x", None, [], 10**20])
)


@given(
    version=st.sampled_from([RoomVersions.V9, RoomVersions.V11, RoomVersions.V12]),
    creator=st.sampled_from([*MEMBERS, "@remote:there"]),
    more=st.one_of(st.lists(st.sampled_from(MEMBERS), max_size=2), st.just(5), st.just([{}])),
    power=st.one_of(
        st.none(),
        st.fixed_dictionaries(
            {},
            optional={
                "users": st.one_of(st.dictionaries(st.sampled_from(MEMBERS), LEVELS), st.just(5)),
                "users_default": LEVELS,
                "events_default": LEVELS,
                "events": st.one_of(
                    st.dictionaries(st.sampled_from(["org.matrix.dummy_event", "m.x"]), LEVELS),
                    st.just([]),
                ),
            },
        ),
    ),
)
def test_those_have_the_power_whom_synapse_allows(
    version: RoomVersion, creator: str, more: Any, power: Any
) -> None:
    create = event(
        version,
        "m.room.create",
        creator,
        {"creator": creator, "additional_creators": more, "room_version": version.identifier},
        state_key="",
    )
    state = {("m.room.create", ""): create}
    if power is not None:
        state["m.room.power_levels", ""] = event(
            version, "m.room.power_levels", creator, power, state_key=""
        )
    found = able_among(MEMBERS, state)
    assert {*found} == {member for member in MEMBERS if is_allowed(version, member, state)}
    assert len({*found}) == len(found)


def is_allowed(version: RoomVersion, user_id: str, state: Any) -> bool:
    """Does Synapse allow the member's dummy event?"""
    membership = {"membership": "join"}
    member = event(version, "m.room.member", user_id, membership, state_key=user_id)
    dummy = event(version, "org.matrix.dummy_event", user_id, {})
    try:
        check_state_dependent_auth_rules(dummy, [*state.values(), member])
    except (AuthError, TypeError, ValueError, AttributeError):
        return False
    return True


def test_the_most_powerful_come_first() -> None:
    version = RoomVersions.V11
    power = {"users": {"@c:here": 50, "@b:here": 100, "@a:here": -1}}
    state = {
        ("m.room.create", ""): event(version, "m.room.create", "@x:there", {}, state_key=""),
        ("m.room.power_levels", ""): event(
            version, "m.room.power_levels", "@x:there", power, state_key=""
        ),
    }
    rest = ["@d:here", "@e:here", "@f:here"]
    assert list(able_among(MEMBERS, state)) == ["@b:here", "@c:here", *rest]
    assert able_among(MEMBERS, {}) == ()
