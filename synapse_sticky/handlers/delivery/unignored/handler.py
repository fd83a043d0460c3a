"""Who stops ignoring a user gets that user's unexpired sticky events, though the tokens of their
clients are past them (H7, D6).

Synapse keeps only whom a user ignores now. So each change of that is noted in a table, in the same
transaction and with the position that Synapse gives it in the account data. A client's token has
such a position, too: a sync that comes with one from before the change gets these events, and one
from after it does not. That is exact (D4), whichever process answers and whatever was restarted
meanwhile. To give out everything once more, whenever the list has changed, would need no table; but
who begins to ignore a spammer would get all others' events again.

What a user sent before being ignored comes again: only the client knows whether it got that.

Fails open: what cannot be noted or read is not shown again.
"""

from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

from twisted.internet.defer import CancelledError

from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.handlers.delivery.unignored.tables import UnignoredTable
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.layout import NewerLayoutError, migrate
from synapse_sticky.index import Position
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_BACKOFF = Backoff(5_000, 30_000, spread=0)

EventsOf = Callable[
    [Collection[str], Collection[str], Position, Position], Awaitable[dict[str, list[str]]]
]
"""Senders, rooms and two positions of the sticky events stream to the senders' unexpired events
between these, by room. It bounds how many."""

ChangedTxn = Callable[[Cursor, str, int, set[str], set[str]], None]
"""A user who ignores others from a position of the account data on, these others, and those whom
the user does not ignore any more."""


class Ignoring(Protocol):
    """Whom local users ignore, in Synapse's account data."""

    def on_changed(self, changed_txn: ChangedTxn, changed: Callable[[], None]) -> None:
        """From now on calls ``changed_txn`` in each transaction that changes that, and ``changed``
        after it. If the first one fails, the change is made all the same."""

    async def may_have_changed(self, user_id: str, after: int) -> bool:
        """May it have changed after this position? Asks the database seldom."""

    def forget(self, user_id: str) -> None:
        """The next one who asks whom the user ignores is told what the database says."""

    def add_to_sync(self, unignored: "Unignored") -> None:
        """From now on /sync has these events as well."""


class Unignored:
    """What the clients of this process get, and what this process notes."""

    def __init__(
        self,
        homeserver: Homeserver,
        ignoring: Ignoring,
        table: UnignoredTable,
        events_of: EventsOf,
    ) -> None:
        self._homeserver = homeserver
        self._ignoring = ignoring
        self._table = table
        self._events_of = events_of
        self._is_loaded = False
        self._loading = Retrying(
            homeserver,
            "load_unignored",
            f"Could not load {table.duty}, which is off until then",
            self._load,
            _BACKOFF,
            is_said_once=True,
        )

    def install(self, *, serves_clients: bool) -> None:
        """Takes effect once the table is there."""
        self._ignoring.on_changed(self._changed_txn, self._changed)
        if serves_clients:
            self._ignoring.add_to_sync(self)
        self._loading.wake()

    async def _load(self) -> None:
        try:
            await migrate(self._homeserver, self._table)
        except NewerLayoutError as e:
            logger.error("%s is off: %s", self._table.duty, e)
            return
        self._is_loaded = True

    def _changed_txn(
        self, txn: Cursor, user_id: str, position: int, ignored: set[str], unignored: set[str]
    ) -> None:
        if self._is_loaded:
            self._table.note_txn(txn, user_id, position, ignored=ignored, unignored=unignored)

    def _changed(self) -> None:
        if self._is_loaded:
            self._homeserver.in_background("forget_unignored", self._table.forget)

    async def senders(self, user_id: str, after: int | None, up_to: int) -> set[str]:
        """Whom the user has stopped ignoring between these positions of the account data, the
        second one included; None for an hour ago. If that cannot be found out, nobody."""
        if not self._is_loaded:
            return set()
        try:
            if not await self._ignoring.may_have_changed(user_id, after or 0):
                return set()
            senders = await self._table.senders(user_id, after or 0, up_to)
        except CancelledError:
            raise
        except Exception:
            logger.exception("Could not find whom %s does not ignore any more", user_id)
            return set()
        if senders:
            # Another process may have told of the position, and not yet of the change.
            self._ignoring.forget(user_id)
        return senders

    async def events_of(
        self, senders: Collection[str], room_ids: Collection[str], after: Position, up_to: Position
    ) -> dict[str, list[str]]:
        """By room, the senders' events with ``after`` exclusive and ``up_to`` inclusive. If they
        cannot be found, there are none."""
        try:
            return await self._events_of(senders, room_ids, after, up_to) if senders else {}
        except CancelledError:
            raise
        except Exception:
            logger.exception("Could not find the events of whom somebody does not ignore any more")
            return {}
