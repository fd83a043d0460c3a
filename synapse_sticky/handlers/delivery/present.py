"""What who arrives late is given first: all there is, or the newest of each key (D4, D5).

A call may have had many more events than participants. Whoever reads its events in the order in
which they came in sees who has left long ago, and misses who is there, until the last is read.
"""

from synapse_sticky._core import StickyIndex
from synapse_sticky.handlers.delivery.pages import Answer, Question, both, end_of_page
from synapse_sticky.homeserver.database import portions
from synapse_sticky.index import Position, Stream

MOST_EVENTS = 1_000
MOST_BYTES = 4_000_000
"""Of the events' JSON."""

MOST_KEYS = 20
"""Of a sender in a room, if not all fits into the response."""

MOST_OLDEST = 50
"""So many of the oldest events come beside the newest of each key."""

_ORDINARY = 100
"""Who asks for this many, as /v3/sync does, leaves it to the server how many there are."""

_MOST_READ = 10_000
"""Of so many rows at most the database is asked for one response."""

_PAGE = 500


def first_answer(index: StickyIndex, question: Question, now: Position) -> Answer:
    """The answer to a question that begins at the start of the stream.

    What did not fit comes after the position that it gives, and with it some of this once more.

    Args:
        now: a position that the index holds. Who asks for all rooms at once that they have joined,
            as /v3/sync does, is at ``question.up_to`` in all other rooms, and may have the newest
            events of these rooms beyond that later only.
    """
    room_ids, after, up_to, now_ms, limit = question
    if limit is None:
        # Nobody asks for these once more, as the client's token is past them.
        before, _, _ = index.events_by_room(
            room_ids, after.stream_id, after.writers, up_to.stream_id, up_to.writers, now_ms, None
        )
        if now.is_before_or_at(up_to):
            return before, both(after, up_to)
        more, _ = _present(index, question, both(up_to, now), MOST_EVENTS, MOST_OLDEST)
        return _together(before, more), both(after, up_to)
    most, oldest = MOST_EVENTS, MOST_OLDEST
    if limit < _ORDINARY:
        most, oldest = limit, (limit + 1) // 2
    by_room, whole_up_to = _present(index, question, up_to, most, oldest)
    if whole_up_to is None:
        return by_room, both(after, up_to)
    return by_room, end_of_page(after, up_to, whole_up_to)


def _present(
    index: StickyIndex, question: Question, end: Position, most: int, oldest: int
) -> tuple[dict[str, list[str]], int | None]:
    to = (end.stream_id, end.writers, question.now_ms)
    return index.present_by_room(question.room_ids, *to, most, MOST_BYTES, MOST_KEYS, oldest)


async def read_apart(stream: Stream, question: Question, now: Position) -> StickyIndex | None:
    """An index of the question's rooms alone, as the database has them; None if that is too much to
    read."""
    index = StickyIndex("-")
    end = both(question.up_to, now) if question.limit is None else question.up_to
    last = max([end.stream_id, *end.writers.values()])
    left = _MOST_READ
    for portion in portions(question.room_ids):
        after = 0
        while left > 0:
            rows = await stream.rows_in_rooms(
                portion, after=after, up_to=last, now_ms=question.now_ms, limit=_PAGE
            )
            index.insert([row.for_index for row in rows if row.deliverable])
            left -= len(rows)
            if len(rows) < _PAGE:
                break
            after = rows[-1].stream_id
    return index if left > 0 else None


def _together(before: dict[str, list[str]], more: dict[str, list[str]]) -> dict[str, list[str]]:
    found = dict(before)
    for room_id, event_ids in more.items():
        known = {*found.get(room_id, ())}
        found[room_id] = [*found.get(room_id, ()), *(e for e in event_ids if e not in known)]
    return found
