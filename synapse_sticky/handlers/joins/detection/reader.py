"""Which servers newly join which rooms, read from the state changes (P3).

What fails for one room or one newcomer waits by itself, while all others go on. Until it is done,
the stored position stays before it: the next run reads from there.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import attr

from synapse_sticky._core import MAX_STICKY_DURATION_MS
from synapse_sticky.apart import Stragglers, apart
from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.handlers.joins.tables import FORGET_INSTANCE_AFTER_MS, NewcomerTable
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.causes import is_outage
from synapse_sticky.homeserver.database import portions
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_BACKOFF = Backoff(5_000, 60_000)
_STORE_EVERY_MS = 60_000
_STORE_AT_LEAST_EVERY_MS = FORGET_INSTANCE_AFTER_MS // 4
"""A process that starts forgets every other process that has not stored a position for longer than
``FORGET_INSTANCE_AFTER_MS``."""

_STORE_EVERY_POSITIONS = 1_000
"""The position is stored each minute only if it has moved this far. After a restart, what was not
stored is read again. That costs one query, while a write in each minute would cost more."""

_MAX_STRAGGLERS = 1_000
_LARGE = 1_000
"""A room with more changes in a page is read by itself, so that no other waits for it (H1)."""
_MOST_LARGE = 1_000
_RECORDED_AT_ONCE = 50
"""A transaction stores this many newcomers at most, so that no other waits for long (H1)."""
_LOOKED_AT_ONCE = 200
"""Of so many joins it is found out whether they are this process's, before others have their turn
(H3)."""


class ServerJoin(NamedTuple):
    """A server has newly joined a room (P3)."""

    destination: str
    room_id: str


@attr.s(auto_attribs=True, frozen=True, slots=True)
class RoomChanges:
    """What one page has of one room.

    changes: as ``StateChanges`` made them; nobody else looks into them.
    count: how many changes of state these are.
    has_new_acl: whether the room's ACL is among them.
    """

    room_id: str
    changes: Sequence[Any]
    count: int
    has_new_acl: bool = False


class StateChanges(Protocol):
    """The changes of rooms' state, as this process sees them."""

    def state_position(self) -> int:
        """Up to where state changes are visible here (position of the events stream)."""

    def may_have_changed(self, after: int) -> bool:
        """Whether there may be a change of state after this position, among those that are visible
        here. Costs a look into memory."""

    async def page(self, *, after: int, up_to: int) -> tuple[int, list[RoomChanges]]:
        """One page of changes by room, and the position that it reaches to."""

    async def server_joins(
        self, rooms: Sequence[RoomChanges], *, not_before_ms: int
    ) -> list[ServerJoin]:
        """The new joins of servers among the changes.

        A user's join counts if no other user of that server was joined before. Joins that were
        received before ``not_before_ms`` do not count. This server's own joins count, too. Suppose
        that this server left the room after ``not_before_ms`` and has joined it again: then the
        joins that it missed count as well.
        """


class HandledDestinations(Protocol):
    """Which destinations this process sends to."""

    def handles(self, destination: str) -> bool:
        """Does this very process send to the destination?"""

    def add_backlog_txn(self, txn: Cursor, joins: Sequence[tuple[str, str]]) -> None:
        """Enters destinations and rooms into Synapse's own backlog, from its start."""


@attr.s(frozen=True, eq=False, slots=True)
class _Pending:
    """What is still to be done of a page: one room's changes, or one newcomer of a room.

    after: where the page began.
    """

    after: int = attr.ib()
    what: RoomChanges | ServerJoin = attr.ib()

    def __str__(self) -> str:
        joined = f"{self.what.destination} in " if isinstance(self.what, ServerJoin) else ""
        return f"{joined}{self.what.room_id}"


