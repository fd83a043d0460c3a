"""The federation whitelist, and the rooms and servers that a new one is about."""

from typing import Any

from synapse_sticky.handlers.joins.whitelist.whitelist import Allowed
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.seams import Attribute, table
from synapse_sticky.homeserver.spec import JOIN, MEMBER

_FEDERATION_CONFIG = "synapse.config.federation.FederationConfig"

SEAMS = (
    Attribute("synapse.config.homeserver.HomeServerConfig", "federation"),
    Attribute(_FEDERATION_CONFIG, "federation_domain_whitelist"),
    table("sticky_events", "room_id text, sender text, expires_at integer"),
    table("current_state_events", "room_id text, type text, state_key text, membership text"),
)


class SynapseWhitelist:
    """Implements ``whitelist.Rooms``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._config: Any = homeserver.hs.config.federation
        find = "strpos" if homeserver.is_postgres else "instr"
        self._server = f"substr(state_key, {find}(state_key, ':') + 1)"

    def whitelist(self) -> Allowed:
        servers = self._config.federation_domain_whitelist
        return None if servers is None else sorted(servers)

    async def rooms_with_own_events(self) -> list[str]:
        here, now_ms = self._homeserver.server_name, self._homeserver.now_ms()

        def read_txn(txn: Cursor) -> list[str]:
            txn.execute(
                "SELECT DISTINCT room_id FROM sticky_events WHERE ? < expires_at AND sender LIKE ?",
                (now_ms, f"%:{here}"),
            )
            return [room_id for (room_id,) in txn.fetchall()]

        return await self._homeserver.transact("rooms_with_own_events", read_txn)

    async def servers_in(self, room_id: str) -> list[str]:
        def read_txn(txn: Cursor) -> list[str]:
            txn.execute(
                f"SELECT DISTINCT {self._server} FROM current_state_events"
                " WHERE room_id = ? AND type = ? AND membership = ?",
                (room_id, MEMBER, JOIN),
            )
            return [server for (server,) in txn.fetchall()]

        return await self._homeserver.transact("servers_in", read_txn)
