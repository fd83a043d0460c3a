"""Transactions of other servers, before Synapse accepts them."""

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from synapse.api.constants import StickyEvent

from synapse_sticky.handlers.receipt.handler import Check, ReceivedPdu, Transaction
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, method, table
from synapse_sticky.homeserver.staged import begin_on_staged_pdus

logger = logging.getLogger(__name__)

SEAMS = (
    method(HOMESERVER, "get_federation_server() -> FederationServer"),
    method(
        "synapse.federation.federation_server.FederationServer",
        "async on_incoming_transaction(origin, transaction_id, destination, transaction_data) "
        "-> tuple[_, _]",
        is_replaced=True,
    ),
    method(
        STORE, "async get_received_txn_response(transaction_id, origin, /) -> tuple[_, _] | None"
    ),
    table("federation_inbound_events_staging", "origin text, room_id text, event_json text"),
)

_FIELD: str = StickyEvent.EVENT_FIELD_NAME
_STICKY = f'%"{_FIELD}"%'
"""The field's name elsewhere in a PDU counts as well. That costs its origin alone."""

_MAX_PDUS = 50
"""Synapse answers a transaction of more with 400."""


class SynapseReceipt:
    """Implements ``handler.Receipt``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        # The transaction of each origin that Synapse processes, by its ID.
        self._processed: dict[str, str] = {}

    def check_transactions(self, check: Check) -> None:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            async def on_incoming_transaction(
                origin: str,
                transaction_id: str,
                destination: str,
                transaction_data: dict[str, Any],
                *args: Any,
                **options: Any,
            ) -> Any:
                # Synapse processes one transaction of an origin at a time. It refuses others.
                if self._processed.get(origin, transaction_id) == transaction_id:
                    await self._raise_if_refused(check, origin, transaction_id, transaction_data)
                is_first = origin not in self._processed
                if is_first:
                    self._processed[origin] = transaction_id
                try:
                    return await original(
                        origin, transaction_id, destination, transaction_data, *args, **options
                    )
                finally:
                    if is_first:
                        del self._processed[origin]

            return on_incoming_transaction

        server = self._homeserver.hs.get_federation_server()
        self._homeserver.replace(server, "on_incoming_transaction", make)

    async def _raise_if_refused(
        self, check: Check, origin: str, transaction_id: str, transaction_data: dict[str, Any]
    ) -> None:
        sticky = sticky_pdus(transaction_data)
        if not sticky:
            return
        # Synapse does so when the first transaction reaches it. If all are refused for as long as
        # too many PDUs are staged, none ever would.
        begin_on_staged_pdus(self._homeserver)
        try:
            refusal = await check(transaction_of(origin, transaction_id, sticky))
        except Exception:
            logger.exception("Could not check a transaction of %s, accepting it", origin)
            return
        if refusal is not None:
            raise refusal.error()

    async def is_answered(self, origin: str, transaction_id: str) -> bool:
        return await self._store.get_received_txn_response(transaction_id, origin) is not None

    def count_staged_txn(self, txn: Cursor, origin: str, at_most: int) -> int:
        # Counting is cheap, as there is an index by origin. Looking into the PDUs is not.
        sql = "SELECT COUNT(*) FROM federation_inbound_events_staging WHERE origin = ?"
        txn.execute(sql, (origin,))
        count = _number(txn)
        if count <= at_most:
            return count
        txn.execute(f"{sql} AND event_json LIKE ?", (origin, _STICKY))
        return _number(txn)

    def count_staged_in_rooms_txn(
        self, txn: Cursor, origin: str, room_ids: Collection[str], from_count: int
    ) -> Mapping[str, int]:
        of_rooms, args = self._homeserver.in_list("room_id", room_ids)
        sql = (
            "SELECT room_id, COUNT(*) FROM federation_inbound_events_staging"
            f" WHERE origin = ? AND {of_rooms}%s GROUP BY room_id HAVING COUNT(*) >= ?"
        )
        # Most often there is none, which it takes no look into the PDUs to see.
        txn.execute(sql % "", (origin, *args, from_count))
        if not txn.fetchall():
            return {}
        txn.execute(sql % " AND event_json LIKE ?", (origin, *args, _STICKY, from_count))
        return {room_id: int(count) for room_id, count in txn.fetchall()}


def sticky_pdus(transaction_data: dict[str, Any]) -> list[dict[str, Any]]:
    """The PDUs with the sticky field. This is all that a transaction without one costs."""
    pdus = transaction_data.get("pdus")
    if not isinstance(pdus, list) or len(pdus) > _MAX_PDUS:
        return []
    return [pdu for pdu in pdus if isinstance(pdu, dict) and _FIELD in pdu]


def transaction_of(origin: str, transaction_id: str, sticky: list[dict[str, Any]]) -> Transaction:
    """The transaction in this project's words."""
    pdus = [
        ReceivedPdu(pdu.get("room_id"), pdu.get("sender"), pdu[_FIELD], pdu.get("origin_server_ts"))
        for pdu in sticky
    ]
    return Transaction(origin, transaction_id, pdus, received=sticky)


def _number(txn: Cursor) -> int:
    row = txn.fetchone()
    return int(row[0]) if row else 0