class JoinReader:
    """Reads the state changes from a stored position on, and stores the newcomers."""

    def __init__(
        self,
        homeserver: Homeserver,
        changes: StateChanges,
        destinations: HandledDestinations,
        table: NewcomerTable,
        on_joins: Callable[[Sequence[ServerJoin], Sequence[str], int], None],
    ) -> None:
        """
        Args:
            on_joins: gets joins that this process sends to, the rooms that this server has joined
                or that have another ACL, and until when own events are to be watched for (ms since
                the epoch).
        """
        self._homeserver = homeserver
        self._changes = changes
        self._destinations = destinations
        self._table = table
        self._on_joins = on_joins
        self._position: int | None = None
        self._stored = 0
        self._stored_ms = 0
        self._reading = Retrying(
            *(homeserver, "read_joins", "Could not read who joined"),
            *(homeserver.metrics.timed("joins", "read", self._read), _BACKOFF),
        )
        self._stragglers: Stragglers[_Pending] = Stragglers(
            homeserver,
            "read_joins_of_one",
            "Could not read who joined:",
            self._try_again,
            _BACKOFF,
            _MAX_STRAGGLERS,
        )
        self._large: dict[_Pending, None] = {}
        self._reading_large = Retrying(
            homeserver,
            "read_joins_of_large",
            "Could not read who joined a large room",
            self._read_large,
            _BACKOFF,
        )

    async def stored_position(self) -> int:
        """Where to begin: where an earlier run got to, or the slowest of all processes."""
        return await self._table.state_position(self._changes.state_position())

    def start(self, position: int) -> None:
        """Reads from the position on. Until this is called, a wake-up does nothing."""
        self._position = self._stored = position
        self._stored_ms = self._homeserver.steady_ms()
        self.wake()

    def wake(self) -> None:
        """Reads on if there is something to read; any number may call this at any time."""
        if self._position is None or (up_to := self._changes.state_position()) <= self._position:
            return
        # Most events change no room's state. For these nothing is started.
        if (
            self._reading.is_running
            or self._changes.may_have_changed(self._position)
            or self._is_to_be_stored(up_to)
        ):
            self._reading.wake()
        else:
            self._position = up_to

    def _is_to_be_stored(self, position: int) -> bool:
        is_far = position - self._stored >= _STORE_EVERY_POSITIONS
        since_ms = self._homeserver.steady_ms() - self._stored_ms
        return since_ms > (_STORE_EVERY_MS if is_far else _STORE_AT_LEAST_EVERY_MS)

    async def _read(self) -> None:
        while self._position is not None and (
            (up_to := self._changes.state_position()) > self._position
        ):
            await self._read_page(self._position, up_to)

    async def _read_page(self, after: int, up_to: int) -> None:
        position, rooms = await self._changes.page(after=after, up_to=up_to)
        # A room that fails is not tried at every page.
        stragglers = [pending.what for pending in self._stragglers.items()]
        failing = {what.room_id for what in stragglers if isinstance(what, RoomChanges)}
        waiting = [room for room in rooms if room.room_id in failing]
        rooms = self._put_apart(after, [room for room in rooms if room.room_id not in failing])

        async def take_in(some: Sequence[RoomChanges]) -> None:
            is_all = len(some) == len(rooms) and not waiting
            await self._take_in(some, after, position if is_all else None)

        stuck = await apart(rooms, take_in)
        self._keep_for_retry(after, stuck)
        self._stragglers.add((_Pending(after, room), _StillFailingError()) for room in waiting)
        # Without a join, the position of this process is worth a write now and then only.
        if self._homeserver.steady_ms() - self._stored_ms > _STORE_EVERY_MS:
            await self._record([], self._before_pending(position))
        self._position = position

    def _put_apart(self, after: int, rooms: Sequence[RoomChanges]) -> list[RoomChanges]:
        """Has large rooms read by themselves, one at a time; gives the others."""
        others = []
        known = {(pending.after, pending.what.room_id) for pending in self._large}
        for room in rooms:
            if (after, room.room_id) in known:
                continue  # the page is read once more, as the rest of it failed
            if room.count > _LARGE and len(self._large) < _MOST_LARGE:
                self._large[_Pending(after, room)] = None
                self._reading_large.wake()
            else:
                others.append(room)
        return others

    async def _read_large(self) -> None:
        while self._large:
            pending = next(iter(self._large))
            try:
                await self._try_again(pending)
            except Exception as e:
                if is_outage(e):
                    raise
                self._stragglers.add([(pending, e)])
            del self._large[pending]

    def _keep_for_retry(
        self, after: int, stuck: Iterable[tuple[RoomChanges | ServerJoin, Exception]]
    ) -> None:
        self._stragglers.add((_Pending(after, what), error) for what, error in stuck)

    async def _take_in(
        self, rooms: Sequence[RoomChanges], after: int, position: int | None
    ) -> None:
        """Stores the newcomers among the changes, and with them the position if there is one."""
        # Earlier joins do not matter: what was sent before them has expired by now.
        not_before_ms = self._homeserver.now_ms() - MAX_STICKY_DURATION_MS
        joins = await self._changes.server_joins(rooms, not_before_ms=not_before_ms)
        mine: list[ServerJoin] = []
        for portion in portions(joins, _LOOKED_AT_ONCE):
            mine += [join for join in portion if self._destinations.handles(join.destination)]
            if len(portion) == _LOOKED_AT_ONCE:
                await self._homeserver.give_way()
        here = self._homeserver.server_name
        changed = [join.room_id for join in joins if join.destination == here]
        changed += [room.room_id for room in rooms if room.has_new_acl]

        recorded = 0

        async def record(some: Sequence[ServerJoin]) -> None:
            nonlocal recorded
            is_all = recorded + len(some) == len(mine)
            if position is None or not is_all:
                await self._record(some, self._stored)
            else:
                await self._record(some, self._before_pending(position))
            recorded += len(some)

        stuck = []
        for newcomers in portions(mine, _RECORDED_AT_ONCE):
            stuck += await apart(newcomers, record)
        self._keep_for_retry(after, stuck)
        if changed:
            self._on_joins([], changed, 0)

    async def _record(self, joins: Sequence[ServerJoin], position: int) -> None:
        watch_until_ms = self._homeserver.now_ms() + MAX_STICKY_DURATION_MS
        await self._table.record_joins(
            position,
            [(join.destination, join.room_id) for join in joins],
            watch_until_ms,
            self._destinations.add_backlog_txn,
        )
        self._stored, self._stored_ms = position, self._homeserver.steady_ms()
        self._on_joins(joins, [], watch_until_ms)

    def _before_pending(self, position: int) -> int:
        """The position, or an earlier one that something is pending from."""
        all_pending = chain(self._stragglers.items(), self._large)
        return min((pending.after for pending in all_pending), default=position)

    async def _try_again(self, pending: _Pending) -> None:
        if isinstance(pending.what, ServerJoin):
            await self._record([pending.what], self._stored)
        else:
            await self._take_in([pending.what], pending.after, None)


class _StillFailingError(Exception):
    """Earlier changes of the same room could not be read."""
