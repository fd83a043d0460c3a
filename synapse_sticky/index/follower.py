"""Keeps the Rust index in step with Synapse's sticky events stream, and says up to where.

The index is a view, never the truth: the follower fills it from the database when the process
starts, and follows the stream from there. Whoever asks more of it than it has taken in must ask
the database.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import chain, islice
from typing import TypeVar

from synapse_sticky._core import StickyIndex
from synapse_sticky.backoff import Alarm, Backoff
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.position import Position
from synapse_sticky.index.doubts import Doubts
from synapse_sticky.index.noted import NotedRows
from synapse_sticky.index.rereads import Rereads
from synapse_sticky.index.stream import StickyRow, Stream
from synapse_sticky.logs import bounded
from synapse_sticky.renewal import Renewed

logger = bounded(__name__)

_PAGE = 500
_EXPIRE_EVERY_MS = 10_000
_BACKOFF = Backoff(1_000, 60_000)
_CATCH_UP_MS = 1_000
_MOST_TRIES = 5
"""How often somebody who waits is woken, as many may wait."""

T = TypeVar("T")

RoomsListener = Callable[[Collection[str]], None]


class IndexFollower:
    """The index of this process, and what keeps it true.

    A failing database only makes the index lag: the follower tries again, and ``in_step`` says so
    meanwhile. An index that panics is made anew from the table.
    """

    def __init__(self, homeserver: Homeserver, stream: Stream) -> None:
        self._hs, server_name = homeserver, homeserver.server_name
        self.stream = stream
        self._index = Renewed(
            homeserver,
            "index",
            lambda on_panic: StickyIndex(server_name, on_panic=on_panic),
            homeserver.metrics.timed("index", "read", self._follow),
            problem="Could not read the sticky events stream",
            backoff=_BACKOFF,
            on_whole=self._tell_of_rooms,
        )
        self._following = self._index.filling
        self._expiry = Alarm(homeserver, "expire", self._expire)
        # The rooms of what was inserted while the index was being made anew.
        self._untold: set[str] = set()
        self._listeners: list[RoomsListener] = []
        self._changed: set[str] = set()
        self._rereads = Rereads()
        self._doubts = Doubts(self.stream, homeserver.give_way)
        self._rechecking: set[str] = set()
        self._progress = homeserver.new_signal()
        self._has_failed = False
        self._noted: NotedRows[StickyRow] = NotedRows()
        self._is_started = False
        # The positions up to which an index was found to have taken in all, and which one it was.
        self._had_all: tuple[StickyIndex | None, Mapping[str, int]] = None, {}

    @property
    def index(self) -> StickyIndex:
        """The present index. Hold it for one call only."""
        return self._index.it

    @property
    def is_whole(self) -> bool:
        """Is the index no emptier than what was read of the stream? Not while it is made anew."""
        return self._index.is_whole

    def start(self) -> None:
        """Begins to fill the index and to follow the stream. Until then the database answers."""
        self.stream.on_persisted(self._noted.note)
        self.stream.on_advance(self._poke)
        self.stream.on_event_changed(self._event_changed)
        self.stream.on_room_purged(self._room_purged)
        self.stream.on_retention_changed(self._retention_changed)
        self.stream.on_user_redacted(self._have_changed)
        self._expiry.ring_in(_EXPIRE_EVERY_MS)
        # What expires by that is over, also if the clock is set back later.
        self._hs.on_clock_set(lambda _: self._expiry.ring_in(0))
        self._is_started = True
        self._poke()

    def on_new_events(self, listener: RoomsListener) -> None:
        """Calls back with the IDs of rooms that have new deliverable sticky events."""
        self._listeners.append(listener)

    def in_step(self) -> bool:
        """Does the index hold all that is visible to this process right now? ``doubts`` says of
        single events whether they may have changed since."""
        return self._is_started and self._is_true_up_to(self.stream.positions())

    def doubts(self, groups: Collection[Collection[str]]) -> bool:
        """May any event of these groups of event IDs have changed since the index took it in?

        It may be redacted or gone. It is looked up; ``catch_up`` waits for that.
        """
        # Each sync with new events asks, so sets do what they can.
        for suspects in (self._changed, self._rechecking):
            if suspects and not suspects.isdisjoint(chain.from_iterable(groups)):
                return True
        if not self._doubts.pairs:
            return False
        return any(map(self._doubts.concern, map(self.index.get, chain.from_iterable(groups))))

    def has_taken_in(self, last_rows: Mapping[str, int]) -> bool:
        """Has the index taken in the rows of each writer up to this stream ID?"""
        positions = self.index.positions()
        # One that writes no more: its rows were read together with those of the others.
        highest = max(positions.values(), default=0)
        return all(at <= positions.get(writer, highest) for writer, at in last_rows.items())

    def holds(self, up_to: Position) -> bool:
        """Does the index hold all there is up to this position? ``doubts`` says of single events
        whether they may have changed since."""
        if not self._is_started:
            return False
        writers = self.stream.writers
        if not up_to.writers:
            return self._is_true_up_to(dict.fromkeys(writers, up_to.stream_id))
        positions = {writer: up_to.of(writer) for writer in writers}
        others = {writer: at for writer, at in up_to.writers.items() if writer not in writers}
        return self._is_true_up_to(positions) and (not others or self.has_taken_in(others))

    async def catch_up(self, find: Callable[[], T | None]) -> T | None:
        """Waits for what is being read until ``find`` finds something: a moment at most, and not
        while the database fails."""
        if not self._is_started:
            return find()
        self._poke()
        following, until_ms = self._following, self._hs.steady_ms() + _CATCH_UP_MS
        found = find()
        for _ in range(_MOST_TRIES):
            left_ms = until_ms - self._hs.steady_ms()
            is_reading = following.is_running and not following.is_failing and not self._has_failed
            if found is not None or not is_reading or left_ms <= 0 or not self.index.positions():
                break
            await self._progress.wait(left_ms)
            found = find()
        return found

    def _is_true_up_to(self, positions: Mapping[str, int]) -> bool:
        return self.is_whole and self._has_all(positions)

    def _has_all(self, positions: Mapping[str, int]) -> bool:
        # Most often nothing has changed since somebody asked.
        index = self._index.it
        if self._had_all[0] is index and self._had_all[1] == positions:
            return True
        if not index.in_step(positions):
            return False
        self._had_all = index, positions
        return True

    async def rows_of(self, event_ids: Collection[str]) -> dict[str, StickyRow]:
        """The deliverable rows of these events by event ID, from the database if need be."""
        found, unknown, doubtful = {}, [], {}
        for event_id in event_ids:
            if (row := self.index.get(event_id)) is None:
                unknown.append(event_id)
            elif self.doubts([[event_id]]):
                doubtful[event_id] = row[0]
            else:
                found[event_id] = StickyRow(row[0], "", row[1], row[2], row[3], row[4], True)
        if self.in_step():
            rows = await self.stream.rows_at(doubtful) if doubtful else []
        else:
            asked = [*unknown, *doubtful]
            rows = await self.stream.rows_of(asked) if asked else []
        found.update({row.event_id: row for row in rows if row.deliverable})
        return found

    def _poke(self) -> None:
        # A tick of any stream comes here, a few for each event: one that brings nothing new starts
        # nothing, and is a matter of five calls.
        if (
            self._following.is_running
            or self._changed
            or self._rereads.due
            or self._doubts.pairs
            or not self._has_all(self.stream.positions())
        ) and not self._take_in_noted():
            self._following.wake()

    def _take_in_noted(self) -> bool:
        """Takes in what is new if this process has persisted all of it: nothing is started, and
        nothing is asked. Gives whether nothing is left to do."""
        following, index = self._following, self.index
        is_busy = following.is_running or following.is_failing
        is_due = self._changed or self._rereads.due or self._doubts.pairs
        if is_busy or is_due or not self.is_whole or not index.positions():
            return False
        positions = self.stream.positions()
        after, up_to = _span(index, positions)
        if (rows := self._noted.all_between(after, up_to)) is None:
            return False
        try:
            self._take_in_rows(index, rows, positions)
        except Exception:
            # It is read from the table instead; what fails there as well is tried again.
            logger.debug("Could not take in %d rows", len(rows), exc_info=True)
            return False
        return True

    def _take_in_rows(
        self, index: StickyIndex, rows: Collection[StickyRow], positions: Mapping[str, int]
    ) -> None:
        """Takes in the last rows up to these positions."""
        self._insert(index, rows)
        for writer, position in positions.items():
            index.advance(writer, position)
        self._noted.drop(max(positions.values(), default=0))

    def _event_changed(self, event_id: str) -> None:
        self._noted.forget_if_noted(event_id)
        # While a page is being read, any event may be in it in its state of before.
        if self._following.is_running or event_id in self.index:
            self._changed.add(event_id)
            self._poke()

    def _room_purged(self, room_id: str) -> None:
        self._have_changed(room_id, "")

    def _retention_changed(self, room_id: str) -> None:
        self._noted.clear()
        self._rereads.add(room_id)
        self._poke()

    def _have_changed(self, room_id: str, user_id: str) -> None:
        self._noted.clear()
        self._doubts.add(room_id, user_id)
        self._poke()

    async def _follow(self) -> None:
        # New rows are taken in between: events may change faster than they are looked up.
        await self._follow_once()
        while self._changed or self._rereads.due or self._doubts.pairs:
            await self._follow_once()

    async def _follow_once(self) -> None:
        before = self.index.positions()
        self._has_failed = False
        try:
            await self._take_in()
            await self._rereads.read(self.stream, self.index, partial(self._insert, self.index))
            # After the page: that may have been read before they changed.
            await self._doubts.look_for(self.index, self._changed)
            await self._recheck()
        except BaseException:
            self._has_failed = True
            raise
        finally:
            if self._has_failed or not self._changed or self.index.positions() != before:
                self._progress.fire()

    async def _take_in(self) -> None:
        positions = self.stream.positions()
        # One and the same all the time: another one that takes its place has none of the rows.
        index = self.index
        if index.in_step(positions):
            return
        after, up_to = _span(index, positions)
        loading = not index.positions()
        while True:
            rows = await self.stream.rows(after=after, up_to=up_to, limit=_PAGE)
            if len(rows) < _PAGE:
                break
            self._insert(index, rows)
            after = rows[-1].stream_id
            if loading:
                logger.info("Loading the sticky events index: %d so far", len(index))
        self._take_in_rows(index, rows, positions)
        if loading:
            logger.info("The sticky events index is filled: %d unexpired events", len(index))

    def _insert(self, index: StickyIndex, rows: Collection[StickyRow]) -> None:
        for row in rows:
            if not row.deliverable:
                index.remove(row.event_id)
        deliverable = [r for r in rows if r.deliverable]
        if not deliverable:
            return
        index.insert([row.for_index for row in deliverable])
        self._untold |= {r.room_id for r in deliverable}
        if self.is_whole:
            self._tell_of_rooms()

    def _tell_of_rooms(self) -> None:
        rooms, self._untold = self._untold, set()
        for listener in self._listeners:
            try:
                listener(rooms)
            except Exception:
                # Neither the index nor another listener waits for it.
                logger.exception("Could not tell of new sticky events in %d rooms", len(rooms))

    async def _recheck(self) -> None:
        """Looks up some of what has changed."""
        # What changes while it is read has to be read once more.
        self._rechecking = set(islice(self._changed, _PAGE))
        self._changed -= self._rechecking
        # No page is being read now: the next one will have what is not here as it is by then.
        known = {e: row[0] for e in self._rechecking if (row := self.index.get(e))}
        try:
            rows = await self.stream.rows_at(known) if known else []
        except Exception:
            self._changed |= self._rechecking
            raise
        for event_id in known.keys() - {row.event_id for row in rows if row.deliverable}:
            self.index.remove(event_id)
        self._rechecking = set()

    async def _expire(self) -> None:
        # Whatever happens now.
        self._expiry.ring_in(_EXPIRE_EVERY_MS)
        self._rereads.tick()
        if self._rereads.due:
            self._poke()
        self._hs.metrics.set("index_rows", len(self.index))
        after, up_to = _span(self.index, self.stream.positions())
        self._hs.metrics.set("index_lag", 0 if self.in_step() else up_to - after)
        if self.index.expire(self._hs.now_ms(), _PAGE) == _PAGE:
            # In small steps, so that a mass expiry does not hold the reactor up.
            self._expiry.ring_in(10)
        self._hs.metrics.set("active_events", len(self.index))


def _span(index: StickyIndex, positions: Mapping[str, int]) -> tuple[int, int]:
    """After which stream ID, and up to which one, there may be rows that the index does not have.

    From the slowest writer's position: rows of the others that are read again are known.
    """
    known = index.positions()
    after = min((known.get(writer, 0) for writer in positions), default=0)
    return after, max(positions.values(), default=0)
