"""A room that this server has never seen is known before it is joined (F3, L3).

Synapse drops a PDU before it is staged if it does not know the room's version, and enters the room
only once another server has answered ``/send_join``. From that answer on the servers of the room
send it what is new, and they send that once. So the room is entered before ``/send_join`` is sent,
as Synapse itself does for an invite or a knock. What comes then is staged in every process, and
parked until the room is joined.

Nothing is kept of strangers: a local user joins, and a server of the room has given the version.
The room's row stays if the join fails, as it does after an invite that was rejected.

Fails open: a room that cannot be entered is joined all the same.
"""

from collections.abc import Awaitable, Callable, Collection
from typing import Any

from synapse.module_api import EventBase
from twisted.internet.defer import CancelledError

from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, method, table
from synapse_sticky.homeserver.spec import CREATE
from synapse_sticky.logs import bounded

logger = bounded(__name__)

SEAMS = (
    method(HOMESERVER, "get_federation_client() -> FederationClient"),
    method(
        "synapse.federation.federation_client.FederationClient",
        "async send_join(destinations, pdu, room_version)",
        is_replaced=True,
    ),
    method(STORE, "async maybe_store_room_on_outlier_membership(room_id, room_version)"),
    method(STORE, "async upsert_room_on_join(room_id, *, state_events)", is_replaced=True),
    table("rooms", "room_id text, creator text"),
)


class FirstJoins:
    """Enters rooms before they are joined, in the process that joins rooms."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store

    def install(self) -> None:
        """Takes effect from the next join on, in the main process."""
        if not self._homeserver.place.is_main:
            return
        client = self._homeserver.hs.get_federation_client()
        self._homeserver.replace(client, "send_join", self._entering)
        self._homeserver.replace(self._store, "upsert_room_on_join", self._naming_creator)

    def _entering(self, original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def send_join(
            destinations: Any, pdu: EventBase, room_version: Any, *args: Any, **options: Any
        ) -> Any:
            try:
                await self._store.maybe_store_room_on_outlier_membership(
                    room_id=pdu.room_id, room_version=room_version
                )
            except CancelledError:
                raise
            except Exception:
                logger.exception("Could not enter %s before it is joined", pdu.room_id)
            return await original(destinations, pdu, room_version, *args, **options)

        return send_join

    def _naming_creator(
        self, original: Callable[..., Awaitable[None]]
    ) -> Callable[..., Awaitable[None]]:
        """Synapse leaves the row of a known room without the creator, whom administrators see."""

        async def upsert_room_on_join(
            room_id: str, *args: Any, state_events: Collection[EventBase], **options: Any
        ) -> None:
            await original(room_id, *args, state_events=state_events, **options)
            creators = [e.sender for e in state_events if e.type == CREATE]

            def update_txn(txn: Cursor) -> None:
                txn.execute(
                    "UPDATE rooms SET creator = ? WHERE room_id = ? AND creator = ''",
                    (creators[0], room_id),
                )

            try:
                if creators:
                    await self._homeserver.transact("name_creator", update_txn)
            except CancelledError:
                raise
            except Exception:
                logger.exception("Could not note who made %s", room_id)

        return upsert_room_on_join
