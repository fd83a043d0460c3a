"""What who arrives late is given first: all there is, or the newest of each key (D4, D5).

A call may have had many more events than participants. Whoever reads its events in the order in
which they came in sees who has left long ago, and misses who is there, until the last is read.
"""

from synapse_sticky._core import StickyIndex
from synapse_sticky.handlers.delivery.pages import Answer, Question, both, end_of_page
from synapse_sticky.homeserver.database import portions
from synapse_sticky.homeserver.sections import together
from synapse_sticky.index import Position, Stream

MOST_EVENTS = 1_000
MOST_BYTES = 4_000_000
"""Of the events' JSON."""

MOST_KEYS = 20
"""Of a sender in a room, if not all fits into the response."""

MOST_OLDEST = 50
"""So many of the oldest events come beside the newest of each key."""

_ORDINARY = 100
"""Who asks for this many, as /v3/sync does, leaves it to the server how many there are. Who asks
for fewer gets the oldest first, and each event once."""

_MOST_READ = 10_000
"""Of so many rows at most the database is asked for one response."""

_PAGE = 500
_START = Position(0)


def is_first(question: Question) -> bool:
    """Is it of somebody who has got nothing yet, of these rooms at least, and takes what is given
    first?"""
    is_ordinary = question.limit is None or question.limit >= _ORDINARY
    return is_ordinary and question.after.is_before_or_at(_START)


def first_answer(index: StickyIndex, question: Question, now: Position) -> Answer:
    """The answer to a question that ``is_first``.

    What did not fit comes after the position that it gives, and with it some of this once more.

    Args:
        now: a position that the index holds. /v3/sync asks for all events of the rooms that were
            just joined, up to where the page of the other rooms ends. What is beyond that comes
            later, and the newest of it now as well.
    """
    room_ids, after, up_to, now_ms, limit = question
    if limit is None:
        # Nobody asks for these once more: the client's token is past them. It cannot stay before
        # them, as it has one position for all rooms, and the others would come again.
        before, _, _ = index.events_by_room(
            room_ids, after.stream_id, after.writers, up_to.stream_id, up_to.writers, now_ms, None
        )
        if now.is_before_or_at(up_to):
            return before, both(after, up_to)
        more, _ = _present(index, question, both(up_to, now))
        return together(more, before), both(after, up_to)
    by_room, whole_up_to = _present(index, question, up_to)
    if whole_up_to is None:
        return by_room, both(after, up_to)
    return by_room, end_of_page(after, up_to, whole_up_to)


def _present(
    index: StickyIndex, question: Question, end: Position
) -> tuple[dict[str, list[str]], int | None]:
    to = (end.stream_id, end.writers, question.now_ms)
    most = (MOST_EVENTS, MOST_BYTES, MOST_KEYS, MOST_OLDEST)
    return index.present_by_room(question.room_ids, *to, *most)


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
