"""The sections of sticky events in /sync and sliding sync (D1 to D8), out of the index.

Fails open: what the index cannot answer, the database does.
"""

from collections.abc import Collection

from synapse_sticky.homeserver import Homeserver, Position
from synapse_sticky.index import IndexFollower


class DeliveryHandler:
    """Answers what Synapse would ask its database at every sync of every user."""

    def __init__(self, homeserver: Homeserver, follower: IndexFollower) -> None:
        self._hs = homeserver
        self._follower = follower

    def start(self) -> None:
        """Takes effect from the next sync on."""
        self._hs.delivery.answer_from(self.answer, self._follower.catch_up)

    def answer(
        self,
        room_ids: Collection[str],
        after: Position,
        up_to: Position,
        now_ms: int,
        limit: int | None,
    ) -> tuple[dict[str, list[str]], int, int | None] | None:
        """See ``homeserver.DeliverySource``."""
        if not self._follower.holds(up_to):
            return None
        return self._follower.index.events_by_room(
            room_ids,
            after.stream_id,
            after.writers,
            up_to.stream_id,
            up_to.writers,
            now_ms,
            limit,
        )
