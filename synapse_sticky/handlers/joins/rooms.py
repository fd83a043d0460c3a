"""The rooms that something is pushed of: their pushes, and what the index has of their own events.

The index says only that a room has new events. This file finds out whether own events are among
them. If not, nothing is done, however many events and newcomers there are (H1, H3).
"""

from collections.abc import Collection, Mapping
from itertools import islice

import attr

from synapse_sticky.handlers.joins.order import OwnEvent, places_of_first
from synapse_sticky.handlers.joins.push import NO_END, Push
from synapse_sticky.handlers.joins.sent import GRACE_MS
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.index import IndexFollower

_PAGE = 64
"""A push takes in this many events at once that were never sent: more than a transaction has."""

_ORDER_HOLDS_MS = 100
"""However many servers join a room meanwhile, what they are pushed first is looked up once."""


@attr.s(auto_attribs=True, slots=True)
class _Room:
    """
    pushes: by destination.
    behind: the destinations of those that no new event concerns until something else changes.
    look_from: the own events before this stream ID are known.
    newest: the highest stream ID that was seen of an own event.
    seen_ms: when those were seen that the ordinary queue still has time for, by stream ID.
    first: which own events are pushed first; looked up at ``first_ms``.
    """

    look_from: int
    newest: int = 0
    pushes: dict[str, Push] = attr.Factory(dict)
    behind: set[str] = attr.Factory(set)
    seen_ms: dict[int, int] = attr.Factory(dict)
    first: Mapping[str, int] = attr.Factory(dict)
    first_ms: int | None = None


