"""Pushes a room to a server once more, as an administrator has ordered (E3, P3)."""

from collections.abc import Callable

from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.handlers.joins.federation import Federation
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.logs import bounded
from synapse_sticky.orders import Orders

logger = bounded(__name__)

_BACKOFF = Backoff(1_000, 60_000)
_MOST_REMEMBERED = 10_000


class Ordered:
    """Follows the orders, for the servers that this process sends to.

    Args:
        reopen: is told of a server whose backlog has grown.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        orders: Orders,
        federation: Federation,
        reopen: Callable[[str], None],
    ) -> None:
        self._orders = orders
        self._federation = federation
        self._reopen = reopen
        # Those that were done, the last ones behind.
        self._done: dict[str, None] = {}
        self._following = Retrying(
            homeserver, "push_again", "Could not push a room once more", self._follow, _BACKOFF
        )

    def begin(self) -> None:
        """Follows the orders from now on."""
        self._orders.on_read(self._look)
        self._look()

    def _look(self) -> None:
        if any(order.id not in self._done for order in self._orders.pushes):
            self._following.wake()

    async def _follow(self) -> None:
        for order in self._orders.pushes:
            if order.id not in self._done:
                await self._push(order.server, order.room_id)
                self._done[order.id] = None
        while len(self._done) > _MOST_REMEMBERED:
            del self._done[next(iter(self._done))]

    async def _push(self, server: str, room_id: str) -> None:
        if not self._federation.handles(server):
            return
        if not await self._federation.is_there(room_id, server):
            logger.warning("%s is not pushed to %s again, as it is not there", room_id, server)
            return
        await self._federation.add_to_backlog([(server, room_id, 0)])
        self._reopen(server)
        self._federation.wake(server)
        logger.info("%s is pushed to %s again", room_id, server)
