"""Sliding sync: who joins a room gets all of its unexpired sticky events (D5), page by page.

Sliding sync's ``since`` is one position for all rooms. What lies before it in a room that was
joined later is read beside what is new: the *older* events, from the start of the stream up to
where ``since`` stood at the join. If they do not fit into one response, how far they were read is
noted under the token that goes out with it. That token is a valid position, so Synapse goes on
from it even without the module; it is recognised by naming every writer. Each response has a token
of its own: one that was lost can be asked for again and says the same.
"""

import json
import logging
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import attr

from synapse_sticky.homeserver import Homeserver, Position, SlidingPage, SlidingRequest
from synapse_sticky.storage import Storage

logger = logging.getLogger(__name__)

_START = Position(0)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Older:
    """Older events of some rooms that are still to be read: ``after`` exclusive, ``up_to``
    inclusive."""

    room_ids: frozenset[str]
    after: Position
    up_to: Position

    def only(self, room_ids: AbstractSet[str]) -> "Older":
        return attr.evolve(self, room_ids=self.room_ids & room_ids)

    def is_read(self) -> bool:
        """Is there nothing left to read?"""
        return not self.room_ids or self.up_to.is_before_or_at(self.after)


class SlidingHandler:
    """Decides what each response of sliding sync has in its section of sticky events."""

    def __init__(self, homeserver: Homeserver, storage: Storage) -> None:
        self._hs = homeserver
        self._storage = storage

    def start(self) -> None:
        """Takes effect from the next sync on."""
        self._hs.delivery.page_sliding_sync(self.page)

    async def page(self, request: SlidingRequest) -> SlidingPage:
        """Reads what belongs into one response.

        Older and new events share the page evenly: neither a call's history nor a flood of new
        events holds the other up.
        """
        since, older, was_page = await self._begin(request)
        joined = await self._add_joined(request, since, older)
        left = request.limit
        if older:
            older, count = await self._read_older(request, older, (left + 1) // 2)
            left -= count
        count, reached = await request.read(request.room_ids, since, request.up_to, left)
        left -= count
        if older and left > 0:
            older, _ = await self._read_older(request, older, left)
        if not older:
            more = request.limit > 0 and not request.up_to.is_before_or_at(reached)
            return SlidingPage(reached, is_due=was_page or more)
        page = token_of_page(reached, self._hs.stream.writers, request.since)
        try:
            await self._storage.note_page(request.connection, _dumped(page), _dumped_all(older))
        except Exception:
            logger.exception("Could not note what is left, sending all of it")
            await self._read_older(request, older, None)
            return SlidingPage(reached, is_due=was_page)
        return SlidingPage(page, is_due=joined or request.limit > 0)

    async def _begin(self, request: SlidingRequest) -> tuple[Position, list[Older], bool]:
        """Where the new events begin, what a page had no room for, and whether there was one."""
        since = request.since
        if since is None:
            return _START, [], False
        before = position_of_page(since, self._hs.stream.writers)
        noted = before and await self._storage.page(request.connection, _dumped(since))
        if not before or not noted:
            return since, [], False
        left = [part.only(request.room_ids) for part in _loaded_all(noted)]
        return before, [part for part in left if not part.is_read()], True

    @staticmethod
    async def _add_joined(request: SlidingRequest, since: Position, older: list[Older]) -> bool:
        """Adds the rooms that were joined since the last request, if there are any."""
        if since.stream_id == 0:
            return False  # nothing is older, and there could be no token of a page
        joined = await request.newly_joined_rooms() & request.room_ids
        if not joined:
            return False
        left = [part.only(part.room_ids - joined) for part in older]
        older[:] = [part for part in left if not part.is_read()]
        older.append(Older(frozenset(joined), _START, since))
        return True

    @staticmethod
    async def _read_older(
        request: SlidingRequest, older: Sequence[Older], limit: int | None
    ) -> tuple[list[Older], int]:
        """Reads at most so many of them (None: all); gives what is left, and how many were read."""
        left = []
        read = 0
        for part in older:
            at_most = None if limit is None else limit - read
            count, reached = await request.read(part.room_ids, part.after, part.up_to, at_most)
            read += count
            rest = attr.evolve(part, after=reached)
            if not rest.is_read():
                left.append(rest)
        return left, read


def token_of_page(
    position: Position, writers: Sequence[str], previous: Position | None
) -> Position:
    """A position that says the same of every writer, and that ``position_of_page`` recognises.

    It differs from ``previous``, the token that was asked with.
    """
    named = {writer: position.of(writer) for writer in {*writers, *position.writers}}
    below = position.stream_id - 1
    if previous is not None and 0 < previous.stream_id <= below:
        below = previous.stream_id - 1
    return Position(below, named)


def position_of_page(token: Position, writers: Sequence[str]) -> Position | None:
    """What the token of a page stands for; None if it is no such token."""
    # A client can hand anything in, also positions below nothing.
    if not all(w in token.writers and token.writers[w] > token.stream_id for w in writers):
        return None
    stream_id = min(token.writers[writer] for writer in writers)
    return Position(stream_id, {w: at for w, at in token.writers.items() if at > stream_id})


def _dumped(position: Position) -> str:
    return json.dumps([position.stream_id, sorted(position.writers.items())])


def _dumped_all(older: Sequence[Older]) -> str:
    return json.dumps([[sorted(p.room_ids), _dumped(p.after), _dumped(p.up_to)] for p in older])


def _loaded(dumped: str) -> Position:
    stream_id, writers = json.loads(dumped)
    return Position(stream_id, dict(writers))


def _loaded_all(dumped: str) -> list[Older]:
    return [
        Older(frozenset(room_ids), _loaded(after), _loaded(up_to))
        for room_ids, after, up_to in json.loads(dumped)
    ]
