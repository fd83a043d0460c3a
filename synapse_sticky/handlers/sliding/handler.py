"""Sliding sync: who joins a room gets all of its unexpired sticky events (D5), page by page.

Sliding sync's ``since`` is one position for all rooms. What lies before it in a room that was
joined later is read beside what is new: the *older* events, from the start of the stream up to
where ``since`` stood at the join.

It is the same with users whom the user ignored, and does not ignore any more (H7): their events
up to ``since`` come at once, beside the page.

Which rooms and users that are, ``since`` alone says, as a client may come back without its ``pos``,
or with another one. A bare position does not say it: the same one may have been given out before a
join, and after it, or in the middle of what was there to be read. So a response that takes a new
room or user into account, or has no room for everything, goes out with the token of a *page*, which
is stored with how far what is older was read and which joins were known. Every bare position past
all that was given out later, so it stands for these joins too, and the pages end there.

The token of a page is a valid position, so Synapse goes on from it even without the module; it is
recognised by naming every writer. Each response has a token of its own: one that was lost can be
asked for again and says the same.

Fails open: as long as there is nowhere to store anything, a response has all of what is older, and
``pos`` says what is new.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import attr

from synapse_sticky.handlers.sliding.pages import (
    Older,
    Page,
    Shown,
    Unshown,
    is_past,
    position_of_page,
    shown_by,
    token_of_page,
)
from synapse_sticky.handlers.sliding.request import MOST_IN_SECTION, SlidingRequest
from synapse_sticky.handlers.sliding.tables import Connection, PageTable
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.index import Position
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_START = Position(0)
_MOST_REMEMBERED = 10_000


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
class Start:
    """Where a response begins.

    position: after which the new events come.
    page: what counts beside that.
    unshown: what the client's token does not stand for yet.
    is_known: whether what is stored says for what it does.
    is_forgotten: whether the token is of a page of which nothing is stored any more.
    """

    position: Position
    page: Page
    unshown: Unshown = Unshown()
    is_known: bool = True
    is_forgotten: bool = False


class SlidingHandler:
    """Decides what each response of sliding sync has in its section of sticky events."""

    def __init__(self, homeserver: Homeserver, sliding_sync: SlidingSync, pages: PageTable) -> None:
        self._homeserver = homeserver
        self._sliding_sync = sliding_sync
        self._pages = pages
        self._is_loaded = False
        self._can_store = False
        # The last token of a connection, and what it stands for. It spares the queries for that.
        self._last: dict[Connection, tuple[Position, Start]] = {}

    def install(self) -> None:
        """Takes effect from the next sync on."""
        self._sliding_sync.page(self._homeserver.metrics.timed("sliding", "sync", self.page))

    async def load(self) -> None:
        """Makes the table of pages.

        Raises:
            NewerLayoutError: a later version of the module made it.
        """
        await migrate(self._homeserver, self._pages)
        self._is_loaded = self._can_store = True

    async def page(self, request: SlidingRequest) -> SlidingPage:
        """Reads what belongs into one response.

        Who has just joined a room gets the present of it beside the rest. Older and new events
        share the page evenly: neither a call's history nor a flood of new events holds the other
        up.
        """
        start = await self._with_unshown(request, await self._start(request))
        has_more = request.limit > 0 and await self._read_of_senders(request, start)
        older: Sequence[Older] = start.page.older
        given, left = 0, request.limit
        joined, present = frozenset[str](), _START
        # Who takes fewer gets the oldest first, and each event once.
        if start.unshown.room_ids and request.limit >= MOST_IN_SECTION:
            joined, older = start.unshown.room_ids, older[:-1]
            given, present = await request.read(joined, _START, request.up_to, left)
            left = max(left - given, left // 2)
        if older:
            older, count = await self._read_older(request, older, (left + 1) // 2)
            left, given = left - count, given + count
        new = request.room_ids - joined
        count, reached = await request.read(new, start.position, request.up_to, left)
        left, given = left - count, given + count
        if older and left > 0:
            older, count = await self._read_older(request, older, left)
            given += count
        # What is not given of these rooms up to here comes page by page; the rest with what is new.
        rest = Older(joined, present, reached)
        older = older if rest.is_read() else [*older, rest]
        if has_more or given or (older and not self._can_store):
            return await self._next(request, start, older, reached)
        # There is nothing to tell, so the client keeps its token; but not that of a page for good.
        if start.is_forgotten and request.limit > 0:
            return SlidingPage(start.position, is_due=True)
        since = request.since
        if since is None:
            return SlidingPage(reached, is_due=False)
        is_shown = request.limit > 0 or not start.unshown
        if not older and is_shown and not start.is_forgotten and start.position is not _START:
            is_known = start.is_known and not start.unshown
            self._remember(request, since, start.page.until, is_known=is_known)
        return SlidingPage(since, is_due=False)

    async def _start(self, request: SlidingRequest) -> Start:
        """Where the new events begin, and what the client's token stands for beside that."""
        since = request.since
        if since is None or since.is_before_or_at(_START):
            return Start(_START, Page(()))
        position = position_of_page(since, self._sliding_sync.writers)
        if not self._is_loaded:
            # What a page has left is not known yet: all of it once more.
            return Start(since if position is None else _START, Page((), request.shown_before))
        token, last = self._last.get(request.connection, (None, None))
        # Another process may have stored the same page anew: ``pos`` says who answered last.
        is_latest = position is None or (last and last.page.shown == request.shown_before)
        if last is not None and token == since and is_latest:
            return last
        shown = None if self._can_store else request.shown_before
        if position is None:
            return Start(since, Page((), shown))
        page = await self._pages.read(request.connection, since)
        if page is None:
            return Start(position, Page((), shown), is_forgotten=True)
        older = [part.only(request.room_ids) for part in page.older]
        left = tuple(part for part in older if not part.is_read())
        return Start(position, Page(left, page.shown or request.shown_before, page.until))

    async def _with_unshown(self, request: SlidingRequest, start: Start) -> Start:
        """Adds what the token does not stand for, if there is anything."""
        since, shown = request.since, start.page.shown
        if since is None or start.position is _START:
            return start  # nothing is older
        unshown = await self._unshown(request, shown)
        if unshown and shown is None and self._can_store:
            shown = shown_by(since, await self._pages.latest(request.connection))
            if shown is not None:
                unshown = await self._unshown(request, shown)
        if not (joined := unshown.room_ids):
            return attr.evolve(start, unshown=unshown)
        left = [part.only(part.room_ids - joined) for part in start.page.older]
        older = [part for part in left if not part.is_read()]
        older.append(Older(joined, _START, start.position))
        page = attr.evolve(start.page, older=tuple(older))
        return attr.evolve(start, page=page, unshown=unshown)

    @staticmethod
    async def _unshown(request: SlidingRequest, after: Shown | None) -> Unshown:
        joined = await request.newly_joined_rooms(after) & request.room_ids
        return Unshown(frozenset(joined), frozenset(await request.unignored_users(after)))

    @staticmethod
    async def _read_of_senders(request: SlidingRequest, start: Start) -> bool:
        """Reads what was kept back of users who were ignored, as far as the client's token is past
        it; gives whether there was any."""
        if not (senders := start.unshown.senders):
            return False
        position, parts = start.position, start.page.older
        others = request.room_ids - frozenset[str]().union(*(part.room_ids for part in parts))
        # What is still to be read of a room comes with that.
        spans = [(others, _START, position)]
        spans += [(part.room_ids, _START, part.after) for part in parts]
        spans += [(part.room_ids, part.up_to, position) for part in parts]
        counts = [
            await request.read_of(senders, room_ids, after, up_to)
            for room_ids, after, up_to in spans
            if room_ids and not up_to.is_before_or_at(after)
        ]
        return any(counts)

    async def _next(
        self, request: SlidingRequest, start: Start, older: Sequence[Older], reached: Position
    ) -> SlidingPage:
        """The token that goes out with events, of a page if a bare position would not do."""
        unshown = start.unshown
        if start.position is _START and self._is_loaded:
            unshown = await self._unshown(request, None)
        up_to = reached if request.up_to.is_before_or_at(reached) else request.up_to
        until = up_to if unshown or not start.is_known else start.page.until
        is_due = bool(start.page.older)
        if not older and is_past(reached, until):
            self._remember(request, reached, None)
            more = not request.up_to.is_before_or_at(reached)
            return SlidingPage(reached, is_due=is_due or more)
        token = token_of_page(reached, self._sliding_sync.writers, request.since)
        page = Page(tuple(older), request.shown, up_to)
        if await self._store(request.connection, token, page):
            if not older:
                self._remember(request, token, up_to)
            return SlidingPage(token, is_due=True)
        await self._read_older(request, older, None)
        return SlidingPage(reached, is_due=is_due)

    async def _store(self, connection: Connection, token: Position, page: Page) -> bool:
        """Stores what counts for the response after this one, if that is possible."""
        if not self._is_loaded:
            return False
        try:
            await self._pages.store(connection, token, page)
        except Exception:
            logger.exception("Could not store what is left, sending all of it")
            self._can_store = False
            return False
        self._can_store = True
        return True

    def _remember(
        self,
        request: SlidingRequest,
        token: Position,
        until: Position | None,
        *,
        is_known: bool = True,
    ) -> None:
        """The token stands for what this response took into account."""
        self._last.pop(request.connection, None)
        if not self._can_store:
            return
        position = position_of_page(token, self._sliding_sync.writers) or token
        start = Start(position, Page((), request.shown, until), is_known=is_known)
        self._last[request.connection] = token, start
        if len(self._last) > _MOST_REMEMBERED:
            del self._last[next(iter(self._last))]

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
