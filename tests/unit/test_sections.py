"""Sliding sync's section as it goes out: for who is joined at that moment (D8)."""

import asyncio
from collections.abc import Collection, Set
from types import SimpleNamespace
from typing import Any

import attr
import pytest
from synapse import visibility
from synapse.api.room_versions import RoomVersions
from synapse.events import EventBase, make_event_from_dict
from synapse.events.utils import FilteredEvent
from synapse.types import MultiWriterStreamToken, RoomStreamToken, UserID
from synapse.types.handlers.sliding_sync import SlidingSyncResult
from synapse.types.rest.client import SlidingSyncStickyEventsToken

from synapse_sticky.handlers.sliding.handler import SlidingPage
from synapse_sticky.handlers.sliding.request import SlidingRequest
from synapse_sticky.handlers.sliding.synapse import SynapseSliding
from synapse_sticky.homeserver.access import Access
from synapse_sticky.index import Position


class FakeStore:
    """One with an event in each of two rooms."""

    def __init__(self) -> None:
        self.joined = {"!a", "!b"}
        self.events = {room_id: _event(room_id) for room_id in ("!a", "!b", "!c")}
        self.asked_for: set[str] = set()

    async def get_rooms_for_user(self, user_id: str) -> frozenset[str]:
        assert user_id == "@me:here"
        return frozenset(self.joined)

    def get_sticky_events_stream_token(self) -> MultiWriterStreamToken:
        return MultiWriterStreamToken(stream=5)

    async def get_sticky_events_in_rooms(
        self, room_ids: Collection[str], **options: Any
    ) -> tuple[MultiWriterStreamToken, dict[str, list[str]]]:
        self.asked_for = set(room_ids)
        return options["to_token"], {r: [self.events[r].event_id] for r in sorted(room_ids)}

    async def get_events(self, event_ids: Collection[str]) -> dict[str, EventBase]:
        return {event.event_id: event for event in await self.get_events_as_list(event_ids)}

    async def get_events_as_list(self, event_ids: Collection[str]) -> list[EventBase]:
        return [event for event in self.events.values() if event.event_id in event_ids]

    async def are_users_erased(self, user_ids: Collection[str]) -> dict[str, bool]:
        return dict.fromkeys(user_ids, False)


def _event(room_id: str, is_sticky: bool = True) -> EventBase:
    fields: dict[str, Any] = {
        "type": "m.test",
        "room_id": room_id,
        "sender": "@you:here",
        "content": {},
        "auth_events": [],
        "prev_events": [],
        "hashes": {},
        "signatures": {},
        "origin_server_ts": 1,
        "depth": 1,
    }
    if is_sticky:
        fields["msc4354_sticky"] = {"duration_ms": 60_000}
    return make_event_from_dict(fields, RoomVersions.V11)


@pytest.mark.requirement("D8")
def test_a_room_that_is_left_while_the_response_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    store, extensions = FakeStore(), SimpleNamespace(get_sticky_events_extension_response=None)
    handler = SimpleNamespace(extensions=extensions, wait_for_sync_for_user=None)

    async def everything(
        storage: object, user_id: str, events: list[EventBase], *, always_include_ids: Set[str]
    ) -> list[FilteredEvent]:
        assert {e.event_id for e in events} == always_include_ids
        return [FilteredEvent(event=event, membership="leave") for event in events]

    monkeypatch.setattr(visibility, "filter_and_transform_events_for_client", everything)
    homeserver: Any = SimpleNamespace(
        store=store,
        hs=SimpleNamespace(
            get_storage_controllers=lambda: None,
            get_sliding_sync_handler=lambda: handler,
            config=SimpleNamespace(worker=SimpleNamespace(writers=SimpleNamespace(events=["w"]))),
        ),
        is_postgres=True,
        now_ms=lambda: 0,
        mark=lambda: 0,
        replace=lambda owner, name, make: setattr(owner, name, make(getattr(owner, name))),
    )

    async def pager(request: SlidingRequest) -> SlidingPage:
        count, reached = await request.read(request.room_ids, Position(0), request.up_to, 10)
        assert count == 2
        store.joined.remove("!a")
        return SlidingPage(reached, is_due=True)

    SynapseSliding(homeserver).page(pager)
    assert Access(homeserver).guard("sliding") == (True, [])
    section = asyncio.run(
        extensions.get_sticky_events_extension_response(
            sync_config=SimpleNamespace(
                requester=SimpleNamespace(user=UserID.from_string("@me:here"), device_id="DEVICE"),
                conn_id=None,
            ),
            sticky_events_request=SimpleNamespace(enabled=True, since=None, limit=100),
            all_interested_room_ids={"!a", "!b", "!c"},
            to_token=SimpleNamespace(
                sticky_events_key=MultiWriterStreamToken(stream=5),
                room_key=RoomStreamToken(stream=9),
                un_partial_stated_rooms_key=1,
                account_data_key=1,
            ),
            from_token=None,
        )
    )
    assert store.asked_for == {"!a", "!b"}
    assert section, "it is due"
    shown = {
        room_id: [filtered.event for filtered in events]
        for room_id, events in section.room_id_to_sticky_events.items()
    }
    assert shown == {"!b": [store.events["!b"]]}
    assert section.next_batch.serialise() == "sticky_5"


@attr.s(auto_attribs=True, frozen=True)
class Result:
    """An answer of sliding sync."""

    extensions: SlidingSyncResult.Extensions


@pytest.mark.requirement("D8", "S4", "S5")
def test_a_section_that_was_made_before() -> None:
    """Nobody gets what was redacted or has expired since, nor what is in a room that they left."""
    store = FakeStore()
    by_room = {
        room_id: [FilteredEvent(event=event, membership="join")]
        for room_id, event in store.events.items()
    }
    store.joined.add("!c")
    section = SlidingSyncResult.Extensions.StickyEventsExtension(
        room_id_to_sticky_events=by_room, next_batch=SlidingSyncStickyEventsToken.START
    )
    kept = Result(SlidingSyncResult.Extensions(sticky_events=section))

    async def wait_for_sync_for_user(*args: object) -> tuple[Result, bool]:
        return kept, False

    async def rows_of(event_ids: Collection[str]) -> dict[str, Any]:
        return {event_id: SimpleNamespace(expires_at_ms=100) for event_id in event_ids}

    now_ms = 0
    handler = SimpleNamespace(wait_for_sync_for_user=wait_for_sync_for_user, extensions=None)
    homeserver: Any = SimpleNamespace(
        store=store,
        hs=SimpleNamespace(get_sliding_sync_handler=lambda: handler),
        now_ms=lambda: now_ms,
        replace=lambda owner, name, make: setattr(owner, name, make(getattr(owner, name))),
    )
    Access(homeserver, rows_of)._guard_sliding_response()

    def rooms() -> list[str]:
        requester = SimpleNamespace(user=UserID.from_string("@me:here"))
        waiting: Any = handler.wait_for_sync_for_user(requester, "config")
        result, did_wait = asyncio.run(waiting)
        assert not did_wait
        assert section.room_id_to_sticky_events is by_room
        assert list(by_room) == ["!a", "!b", "!c"], "others get it, too"
        return list(result.extensions.sticky_events.room_id_to_sticky_events)

    assert rooms() == ["!a", "!b", "!c"]
    store.joined.remove("!a")
    assert rooms() == ["!b", "!c"]
    store.events["!b"] = _event("!b", is_sticky=False)
    assert rooms() == ["!c"]
    now_ms = 100
    assert rooms() == []
