"""What other servers refuse (H7): an ACL that is to be lifted, a room that is blocked there, or a
failure. All of that may pass while the events are sticky.

Synapse's ordinary queue takes an answer with an error for an answer: it sends the event once. So
the event enters Synapse's backlog, and from there becomes a push.
"""

from collections.abc import Collection, Sequence

from synapse_sticky._core import MAX_STICKY_DURATION_MS
from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.handlers.joins.destinations import Destinations
from synapse_sticky.handlers.joins.federation import Federation
from synapse_sticky.handlers.joins.newcomers import Newcomers
from synapse_sticky.handlers.joins.rooms import PushedRooms
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.index import IndexFollower
from synapse_sticky.logs import bounded

logger = bounded(__name__)

MOST_AN_HOUR = 10_000
"""So many pushes an hour begin as an ordinary event was refused: other servers choose what they
refuse. Later refusals of the hour are believed."""

_MOST_NAMED = 200
"""So many events of an answer to /send are read: a transaction has 50."""

_WRITTEN_AT_ONCE = 50
"""No transaction has others wait for long (H1)."""

_BACKOFF = Backoff(1_000, 60_000)


class Refusals:
    """Takes in what destinations answer with an error."""

    def __init__(
        self,
        homeserver: Homeserver,
        follower: IndexFollower,
        federation: Federation,
        pushed: PushedRooms,
        destinations: Destinations,
        newcomers: Newcomers,
    ) -> None:
        self._homeserver = homeserver
        self._follower = follower
        self._federation = federation
        self._pushed = pushed
        self._destinations = destinations
        self._newcomers = newcomers
        self._new: dict[tuple[str, str], int] = {}
        """By destination and room: the lowest stream ID that was refused."""
        self._writing = Retrying(
            homeserver,
            "write_refusals",
            "Could not note what other servers refuse",
            self._write,
            _BACKOFF,
        )
        self._begun = 0
        self._hour_ms = 0

    async def refused(
        self, destination: str, rooms: Collection[str], event_ids: Sequence[str]
    ) -> None:
        """A destination answered a transaction with events of these rooms with an error for these
        events. It returns once that is stored, so that a crash loses none (E4)."""
        rows = await self._follower.rows_of(event_ids[:_MOST_NAMED])
        now_ms, own = self._homeserver.now_ms(), f":{self._homeserver.server_name}"
        by_room: dict[str, dict[str, int]] = {}
        for row in rows.values():
            is_open = row.sender.endswith(own) and row.expires_at_ms > now_ms
            if is_open and row.room_id in rooms:
                by_room.setdefault(row.room_id, {})[row.event_id] = row.stream_id
        for room_id, refused in by_room.items():
            push = self._destinations.find(destination, room_id)
            if push is None:
                self._begin(destination, room_id, min(refused.values()))
                continue
            # A push that is blocked need not know one by one what it has to send later.
            if not push.is_blocked:
                self._pushed.take_in_named(push, [*refused])
                if count := push.refuse([*refused], now_ms):
                    self._homeserver.metrics.pushed("refused", count)
                    logger.info("%s refuses %d events of %s for now", destination, count, room_id)
            for event_id, stream_id in refused.items():
                push.refused(stream_id, event_id)
            self._destinations.look_now(push)
        self._destinations.schedule(destination)
        if self._new:
            await self._writing.run()

    def _begin(self, destination: str, room_id: str, position: int) -> None:
        key = destination, room_id
        if key not in self._new and not self._admits_one():
            logger.warning(
                "Other servers refuse too much: what %s refuses of %s is not sent again",
                destination,
                room_id,
            )
            return
        self._new[key] = min(self._new.get(key, position), position)

    def _admits_one(self) -> bool:
        now_ms = self._homeserver.steady_ms()
        if now_ms - self._hour_ms >= MAX_STICKY_DURATION_MS:
            self._begun, self._hour_ms = 0, now_ms
        self._begun += 1
        return self._begun <= MOST_AN_HOUR

    async def _write(self) -> None:
        while self._new:
            some = [(*key, at) for key, at in [*self._new.items()][:_WRITTEN_AT_ONCE]]
            await self._federation.add_to_backlog(some)
            for destination, room_id, position in some:
                if self._new[destination, room_id] == position:
                    del self._new[destination, room_id]
                logger.info("%s refuses events of %s for now", destination, room_id)
                # Without reading the backlog: an earlier push may just be taken out of it.
                if (push := self._destinations.find(destination, room_id)) is None:
                    self._newcomers.add(destination, room_id, position=position, watch_until_ms=0)
                else:
                    push.reopen_from(position)
                self._destinations.schedule(destination)
                self._federation.wake(destination)
