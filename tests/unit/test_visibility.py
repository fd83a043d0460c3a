"""Synapse's two filters, which show what is allowed beside what they would show anyway (C1)."""

import functools
import gc
import importlib
import inspect
import sys
import weakref
from collections.abc import Collection, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import attr
import pytest
from synapse import visibility
from synapse.api.room_versions import RoomVersions
from synapse.events import EventBase, make_event_from_dict
from synapse.events.utils import FilteredEvent, prune_event
from twisted.internet.defer import CancelledError

from synapse_sticky.handlers.visibility.handler import HiddenEvent
from synapse_sticky.handlers.visibility.synapse import SynapseVisibility
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.clock import SetClock
from synapse_sticky.homeserver.seams import SeamMismatchError
from synapse_sticky.metrics import Metrics
from tests.unit.coroutines import result_of

FOR_USERS = "filter_and_transform_events_for_client"
FOR_SERVERS = "filter_events_for_server"
OF_SYNC = {
    *("synapse.handlers.sync", "synapse.handlers.sliding_sync"),
    "synapse.handlers.sliding_sync.extensions",
}
NOW_MS = 1_800_000_000_000


@attr.s(auto_attribs=True, eq=False)
class Store:
    """A homeserver's main store."""

    partial_rooms: Collection[str] = ()

    async def is_partial_state_room(self, room_id: str) -> bool:
        return room_id in self.partial_rooms


class ThisHomeserver(Homeserver):
    """One with this store and nothing else."""

    def __init__(self, store: Store, server_name: str = "here") -> None:
        self.store = store
        # What the filters are called with.
        self.storage: Any = SimpleNamespace()
        self.hs: Any = SimpleNamespace(get_storage_controllers=lambda: self.storage)
        self.server_name = server_name
        self.metrics = Metrics(server_name)
        self._undo = []
        self._clock = SetClock(lambda: 0, no_timer, no_timer)


def no_timer(*args: Any, **options: Any) -> None:
    """Nothing here waits for a time."""


async def nothing(who: str, events: Sequence[HiddenEvent]) -> set[str]:
    return set()


def holders(function: object) -> set[str]:
    """The names of the modules that have it in a global."""
    return {
        name
        for name, module in sys.modules.items()
        if isinstance(module, ModuleType) and any(f is function for f in vars(module).values())
    }


@pytest.mark.requirement("C1")
@pytest.mark.usefixtures("restored")
def test_all_of_synapse_but_exports_mails_and_timelines_gets_them() -> None:
    # As Synapse loads all of it before it loads any module.
    importlib.import_module("synapse.app.homeserver")
    before = {name: holders(getattr(visibility, name)) for name in (FOR_USERS, FOR_SERVERS)}
    signatures = {name: inspect.signature(getattr(visibility, name)) for name in before}
    SynapseVisibility(ThisHomeserver(Store())).allow(servers=nothing, users=nothing)
    after = {name: holders(getattr(visibility, name)) for name in before}
    plain = {"synapse.handlers.admin", "synapse.push.mailer", *OF_SYNC}
    assert plain < before[FOR_USERS]
    assert len(before[FOR_USERS]) >= 12
    assert after == {FOR_USERS: before[FOR_USERS] - plain, FOR_SERVERS: before[FOR_SERVERS]}
    assert {name: inspect.signature(getattr(visibility, name)) for name in before} == signatures
    assert holders(inspect.unwrap(getattr(visibility, FOR_USERS))) == plain
    late = ModuleType("late")
    exec(f"from synapse.visibility import {FOR_USERS}", vars(late))  # noqa: S102
    assert vars(late)[FOR_USERS] is getattr(visibility, FOR_USERS)


@pytest.mark.usefixtures("restored")
def test_a_holder_of_synapses_filter_is_named() -> None:
    held = functools.partial(getattr(visibility, FOR_USERS))
    homeserver = ThisHomeserver(Store())
    with pytest.raises(SeamMismatchError, match="partial"):
        SynapseVisibility(homeserver).allow(servers=nothing, users=nothing)
    assert held.func is getattr(visibility, FOR_USERS)
    assert not [name for name in vars(homeserver.storage) if "synapse_sticky" in name]


def event(
    number: int, metadata: dict[str, Any] | None = None, *, sticky: bool = True, **fields: Any
) -> EventBase:
    return make_event_from_dict(
        {
            "type": "m.test",
            "room_id": "!a:here",
            "sender": "@user:here",
            "content": {},
            "origin_server_ts": NOW_MS,
            "depth": number,  # which its ID depends on
            "auth_events": [],
            "prev_events": [],
            "hashes": {},
            "signatures": {},
            **({"msc4354_sticky": {"duration_ms": 60_000}} if sticky else {}),
            **fields,
        },
        RoomVersions.V11,
        metadata or {},
    )


