"""Newcomers, as they are found: each gets a push. One that was in the room before is pushed what it
lacks since then."""

from collections.abc import Sequence

from synapse_sticky.backoff import Backoff
from synapse_sticky.config import JoinsConfig
from synapse_sticky.handlers.joins.confirmation.confirmation import LATER_MS, Confirmation
from synapse_sticky.handlers.joins.destinations import Destinations
from synapse_sticky.handlers.joins.detection.reader import ServerJoin
from synapse_sticky.handlers.joins.earlier import EarlierPushes
from synapse_sticky.handlers.joins.federation import Federation
from synapse_sticky.handlers.joins.push import Push
from synapse_sticky.handlers.joins.reopening import Reopening
from synapse_sticky.handlers.joins.rooms import PushedRooms
from synapse_sticky.handlers.joins.watch_quota import WatchQuota
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.index import IndexFollower
from synapse_sticky.logs import bounded

logger = bounded(__name__)


class Newcomers:
    """Begins the pushes."""

    def __init__(
        self,
        homeserver: Homeserver,
        follower: IndexFollower,
        federation: Federation,
        rooms: PushedRooms,
        destinations: Destinations,
        confirmation: Confirmation,
        reopening: Reopening,
        config: JoinsConfig,
    ) -> None:
        self._homeserver = homeserver
        self._follower = follower
        self._federation = federation
        self._rooms = rooms
        self._destinations = destinations
        self._confirmation = confirmation
        self._reopening = reopening
        self._backoff = Backoff(config.retry_min_ms, config.retry_max_ms)
        self._earlier = EarlierPushes()
        self._quota = WatchQuota(config.watched)

    def joined(
        self, mine: Sequence[ServerJoin], changed: Sequence[str], watch_until_ms: int
    ) -> None:
        """Servers have newly joined rooms.

        Args:
            mine: joins of servers that this process sends to.
            changed: the rooms that this server has joined, and those with another ACL.
            watch_until_ms: until when own events are watched for (ms since the epoch).
        """
        for join in mine:
            logger.info("%s has newly joined %s", join.destination, join.room_id)
            self._add_newcomer(join.destination, join.room_id, watch_until_ms)
            self._federation.wake(join.destination)
            self._destinations.schedule(join.destination)
        self._reopening.note(changed)

    def _add_newcomer(self, destination: str, room_id: str, watch_until_ms: int) -> None:
        now_ms = self._homeserver.now_ms()
        before = self._destinations.find(destination, room_id)
        if before is not None:
            self._rooms.update(before)
            self.note(before)
        position, not_before_ms = self._earlier.begin(destination, room_id, now_ms)
        push = self.add(destination, room_id, position=0, watch_until_ms=watch_until_ms)
        push.continue_from(position, before, not_before_ms)
        self._destinations.update_times(push)
        # While the index is made anew nobody knows what the newcomer should have.
        last = self._rooms.last_done(push) if self._follower.is_whole else None
        if last and not push.is_believed:
            # It may have lost what it had, and what was under way when it left.
            push.probe = last
            self._confirmation.begin(push, max(not_before_ms - now_ms, LATER_MS))

    def again(self, destination: str, room_id: str, watch_until_ms: int) -> None:
        """The destination is pushed all own sticky events of the room once more, also what it has
        confirmed. As after a join, the next such push has to wait (H3)."""
        now_ms = self._homeserver.now_ms()
        _, not_before_ms = self._earlier.begin(destination, room_id, now_ms)
        push = self.add(destination, room_id, position=0, watch_until_ms=watch_until_ms)
        push.continue_from(0, None, not_before_ms)
        self._destinations.update_times(push)

    def add(self, destination: str, room_id: str, *, position: int, watch_until_ms: int) -> Push:
        """A push of all own events from the position on (of the sticky events stream). It watches
        for new ones until ``watch_until_ms`` (ms since the epoch), unless it is one too many."""
        push = Push(
            destination,
            room_id,
            position=position,
            watch_until_ms=watch_until_ms,
            backoff=self._backoff,
        )
        now_ms = self._homeserver.now_ms()
        before = self._destinations.find(destination, room_id)
        is_watched = before is not None and now_ms < before.watch_until_ms
        is_to_be_watched = not is_watched and now_ms < watch_until_ms
        if is_to_be_watched and not self._quota.admit(room_id, destination, now_ms):
            push.watch_until_ms, push.is_believed = now_ms, True
        self._destinations.add(push)
        return push

    def note(self, push: Push) -> None:
        """Remembers up to where the push is done, in case the newcomer leaves and joins again."""
        now_ms = self._homeserver.now_ms()
        self._earlier.note(push.destination, push.room_id, push.position, now_ms)
