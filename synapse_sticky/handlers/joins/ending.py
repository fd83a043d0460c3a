"""When a push ends: everything is there, all has expired, or its destination has left."""

from typing import TYPE_CHECKING

from synapse_sticky._core import MAX_STICKY_DURATION_MS
from synapse_sticky.handlers.joins.destinations import Destinations
from synapse_sticky.handlers.joins.federation import Federation
from synapse_sticky.handlers.joins.newcomers import Newcomers
from synapse_sticky.handlers.joins.push import Push
from synapse_sticky.handlers.joins.rooms import PushedRooms
from synapse_sticky.handlers.joins.tables import Newcomer, NewcomerTable
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.index import IndexFollower
from synapse_sticky.logs import bounded

if TYPE_CHECKING:
    from synapse_sticky.homeserver.rooms import Rooms

logger = bounded(__name__)


class Ending:
    """Ends pushes, or holds them for now."""

    def __init__(
        self,
        homeserver: Homeserver,
        rooms: "Rooms",
        follower: IndexFollower,
        federation: Federation,
        table: NewcomerTable,
        pushed: PushedRooms,
        destinations: Destinations,
        newcomers: Newcomers,
    ) -> None:
        self._homeserver = homeserver
        self._rooms = rooms
        self._follower = follower
        self._federation = federation
        self._table = table
        self._pushed = pushed
        self._destinations = destinations
        self._newcomers = newcomers

    async def settle(self, push: Push) -> None:
        """Nothing is due. The push ends unless there is something to watch for."""
        now_ms = self._homeserver.now_ms()
        if (
            push.is_dirty(now_ms)
            or not self._follower.in_step()
            or not self._follower.has_taken_in(push.last_rows)
        ):
            return  # the index may yet bring something, or the database has to be asked again
        is_asked = push.named or (push.is_back and now_ms < push.stored_watch_until_ms)
        if is_asked and self._pushed.last_done(push, 1):
            return  # the newcomer may yet say that it lacks something that is still sticky
        watched = now_ms < push.watch_until_ms
        if push.expired_count:
            logger.info(
                "%s did not take %d own sticky events of %s while they were sticky",
                push.destination,
                push.expired_count,
                push.room_id,
            )
        if push.delivered_count:
            logger.info(
                "%s has the %d own sticky events of %s",
                push.destination,
                push.delivered_count,
                push.room_id,
            )
        push.settle()
        self._newcomers.note(push)
        try:
            await self._end(push, still_watched=watched)
        except Exception:
            push.is_settled = False  # its row does not say so
            raise

    async def _end(self, push: Push, *, still_watched: bool) -> None:
        if not self._destinations.is_current(push):
            return  # the server has joined anew meanwhile
        dirty_marks = push.dirty_marks
        newcomer = Newcomer(
            push.destination, push.room_id, push.position, push.stored_watch_until_ms
        )
        await self._table.settle(
            newcomer,
            still_watched=still_watched,
            clear_backlog_txn=self._federation.clear_backlog_txn,
        )
        # If the write fails, the push is still there, and it is written again.
        is_as_written = self._destinations.is_current(push) and push.dirty_marks == dirty_marks
        if is_as_written and not still_watched:
            self._destinations.remove(push)

    async def hold(self, push: Push) -> None:
        """Nothing may be sent now. That ends the push if its destination has left. This server may
        come back, and an ACL may be put right, while the events are sticky (H7)."""
        here, room_id = self._homeserver.server_name, push.room_id
        is_here = await self._rooms.is_in_room(room_id)
        if is_here and not await self._federation.is_there(room_id, push.destination):
            logger.info("%s may not get events of %s now", push.destination, room_id)
            await self._end(push, still_watched=False)
        elif not push.is_blocked:
            if is_here and await self._rooms.acl_allows(room_id, here):
                logger.info("%s may not get events of %s now", push.destination, room_id)
            else:
                logger.info("%s may not send in %s now", here, room_id)
            push.is_blocked = True

    async def end_expired(self, destination: str) -> None:
        """Ends pushes whose events have all expired. No batch would end them, as Synapse asks for
        none while the destination cannot be reached."""
        now_ms = self._homeserver.now_ms()
        for push in self._destinations.all_due(destination):
            left_ms = 0 if push.is_blocked else MAX_STICKY_DURATION_MS
            if push.watch_until_ms < now_ms - left_ms:
                await self._destinations.apart(push, self._end_if_expired)

    async def _end_if_expired(self, push: Push) -> None:
        if push.is_blocked and self._pushed.has_own_events(push):
            return  # nothing is read of them before they may be sent
        await self._pushed.ask_if_dirty(push)
        self._pushed.update(push)
        if not push.is_open:
            await self.settle(push)