class Filters:
    """Synapse's filters as they are called, in front of ones that hide all but some events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: set[str] = set()
        self.calls: list[tuple[Any, ...]] = []
        shown, calls = self.shown, self.calls

        async def for_client(
            storage: Any,
            user_id: str,
            events: list[EventBase],
            is_peeking: bool = False,
            always_include_ids: frozenset[str] = frozenset(),
            filter_send_to_client: bool = True,
            **later: Any,
        ) -> list[FilteredEvent]:
            calls.append((user_id, is_peeking, always_include_ids, filter_send_to_client, later))
            visible = shown | always_include_ids
            return [
                FilteredEvent(event=e, membership="leave") for e in events if e.event_id in visible
            ]

        async def for_server(
            storage: Any,
            target_server_name: str,
            local_server_name: str,
            events: Sequence[EventBase],
            *,
            redact: bool,
            **options: Any,
        ) -> list[EventBase]:
            seen = [e if e.event_id in shown else prune_event(e) for e in events]
            return seen if redact else [e for e in seen if e.event_id in shown]

        # Where nobody else holds them.
        monkeypatch.setattr(visibility, FOR_USERS, for_client)
        monkeypatch.setattr(visibility, FOR_SERVERS, for_server)

    async def users(
        self, homeserver: ThisHomeserver, *args: Any, **options: Any
    ) -> list[FilteredEvent]:
        function: Any = getattr(visibility, FOR_USERS)
        answer: list[FilteredEvent] = await function(homeserver.storage, *args, **options)
        return answer

    def for_user(self, homeserver: ThisHomeserver, events: list[EventBase]) -> list[EventBase]:
        return [f.event for f in result_of(self.users(homeserver, "@me:here", events))]

    def for_server(
        self, homeserver: ThisHomeserver, events: list[EventBase], redact: bool = True
    ) -> list[EventBase]:
        function: Any = getattr(visibility, FOR_SERVERS)
        answer: list[EventBase] = result_of(
            function(homeserver.storage, "there", "here", events, redact=redact, other=True)
        )
        return answer


@pytest.fixture
def filters(monkeypatch: pytest.MonkeyPatch) -> Filters:
    return Filters(monkeypatch)


class Asked:
    """Allows these, and remembers what was asked."""

    def __init__(self, *allowed: EventBase) -> None:
        self.allowed = {e.event_id for e in allowed}
        self.asked: list[tuple[str, list[HiddenEvent]]] = []
        self.failure: Exception | None = None

    async def __call__(self, who: str, events: Sequence[HiddenEvent]) -> set[str]:
        self.asked.append((who, list(events)))
        if self.failure is not None:
            raise self.failure
        return self.allowed & {e.event_id for e in events}


def homeserver_with(
    store: Store | None = None, *, users: Any = None, servers: Any = None
) -> ThisHomeserver:
    homeserver = ThisHomeserver(store or Store())
    SynapseVisibility(homeserver).allow(users=users, servers=servers)
    return homeserver


@pytest.mark.requirement("C1")
def test_what_is_allowed_is_shown_beside_the_rest(filters: Filters) -> None:
    shown, plain, hidden, denied = event(1), event(2, sticky=False), event(3), event(4)
    outlier = event(5)
    outlier.internal_metadata.outlier = True
    filters.shown.add(shown.event_id)
    asked = Asked(hidden, plain, outlier)
    homeserver = homeserver_with(users=asked)
    events = [hidden, shown, plain, denied, outlier]
    assert filters.for_user(homeserver, events) == [hidden, shown]
    ((who, about),) = asked.asked
    assert who == "@me:here"
    field = {"duration_ms": 60_000}
    assert about == [
        HiddenEvent(e.event_id, "!a:here", "@user:here", field, NOW_MS) for e in (hidden, denied)
    ]


def test_nobody_is_asked_about_what_is_shown_anyway(filters: Filters) -> None:
    shown, included = event(1), event(2)
    filters.shown.add(shown.event_id)
    asked = Asked()
    homeserver = homeserver_with(users=asked)
    assert filters.for_user(homeserver, [shown]) == [shown]
    ids = frozenset({included.event_id})
    answer = result_of(
        filters.users(homeserver, "@me:here", [shown, included], always_include_ids=ids)
    )
    assert [f.event for f in answer] == [shown, included]
    assert filters.for_user(homeserver, [event(3, sticky=False)]) == []
    assert asked.asked == []


def test_arguments_are_handed_on(filters: Filters) -> None:
    hidden = event(1)
    homeserver = homeserver_with(users=Asked(hidden))
    ids = frozenset({"$other"})
    result_of(filters.users(homeserver, "@me:here", [hidden], True, ids, False, later=5))
    allowed = ids | {hidden.event_id}
    rest = (False, {"later": 5})
    assert filters.calls == [("@me:here", True, ids, *rest), ("@me:here", True, allowed, *rest)]


def test_if_it_cannot_be_decided_nothing_is_added(filters: Filters) -> None:
    hidden = event(1)
    asked = Asked(hidden)
    asked.failure = OSError("the database is away")
    homeserver = homeserver_with(users=asked, servers=asked)
    assert filters.for_user(homeserver, [hidden]) == []
    assert filters.for_server(homeserver, [hidden], redact=False) == []
    assert len(asked.asked) == 2
    asked.failure = CancelledError()
    with pytest.raises(CancelledError):
        filters.for_user(homeserver, [hidden])


@pytest.mark.requirement("H1", "H5")
def test_an_answer_of_another_kind_is_handed_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def another(*args: Any, **options: Any) -> Any:
        return ["something else"]

    monkeypatch.setattr(visibility, FOR_USERS, another)
    monkeypatch.setattr(visibility, FOR_SERVERS, another)
    homeserver, events = homeserver_with(users=nothing, servers=nothing), [event(1), event(2)]
    for name, who in ((FOR_USERS, ("@me:here",)), (FOR_SERVERS, ("there", "here"))):
        function: Any = getattr(visibility, name)
        assert result_of(function(homeserver.storage, *who, events)) == ["something else"]
    assert len([r for r in caplog.records if "Could not decide which" in r.message]) == 2


@pytest.mark.requirement("C1", "S6")
def test_a_server_gets_whole_what_is_allowed(filters: Filters) -> None:
    shown, hidden, denied, plain = event(1), event(2), event(3), event(4, sticky=False)
    spam = [event(5, {"policy_server_spammy": True}), event(6, {"spam_checker_spammy": True})]
    filters.shown.add(shown.event_id)
    asked = Asked(hidden, plain, *spam)
    homeserver = homeserver_with(servers=asked)
    events = [plain, hidden, *spam, shown, denied]
    whole = [e for e in filters.for_server(homeserver, events) if e.sticky_duration()]
    assert whole == [hidden, shown]
    assert [e.event_id for e in filters.for_server(homeserver, events)] == [
        e.event_id for e in events
    ]
    assert filters.for_server(homeserver, events, redact=False) == [hidden, shown]
    assert [e.event_id for e in asked.asked[0][1]] == [hidden.event_id, denied.event_id]


@pytest.mark.requirement("C1")
def test_of_a_room_that_is_being_joined_only_own_events(filters: Filters) -> None:
    own, remote = event(1), event(2, sender="@user:there")
    homeserver = homeserver_with(Store({"!a:here"}), servers=Asked(own, remote))
    assert filters.for_server(homeserver, [own, remote], redact=False) == [own]


@pytest.mark.parametrize("kind", ["users", "servers"])
def test_each_homeserver_of_a_process_is_asked_for_its_own(filters: Filters, kind: str) -> None:
    hidden = event(1)

    def ask(homeserver: ThisHomeserver) -> int:
        filtered = (
            filters.for_user(homeserver, [hidden])
            if kind == "users"
            else filters.for_server(homeserver, [hidden], redact=False)
        )
        return len(filtered)

    by_kind: dict[str, Any] = {kind: Asked(hidden)}
    one, other = homeserver_with(**by_kind), homeserver_with(users=Asked(), servers=Asked())
    without = ThisHomeserver(Store())
    assert [ask(one), ask(other), ask(without)] == [1, 0, 0]
    one.close()
    assert ask(one) == 0, "as if there were no module"
    assert [name for name in vars(one.storage) if "synapse_sticky" in name] == []


@pytest.mark.usefixtures("filters")
def test_a_homeserver_is_let_go_although_the_filters_live_on() -> None:
    homeserver = homeserver_with(users=Asked(), servers=Asked())
    gone = weakref.ref(homeserver)
    del homeserver
    gc.collect()
    assert gone() is None
    assert getattr(visibility, FOR_USERS).is_of_synapse_sticky
