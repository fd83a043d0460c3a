"""Keeps a process in step with what administrators have ordered (E3)."""

from synapse_sticky.admin.tables import Action, ActionTable
from synapse_sticky.backoff import Alarm, Backoff, Retrying
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.logs import bounded
from synapse_sticky.orders import Orders, PushAgain, Release

logger = bounded(__name__)

EVERY_MS = 5_000
"""An order is known everywhere within ten seconds, also if a reading fails once."""

_PATIENCE_MS = 10_000
_BACKOFF = Backoff(1_000, 60_000)


class Following:
    """Reads the orders again and again, in each process that has to know them."""

    def __init__(self, homeserver: Homeserver, table: ActionTable, orders: Orders) -> None:
        self._homeserver = homeserver
        self._table = table
        self._orders = orders
        self._actions: list[Action] = []
        self._is_made = False
        self._was_read = False
        self._first_read = homeserver.new_signal()
        self._reading = Retrying(
            homeserver,
            "read_actions",
            "Could not read what administrators have ordered",
            self._read,
            _BACKOFF,
            is_said_once=True,
        )
        self._alarm = Alarm(homeserver, "read_actions", self._reading.run)

    async def begin(self) -> None:
        """Makes the table, and reads it from now on.

        What is held is known afterwards: a duty that would release it begins after this. It does
        not wait for long if the table cannot be read.
        """
        if not self._was_read:
            self._reading.wake()
        if not self._was_read:
            await self._first_read.wait(_PATIENCE_MS)

    def look(self) -> None:
        """There is a new order: reads it now, if this process follows the orders. Other processes
        see it later."""
        if self._is_made:
            self._reading.wake()

    async def _read(self) -> None:
        try:
            await self._read_once()
        except Exception:
            # What was read before goes on, but for no longer than was ordered.
            self._set_orders()
            raise
        finally:
            # Nobody waits for the next attempt.
            self._first_read.fire()

    async def _read_once(self) -> None:
        if not self._is_made:
            await migrate(self._homeserver, self._table)
            self._is_made = True
        self._actions = await self._table.in_force()
        self._set_orders()
        self._was_read = True
        self._alarm.ring_in(EVERY_MS)

    def _set_orders(self) -> None:
        now_ms = self._homeserver.now_ms()
        actions = [action for action in self._actions if now_ms < action.until_ms]
        self._orders.set(
            exempt_servers={a.server for a in actions if a.kind == "exempt" and a.server},
            exempt_users={a.sender for a in actions if a.kind == "exempt" and a.sender},
            held_servers={a.server for a in actions if a.kind == "hold" and a.server},
            releases=[_release(a) for a in actions if a.kind in ("release", "discard")],
            pushes=[
                PushAgain(a.action_id, a.server, a.room_id)
                for a in actions
                if a.kind == "push" and a.server and a.room_id
            ],
        )


def _release(action: Action) -> Release:
    of_what = (action.server, action.room_id, action.sender)
    return Release(action.action_id, *of_what, action.kind == "discard", action.made_ms)