class PushedRooms:
    """What a push takes in is a page from its position on, so that its work and its memory do not
    follow the number of own events. When an event was seen is noted once for all newcomers."""

    def __init__(self, homeserver: Homeserver, follower: IndexFollower, window: int) -> None:
        """
        Args:
            window: how many events all servers of a room together may have under way to a newcomer.
        """
        self._homeserver = homeserver
        self._follower = follower
        self._window = window
        self._rooms: dict[str, _Room] = {}
        homeserver.on_clock_set(self._clock_set)

    def _clock_set(self, by_ms: int) -> None:
        for room in self._rooms.values():
            room.seen_ms = {stream_id: ms + by_ms for stream_id, ms in room.seen_ms.items()}
            room.first_ms = None

    @property
    def is_whole(self) -> bool:
        """Does the index have all events? Not while it is made anew."""
        return self._follower.is_whole

    def add(self, push: Push) -> None:
        """From now on the push is among those of its room."""
        if (room := self._rooms.get(push.room_id)) is None:
            room = self._rooms[push.room_id] = _Room(self._whole_up_to() + 1)
        room.pushes[push.destination] = push

    def remove(self, push: Push) -> None:
        """Takes the push out; does nothing if it is not there."""
        room = self._rooms.get(push.room_id)
        if room is not None and room.pushes.get(push.destination) is push:
            del room.pushes[push.destination]
            room.behind.discard(push.destination)
            if not room.pushes:
                del self._rooms[push.room_id]

    def pushes(self, room_id: str) -> list[Push]:
        """All pushes of the room."""
        room = self._rooms.get(room_id)
        return list(room.pushes.values()) if room else []

    def for_new_events(self, room_id: str) -> list[Push]:
        """The pushes of the room that a new event may concern, as far as that is known."""
        room = self._rooms.get(room_id)
        if room is None:
            return []
        return [push for name, push in room.pushes.items() if name not in room.behind]

    def note_behind(self, push: Push) -> None:
        """A new event has its turn after what the push waits for, until ``note_changed``."""
        room = self._rooms.get(push.room_id)
        if room is not None and room.pushes.get(push.destination) is push:
            room.behind.add(push.destination)

    def note_changed(self, push: Push) -> None:
        """What the push waits for may be another thing now."""
        if (room := self._rooms.get(push.room_id)) is not None:
            room.behind.discard(push.destination)

    def may_lack(self, push: Push) -> bool:
        """May a new event of the room be the push's business?"""
        room, now_ms = self._rooms.get(push.room_id), self._homeserver.now_ms()
        is_watching = now_ms < push.watch_until_ms or push.is_dirty(now_ms)
        return is_watching and (room is None or push.position <= room.newest)

    def _whole_up_to(self) -> int:
        """Up to this stream ID the index has all rows."""
        if not self._follower.is_whole:
            return 0
        return min(self._follower.index.positions().values(), default=0)

    def with_new(self, room_ids: Collection[str]) -> list[str]:
        """Those of the rooms that have own events which were not there when this was asked last."""
        found = []
        now_ms, whole_up_to = self._homeserver.now_ms(), -1
        for room_id in room_ids:
            if (room := self._rooms.get(room_id)) is None:
                continue
            if whole_up_to < 0:
                whole_up_to = self._whole_up_to()
            own = self._own(room_id, room.look_from, 2**31)
            new = [stream_id for stream_id, _, _ in own if stream_id not in room.seen_ms]
            room.look_from = max(room.look_from, whole_up_to + 1)
            if new:
                found.append(room_id)
                room.newest = max(room.newest, *new)
                room.seen_ms.update(dict.fromkeys(new, now_ms))
            self._forget(room, now_ms)
        return found

    def _forget(self, room: _Room, now_ms: int) -> None:
        """Forgets what was seen long ago, but nothing that ``with_new`` would then take for new."""
        for stream_id, seen_ms in list(room.seen_ms.items()):
            if now_ms - seen_ms <= GRACE_MS or stream_id >= room.look_from:
                break
            del room.seen_ms[stream_id]

    def _own(self, room_id: str, from_id: int, limit: int) -> list[OwnEvent]:
        now_ms = self._homeserver.now_ms()
        return self._follower.index.own_events(room_id, from_id, now_ms, limit)

    def last_done(self, push: Push, limit: int) -> list[str]:
        """The IDs of the last of the room's own events that the push is done with, ascending."""
        if not push.position and not push.finished:
            return []
        own = self._own(push.room_id, 0, 2**31)
        done = (e for at, e, _ in reversed(own) if at < push.position or at in push.finished)
        return list(islice(done, limit))[::-1]

    async def ask_if_dirty(self, push: Push) -> None:
        """Asks the database for the room's last rows if the push is dirty. This process may see the
        join before it sees rows that are older than the join."""
        now_ms, dirty_marks = self._homeserver.now_ms(), push.dirty_marks
        if push.is_dirty(now_ms):
            last_rows = await self._follower.stream.last_rows(push.room_id)
            push.take_in_last_rows(last_rows, dirty_marks, now_ms)
            push.first = self._first(push.room_id)

    def _first(self, room_id: str) -> Mapping[str, int]:
        if (room := self._rooms.get(room_id)) is None:
            return {}
        now_ms = self._homeserver.now_ms()
        if room.first_ms is None or now_ms - room.first_ms >= _ORDER_HOLDS_MS:
            room.first = places_of_first(self._own(room_id, 0, 2**31))
            room.first_ms = now_ms
        return room.first

    def has_own_events(self, push: Push) -> bool:
        """Are there unexpired own events that the push is not done with, as far as is known?"""
        return not self._follower.is_whole or bool(self._own(push.room_id, push.position, 1))

    def update(self, push: Push) -> None:
        """Has the push take in its room's present own events, a page of those never sent."""
        if not self._follower.is_whole:
            return  # what is missing in it is not gone
        now_ms = self._homeserver.now_ms()
        rows, read_up_to = self._open_events(push)
        pushing = self._follower.index.server_count(push.room_id, now_ms)
        room = self._rooms.get(push.room_id)

        def seen_ms(stream_id: int) -> int:
            if room is None:
                return now_ms
            return room.seen_ms.get(stream_id, 0 if stream_id < room.look_from else now_ms)

        given_up = push.update(
            rows,
            now_ms,
            max(1, self._window // max(1, pushing)),
            seen_ms=seen_ms,
            is_cut=read_up_to is not None,
            whole_up_to=min(self._whole_up_to(), read_up_to or NO_END),
        )
        self._homeserver.metrics.pushed("given_up", given_up)

    def _open_events(self, push: Push) -> tuple[list[OwnEvent], int | None]:
        """The room's own events that the push is not done with, ascending: all that were sent, a
        page of the others, and those that are to be pushed first. If there are more, also gives up
        to which stream ID none is left out."""
        rows: list[OwnEvent] = []
        known = {sent.event_id for sent in push.sent}
        at, unknown = push.position, 0
        read_up_to: int | None = None
        while page := self._own(push.room_id, at, _PAGE):
            for row in page:
                if row[0] not in push.finished:
                    rows.append(row)
                    unknown += row[1] not in known
            if len(page) < _PAGE:
                break
            if unknown >= _PAGE:
                read_up_to = page[-1][0]
                break
            last = page[-1][0]
            at = (push.finished.end_of(last) or last) + 1
        if read_up_to is not None:
            rows += self._picked_after(push, read_up_to)
        return rows, read_up_to

    def _picked_after(self, push: Push, position: int) -> list[OwnEvent]:
        """Those after the position that were sent, or are to be pushed first."""
        now_ms = self._homeserver.now_ms()
        picked = {sent.event_id for sent in push.sent} | push.first.keys()
        rows = [row for event_id in picked if (row := self._follower.index.get(event_id))]
        return sorted(
            (row[0], row[2], row[3])
            for row in rows
            if row[0] > position and row[4] > now_ms and row[0] not in push.finished
        )

    def take_in_named(self, push: Push, event_ids: Collection[str]) -> None:
        """An answer names these events: has the push take in those of its room's own ones. Work
        follows the answer."""
        if not self._follower.is_whole:
            return
        now_ms, own = self._homeserver.now_ms(), f":{self._homeserver.server_name}"
        for event_id in event_ids:
            row = self._follower.index.get(event_id)
            if row and row[1] == push.room_id and row[4] > now_ms and row[3].endswith(own):
                push.take_in_named(row[0], event_id, now_ms)
