"""What a sync asks for, what it is answered, and where a page of sticky events ends."""

from collections.abc import Collection
from typing import NamedTuple

from synapse_sticky.index import Position


class Question(NamedTuple):
    """Which deliverable events of these rooms, unexpired at ``now_ms``, come after one position of
    the sticky events stream (exclusive) and up to another (inclusive)?

    limit: the most to give, None for all.
    """

    room_ids: Collection[str]
    after: Position
    up_to: Position
    now_ms: int
    limit: int | None


Answer = tuple[dict[str, list[str]], Position]
"""The events' IDs by room, in stream order; and up to where all there are have been given."""


def both(one: Position, other: Position) -> Position:
    """The position of each writer that is the further of the two."""
    if one.is_before_or_at(other):
        return other
    stream_id = max(one.stream_id, other.stream_id)
    writers = {writer: max(one.of(writer), other.of(writer)) for writer in _writers(one, other)}
    return Position(stream_id, writers)


def end_of_page(after: Position, up_to: Position, last_stream_id: int) -> Position:
    """Where a full page ends: no writer is further than the page's last event or than ``up_to``,
    nor behind where the page began."""
    stream_id = max(after.stream_id, min(last_stream_id, up_to.stream_id))
    writers = {
        writer: max(after.of(writer), min(last_stream_id, up_to.of(writer)))
        for writer in _writers(after, up_to)
    }
    return Position(stream_id, writers)


def _writers(one: Position, other: Position) -> set[str]:
    return {*one.writers, *other.writers}
