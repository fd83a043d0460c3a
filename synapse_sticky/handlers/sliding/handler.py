"""Sliding sync: who joins a room gets all of its unexpired sticky events (D5), page by page.

Sliding sync's ``since`` is one position for all rooms. What lies before it in a room that was
joined later is read beside what is new: the *older* events, from the start of the stream up to
where ``since`` stood at the join. If they do not fit into one response, how far they were read is
stored under the token that goes out with it. That token is a valid position, so Synapse goes on
from it even without the module; it is recognised by naming every writer. Each response has a token
of its own: one that was lost can be asked for again and says the same.

Fails open: as long as there is nowhere to store anything, a response has all of what is older.
"""

import json
from collections.abc import Awaitable, Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

import attr

from synapse_sticky.handlers.sliding.tables import Connection, PageTable
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.index import Position
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_START = Position(0)


class SlidingRequest(Protocol):
    """A request of sliding sync that asks for sticky events."""

    connection: Connection
    room_ids: AbstractSet[str]
    """The rooms that the user is joined to and that the client's lists could match (D2, D8)."""
    limit: int
    """The most events that the client takes."""
    since: Position | None
    """Up to where the client has been told of; None for nothing."""
    up_to: Position
    """Up to where this response may go."""

    async def newly_joined_rooms(self) -> AbstractSet[str]:
        """Rooms that the connection did not have at its last request, so that ``since`` says
        nothing of them."""

    async def read(
        self, room_ids: Collection[str], after: Position, up_to: Position, limit: int | None
    ) -> tuple[int, Position]:
        """Puts these rooms' events into the response, the earliest first, at most ``limit``.

        Gives how many, and up to where it came (at least ``up_to`` if there were not more).
        """


@attr.s(auto_attribs=True, frozen=True, slots=True)
class SlidingPage:
    """What goes out with the events that were read.

    next_batch: the token for the client's next request.
    is_due: whether the client must be told the token at once, even if there is no event with it.
    """

    next_batch: Position
    is_due: bool


class SlidingSync(Protocol):
    """Sliding sync's section of sticky events."""

    writers: Sequence[str]
    """The instances that write to the sticky events stream."""

    def page(self, pager: Callable[[SlidingRequest], Awaitable[SlidingPage]]) -> None:
        """From now on ``pager`` decides what a response has in this section. ``homeserver.access``
        sees to it that its rooms are those that the user is joined to (D8).

        If that fails, the request fails, and nothing is lost to the client, which asks again.
        """


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

    def __init__(self, homeserver: Homeserver, sliding_sync: SlidingSync, pages: PageTable) -> None:
        self._homeserver = homeserver
        self._sliding_sync = sliding_sync
        self._pages = pages
        self._is_loaded = False

    def install(self) -> None:
        """Takes effect from the next sync on."""
        self._sliding_sync.page(self.page)

    async def load(self) -> None:
        """Makes the table of pages.

        Raises:
            NewerLayoutError: a later version of the module made it.
        """
        await migrate(self._homeserver, self._pages)
        self._is_loaded = True

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
        page = token_of_page(reached, self._sliding_sync.writers, request.since)
        if not await self._store(request.connection, page, older):
            await self._read_older(request, older, None)
            return SlidingPage(reached, is_due=was_page)
        return SlidingPage(page, is_due=joined or request.limit > 0)

    async def _begin(self, request: SlidingRequest) -> tuple[Position, list[Older], bool]:
        """Where the new events begin, what a page had no room for, and whether there was one."""
        since = request.since
        if since is None:
            return _START, [], False
        before = position_of_page(since, self._sliding_sync.writers)
        if before is None:
            return since, [], False
        if not self._is_loaded:
            return _START, [], True  # what was left is not known yet: all of it once more
        stored = await self._pages.read(request.connection, _dumped(since))
        if not stored:
            return since, [], False
        left = [part.only(request.room_ids) for part in _loaded_all(stored)]
        return before, [part for part in left if not part.is_read()], True

    async def _store(self, connection: Connection, page: Position, older: Sequence[Older]) -> bool:
        """Stores what is left after the page, if that is possible."""
        if not self._is_loaded:
            return False
        try:
            await self._pages.store(connection, _dumped(page), _dumped_all(older))
        except Exception:
            logger.exception("Could not store what is left, sending all of it")
            return False
        return True

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
