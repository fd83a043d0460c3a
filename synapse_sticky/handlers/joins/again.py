"""Pushes a room once more to a server that is in it, as an administrator has ordered (E3, P3).

The server is taken for one that has just joined, whatever it has confirmed: it may have lost that
since. Of the processes that send to other servers, the one that sends to this server does it.
"""

from collections.abc import Awaitable, Callable

from synapse_sticky._core import MAX_STICKY_DURATION_MS
from synapse_sticky.apart import each
from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.handlers.joins.destinations import Destinations
from synapse_sticky.handlers.joins.federation import Federation
from synapse_sticky.handlers.joins.newcomers import Newcomers
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.logs import bounded
from synapse_sticky.orders import Orders, PushAgain

logger = bounded(__name__)

_BACKOFF = Backoff(1_000, 60_000)


class PushesAgain:
    """Follows the orders, for the destinations that this process sends to.

    Args:
        end_order: notes that the order of this ID is done.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        orders: Orders,
        end_order: Callable[[str], Awaitable[None]],
        federation: Federation,
        table: NewcomerTable,
        newcomers: Newcomers,
        destinations: Destinations,
    ) -> None:
        self._homeserver = homeserver
        self._orders = orders
        self._end_order = end_order
        self._federation = federation
        self._table = table
        self._newcomers = newcomers
        self._destinations = destinations
        # Begun, while it may not be noted yet: of those in force.
        self._begun: set[str] = set()
        self._following = Retrying(
            *(homeserver, "push_again", "Could not push again what was ordered"),
            *(self._follow, _BACKOFF),
        )

    def begin(self) -> None:
        """Follows the orders from now on. The pushes of an earlier run are loaded."""
        self._orders.on_read(self._look)
        self._look()

    def _look(self) -> None:
        self._begun &= {order.id for order in self._orders.pushes}
        if any(self._federation.handles(order.server) for order in self._orders.pushes):
            self._following.wake()

    async def _follow(self) -> None:
        mine = [order for order in self._orders.pushes if self._federation.handles(order.server)]
        await each(dict.fromkeys(mine), self._do)

    async def _do(self, order: PushAgain) -> None:
        if order.id not in self._begun:
            await self._push(order)
            self._begun.add(order.id)
        # If the process ends before this, the next one pushes once more.
        await self._end_order(order.id)

    async def _push(self, order: PushAgain) -> None:
        server, room_id = order.server, order.room_id
        if not await self._federation.is_there(room_id, server):
            logger.info("%s is not in %s: nothing is pushed (%s)", server, room_id, order.id)
            return
        watch_until_ms = self._homeserver.now_ms() + MAX_STICKY_DURATION_MS
        add_backlog_txn = self._federation.add_backlog_txn
        await self._table.record_again((server, room_id), watch_until_ms, add_backlog_txn)
        logger.info("%s is pushed %s again, as was ordered (%s)", server, room_id, order.id)
        self._newcomers.again(server, room_id, watch_until_ms)
        self._federation.wake(server)
        self._destinations.schedule(server)
