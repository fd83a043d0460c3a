"""A server that newly joins a room gets all own unexpired sticky events of it (P3, P7, F3).

``detection`` reads newcomers from the state changes. Each is pushed to through Synapse's own
backlog of sticky events, in portions that fit a newcomer's staging area; ``push`` does the
bookkeeping. An event counts as delivered once the newcomer has acknowledged it by ID. Where
``joins.confirm`` is on, ``confirmation`` must also have found that the newcomer has it. Synapse's
backlog also has events that a destination missed while it could not be reached. They are pushed in
the same way.

Fails open: if the module cannot say what to send, Synapse's own selection does. If the push of one
room fails, it is left alone for a while, and the others go on.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

from synapse_sticky.config import JoinsConfig
from synapse_sticky.handlers.joins.again import PushesAgain
from synapse_sticky.handlers.joins.confirmation.asking import Asking
from synapse_sticky.handlers.joins.confirmation.confirmation import Confirmation
from synapse_sticky.handlers.joins.destinations import Destinations
from synapse_sticky.handlers.joins.detection.reader import JoinReader, StateChanges
from synapse_sticky.handlers.joins.ending import Ending
from synapse_sticky.handlers.joins.federation import Batch, Federation, LeftToSynapseError
from synapse_sticky.handlers.joins.grace import Grace
from synapse_sticky.handlers.joins.newcomers import Newcomers
from synapse_sticky.handlers.joins.purged import PurgedRooms
from synapse_sticky.handlers.joins.push import Push
from synapse_sticky.handlers.joins.reached import Reached
from synapse_sticky.handlers.joins.refusals import Refusals
from synapse_sticky.handlers.joins.reopening import Reopening
from synapse_sticky.handlers.joins.rooms import PushedRooms
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.index import IndexFollower
from synapse_sticky.logs import bounded
from synapse_sticky.orders import Orders

if TYPE_CHECKING:
    from synapse_sticky.homeserver.rooms import Rooms

logger = bounded(__name__)

_STEP = 20
"""After this many pushes, whatever else is due has its turn (H3)."""


class JoinsHandler:
    """Pushes own sticky events to newcomers, for the destinations that this process sends to."""

    def __init__(
        self,
        homeserver: Homeserver,
        rooms: "Rooms",
        follower: IndexFollower,
        federation: Federation,
        asking: Asking,
        changes: StateChanges,
        table: NewcomerTable,
        config: JoinsConfig,
        orders: Orders,
        end_order: Callable[[str], Awaitable[None]],
    ) -> None:
        """
        Args:
            orders: of administrators.
            end_order: notes that the order of this ID is done.
        """
        self._homeserver = homeserver
        self._rooms = rooms
        self._follower = follower
        self._federation = federation
        self._table = table
        self._pushed = PushedRooms(homeserver, follower, config.window)
        self._destinations = Destinations(
            homeserver, self._pushed, check=self._check, wake=self._wake
        )
        self._grace = Grace(homeserver, self._pushed, self._look_after_grace)
        self._confirmation = Confirmation(
            homeserver,
            asking,
            is_on=config.confirm,
            find=self._destinations.find,
            retry_at_ms=federation.retry_at_ms,
            servers=lambda room_id: follower.index.server_count(room_id, homeserver.now_ms()),
            done=self._pushed.last_done,
            update=self._pushed.update,
            on_progress=self._progressed,
            on_end=self._asking_ended,
        )
        reopening = Reopening(
            homeserver, rooms, federation, self._pushed, self._destinations, self._confirmation
        )
        self._newcomers = Newcomers(
            homeserver,
            follower,
            federation,
            self._pushed,
            self._destinations,
            self._confirmation,
            reopening,
            config,
        )
        self._refusals = Refusals(
            homeserver, follower, federation, self._pushed, self._destinations, self._newcomers
        )
        self._ending = Ending(
            *(homeserver, rooms, follower, federation, table),
            *(self._pushed, self._destinations, self._newcomers),
        )
        self._reached = Reached(homeserver, federation, self._destinations, self._confirmation)
        self._reader = JoinReader(homeserver, changes, federation, table, self._newcomers.joined)
        self._again = PushesAgain(
            *(homeserver, orders, end_order, federation),
            *(table, self._newcomers, self._destinations),
        )
        self._purged = PurgedRooms(homeserver, rooms, self._pushed, self._destinations, table)
        timed = homeserver.metrics.timed
        self._take_in = timed("joins", "acknowledged", self._take_in_acknowledged)
        self._is_loaded = False
        self._is_starting = True
        self._early: dict[str, None] = {}
        """Those that Synapse asked for before the first load had ended."""

    def install(self) -> None:
        """Takes effect once the newcomers of an earlier run are loaded."""
        timed = self._homeserver.metrics.timed
        self._federation.serve_backlog_from(timed("joins", "push", self.next_batch))
        self._federation.on_acknowledged(self._acknowledged)
        self._federation.on_refused(self._refusals.refused)
        self._federation.on_reachable(self._reached.note)
        self._federation.on_skipped(self._skipped)
        self._federation.on_catch_up_recorded(self._catch_up_recorded)
        self._follower.on_new_events(self._new_events)
        self._follower.stream.on_advance(self._reader.wake)
        self._follower.stream.on_room_purged(self._purged.note)

    async def load(self) -> None:
        """Takes up what an earlier run left, then follows the state changes.

        Raises:
            NewerLayoutError: a later version of the module made the tables.
        """
        try:
            await self._load()
        finally:
            self._is_starting = False
            early, self._early = self._early, {}
            for number, destination in enumerate(early, 1):
                self._federation.wake(destination)
                if number % _STEP == 0:
                    await self._homeserver.give_way()

    async def _load(self) -> None:
        await migrate(self._homeserver, self._table)
        # The position is read first. Another process may store a join before the newcomers are
        # read: then this process finds it twice. In the other order it would miss the join.
        position = await self._reader.stored_position()
        for newcomer in await self._table.newcomers():
            if self._federation.handles(newcomer.destination):
                self._newcomers.add(
                    newcomer.destination,
                    newcomer.room_id,
                    position=newcomer.position,
                    watch_until_ms=newcomer.watch_until_ms,
                )
        self._is_loaded = True
        self._reader.start(position)
        self._again.begin()
        for number, destination in enumerate(self._destinations.names(), 1):
            self._destinations.schedule(destination)
            if number % _STEP == 0:
                await self._homeserver.give_way()

    # Sending

    async def next_batch(self, destination: str, limit: int) -> Batch | None:
        """The next own sticky events for the destination, at most ``limit``; None if there are
        none for now. Synapse calls it whenever it is the backlog's turn.

        Raises:
            LeftToSynapseError: what an earlier run left could not be loaded, or all rooms fail:
                Synapse itself has to select.
        """
        if not self._is_loaded and self._is_starting:
            # Synapse's own selection knows of no ACL.
            self._early[destination] = None
            return None
        if not self._is_loaded or not self._follower.is_whole:
            raise LeftToSynapseError
        await self._adopt(destination)
        try:
            for number, push in enumerate(self._destinations.in_turn(destination), 1):
                batch = await self._destinations.apart(push, partial(self._batch_of, limit=limit))
                if batch is not None:
                    self._destinations.look_now(push)
                    self._destinations.check_soon(destination)
                    return batch
                self._destinations.looked_in_vain(push)
                if number % _STEP == 0:
                    await self._homeserver.give_way()
        finally:
            self._destinations.schedule(destination)
        # If only some rooms fail, they wait: Synapse's own selection would also resend what is
        # under way in the other rooms.
        if self._destinations.all_fail(destination):
            raise LeftToSynapseError
        return None

    async def _adopt(self, destination: str) -> None:
        """Takes over what Synapse's backlog of the destination has, once and after it has grown."""
        if not self._destinations.has_backlog(destination):
            return
        self._destinations.note_backlog(destination, has_backlog=False)
        try:
            backlog = await self._federation.backlog(destination)
        except Exception:
            self._destinations.note_backlog(destination, has_backlog=True)
            raise
        for room_id, position in backlog:
            push = self._destinations.find(destination, room_id)
            if push is None:
                self._newcomers.add(destination, room_id, position=position, watch_until_ms=0)
            elif position < push.backlog_position:
                push.reopen_from(position)
                self._destinations.look_now(push)

    async def _batch_of(self, push: Push, limit: int) -> Batch | None:
        if not push.is_blocked:
            await self._pushed.ask_if_dirty(push)
        if not await self._federation.may_receive(push.room_id, push.destination):
            await self._ending.hold(push)
            return None
        if push.is_blocked:
            push.is_blocked = False
            await self._pushed.ask_if_dirty(push)
        self._pushed.update(push)
        if not push.is_open and push.restart_if_lost():
            logger.info("%s pruned events of %s, sending all again", push.destination, push.room_id)
            self._pushed.update(push)
        if not push.is_open:
            await self._ending.settle(push)
            return None
        # What is redacted, or of an erased user (P6), is left out by what the database has: this
        # process may not know yet, and a newcomer keeps the first copy that it gets (S5).
        while planned := push.next_events(limit, self._homeserver.now_ms()):
            rows = await self._follower.stream.rows_at(planned)
            whole = {row.event_id for row in rows if row.deliverable}
            push.skip((at, event_id) for event_id, at in planned.items() if event_id not in whole)
            # In its order: the rows have none.
            if event_ids := push.send(planned, self._homeserver.now_ms()):
                resent = push.count_resent(event_ids)
                self._homeserver.metrics.pushed("sent", len(event_ids) - resent)
                self._homeserver.metrics.pushed("resent", resent)
                return Batch(push.room_id, push.backlog_position - 1, event_ids)
        return None

    # What happens meanwhile

    async def _check(self, destination: str) -> int:
        await self._ending.end_expired(destination)
        return await self._federation.retry_at_ms(destination)

    async def _wake(self, destination: str) -> None:
        self._federation.wake(destination)
        # While a destination cannot be reached, Synapse asks for no batch. As long as a push is
        # dirty, each new event is due at once. So the database is asked here: from then on new
        # events are left to the ordinary queue.
        for number, push in enumerate(self._destinations.all_due(destination), 1):
            if push.is_dirty(self._homeserver.now_ms()) and not push.is_blocked:
                await self._destinations.apart(push, self._pushed.ask_if_dirty)
                self._destinations.update_times(push)
            if number % _STEP == 0:
                await self._homeserver.give_way()

    def _skipped(self, destination: str) -> None:
        """Synapse skipped events to the destination, and entered them into its backlog. The
        ordinary queue may have left out any event up to now, so the pushes are dirty."""
        self._destinations.skipped(destination)

    def _catch_up_recorded(self, destination: str) -> None:
        if self._destinations.recorded(destination):
            self._destinations.schedule(destination)

    def _new_events(self, rooms: Collection[str]) -> None:
        """Synapse's ordinary queue sends new events first. Pushes are looked at after its time."""
        self._grace.begin(self._pushed.with_new(rooms))

    def _look_after_grace(self, push: Push) -> bool:
        """Has the push take in new events; gives whether that took some work. A push that has
        something to send already takes them in when Synapse next asks for a batch."""
        if push.is_blocked or self._destinations.is_behind(push):
            self._pushed.note_behind(push)
            return False
        if not self._pushed.may_lack(push):
            return False
        self._pushed.update(push)
        self._destinations.look_now(push)
        self._destinations.schedule(push.destination)
        return True

    async def _acknowledged(self, destination: str, events: Sequence[tuple[str, str]]) -> None:
        # Every event comes by here, once for each server that acknowledges it.
        if self._destinations.is_known(destination):
            await self._take_in(destination, events)

    async def _take_in_acknowledged(
        self, destination: str, events: Sequence[tuple[str, str]]
    ) -> None:
        now_ms = self._homeserver.now_ms()
        by_room: dict[str, list[str]] = {}
        for room_id, event_id in events:
            by_room.setdefault(room_id, []).append(event_id)
        for room_id, event_ids in by_room.items():
            if (push := self._destinations.find(destination, room_id)) is None:
                continue
            self._pushed.take_in_named(push, event_ids)
            if count := sum(push.acknowledge(event_id, now_ms) for event_id in event_ids):
                self._homeserver.metrics.pushed("acknowledged", count)
                self._confirmation.begin(push)
            self._destinations.acknowledged(push)
            self._destinations.look_now(push)
        self._destinations.schedule(destination)

    def _progressed(self, push: Push) -> None:
        self._destinations.look_now(push)
        self._federation.wake(push.destination)

    def _asking_ended(self, push: Push) -> None:
        self._destinations.check_soon(push.destination)
        self._destinations.look_now(push)
        self._destinations.schedule(push.destination)
