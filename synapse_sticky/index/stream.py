"""Synapse's sticky events stream: its rows, and what the index needs of it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import attr


@attr.s(auto_attribs=True, frozen=True, slots=True)
class StickyRow:
    """One row of the sticky events stream.

    expires_at_ms: when it ends for this server, which may keep the room's events for less long.
    deliverable: False while the event is soft-failed, and for good once it is redacted or gone, or
        its sender's data erased.
    key: what it is the state of, hashed; None if that cannot be read.
    newness_ms: the end that its sender claims; None if it is not known.
    size_bytes: of its JSON.
    """

    stream_id: int
    instance_name: str
    room_id: str
    event_id: str
    sender: str
    expires_at_ms: int
    deliverable: bool
    key: int | None = None
    newness_ms: int | None = None
    size_bytes: int = 0

    @property
    def for_index(self) -> tuple[int, str, str, str, str, int, int | None, int, int]:
        """What the index keeps of it."""
        place = (self.stream_id, self.instance_name, self.room_id)
        newness_ms = self.expires_at_ms if self.newness_ms is None else self.newness_ms
        content = (self.key, newness_ms, self.size_bytes)
        return (*place, self.event_id, self.sender, self.expires_at_ms, *content)


class Stream(Protocol):
    """Synapse's sticky events stream, as this process sees it."""

    @property
    def writers(self) -> Sequence[str]:
        """The instances that write to it."""

    def positions(self) -> dict[str, int]:
        """Up to where each writer's rows are visible here, by instance name."""

    async def rows(self, *, after: int, up_to: int, limit: int) -> list[StickyRow]:
        """Unexpired rows with ``after < stream_id <= up_to``, ascending, at most ``limit``."""

    async def rows_of(self, event_ids: Collection[str]) -> list[StickyRow]:
        """The present rows of these events; an event without a row is left out."""

    async def rows_at(self, stream_ids: Mapping[str, int]) -> list[StickyRow]:
        """The present rows of these events, by event ID, at these stream IDs; one that is gone or
        was moved is left out."""

    async def rows_in_room(self, room_id: str, *, after: int, limit: int) -> list[StickyRow]:
        """The room's unexpired rows with ``after < stream_id``, ascending, at most ``limit``."""

    async def rows_in_rooms(
        self, portion: Collection[str], *, after: int, up_to: int, now_ms: int, limit: int
    ) -> list[StickyRow]:
        """The rows of a portion of the rooms with ``after < stream_id <= up_to`` that are unexpired
        at ``now_ms``, ascending, at most ``limit``."""

    async def rooms_of(self, user_id: str) -> list[str]:
        """The rooms with unexpired rows of this user's, by their IDs. It reads all rows, which is
        for rare use."""

    async def last_rows(self, room_id: str) -> dict[str, int]:
        """The last stream ID that each writer has given to an unexpired row of the room's own
        events, by instance name: as the database has it, which this process may see later."""

    def on_advance(self, callback: Callable[[], None]) -> None:
        """Calls back whenever any of Synapse's streams may have advanced."""

    def on_persisted(self, callback: Callable[[Collection[StickyRow]], None]) -> None:
        """Calls back with rows that this process has persisted, before their positions are
        visible. Not with all of them."""

    def on_event_changed(self, callback: Callable[[str], None]) -> None:
        """Calls back with an event ID: redacted, purged or changed in its metadata."""

    def on_room_purged(self, callback: Callable[[str], None]) -> None:
        """Calls back with a room ID whose events may be gone."""

    def on_retention_changed(self, callback: Callable[[str], None]) -> None:
        """Calls back with a room ID whose events may be kept for another time than before. Never
        where this server does not enforce retention."""

    async def forget_gone(self, room_id: str) -> None:
        """Deletes the room's rows whose events are gone."""

    def on_user_redacted(self, callback: Callable[[str, str], None]) -> None:
        """Calls back with the ID of a room, or none for all rooms, and of a user: all that the user
        has sent there may be redacted at once, or the user's data erased (S5)."""
