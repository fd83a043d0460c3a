"""Who is in a room now, and who may get its events: membership, ACLs, erasure."""

from collections.abc import Callable, Collection
from typing import Any

from synapse_sticky.homeserver.process import Cursor, Homeserver
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, method, table
from synapse_sticky.homeserver.spec import JOIN, MEMBER

_STATE = "synapse.storage.controllers.state.StateStorageController"

SEAMS = {
    "members": (
        table("current_state_events", "room_id text, type text, state_key text, membership text"),
    ),
    "servers": (
        method(STORE, "async is_host_joined(room_id, host, /) -> bool"),
        method(HOMESERVER, "get_storage_controllers() -> StorageControllers"),
        Attribute("synapse.storage.controllers.StorageControllers", "state"),
        method(_STATE, "async get_server_acl_for_room(room_id, /) -> ServerAclEvaluator | None"),
        Attribute("synapse.util.caches.descriptors.CachedFunction", "invalidate"),
        Attribute("synapse.synapse_rust.acl.ServerAclEvaluator", "server_matches_acl_event"),
    ),
    "erased": (method(STORE, "async are_users_erased(user_ids, /) -> Mapping"),),
    "users": (method(STORE, "async get_rooms_for_user(user_id, /) -> frozenset"),),
}
"""By what is asked: the members in the database, which servers are joined and allowed by the ACL,
whose data is erased, which rooms a user is joined to."""


class Rooms:
    """Membership as this homeserver knows it now."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store

    async def is_joined(self, room_id: str, server: str) -> bool:
        """Is the server in the room, and not denied by the room's ACL?"""
        return await self.has_member_of(room_id, server) and await self.acl_allows(room_id, server)

    async def is_in_room(self, room_id: str) -> bool:
        """Is this server in the room, by what the database says at this moment?"""
        return await self._has_member_now(room_id, self._homeserver.server_name)

    async def is_user_joined(self, room_id: str, user_id: str) -> bool:
        """Is this local user joined to the room?"""
        return room_id in await self._store.get_rooms_for_user(user_id)

    async def has_member_of(self, room_id: str, server: str) -> bool:
        """Is any user of the server joined to the room?"""
        if "%" in server or "_" in server:  # no valid server name; Synapse would raise
            return False
        # Synapse's cached answer may be from before: a worker is told of a change only after the
        # change itself, and a newcomer that is taken for gone gets nothing any more.
        return await self._store.is_host_joined(room_id, server) or await self._has_member_now(
            room_id, server
        )

    async def _has_member_now(self, room_id: str, server: str) -> bool:
        def read_txn(txn: Cursor) -> bool:
            txn.execute(
                "SELECT 1 FROM current_state_events WHERE room_id = ? AND type = ?"
                " AND membership = ? AND state_key LIKE ? LIMIT 1",
                (room_id, MEMBER, JOIN, f"%:{server}"),
            )
            return txn.fetchone() is not None

        return await self._homeserver.transact("is_joined", read_txn)

    async def acl_allows(self, room_id: str, server: str) -> bool:
        """Does the room's ACL, if there is one, allow the server?"""
        state: Any = self._homeserver.hs.get_storage_controllers().state
        acl = await state.get_server_acl_for_room(room_id)
        return acl is None or acl.server_matches_acl_event(_host_of(server))

    async def acl_now(self, room_id: str) -> Callable[[str], bool]:
        """Which servers the room's ACL allows, by what the database says at this moment."""
        state: Any = self._homeserver.hs.get_storage_controllers().state
        # Synapse forgets the ACL that it knows some time after a change of it.
        state.get_server_acl_for_room.invalidate((room_id,))
        acl = await state.get_server_acl_for_room(room_id)
        return lambda server: acl is None or acl.server_matches_acl_event(_host_of(server))

    async def erased(self, user_ids: Collection[str]) -> set[str]:
        """Those of the users who asked for the erasure of their data (P6)."""
        erased = await self._store.are_users_erased(user_ids)
        return {user_id for user_id in user_ids if erased.get(user_id)}


def _host_of(server: str) -> str:
    """The server's name without its port, as ACLs have it.

    Raises:
        ValueError: the port is no number.
    """
    host, colon, port = server.rpartition(":")
    if not colon or server.endswith("]"):  # an IPv6 address has colons, too
        return server
    int(port)
    return host
