"""Transactions of other servers, before Synapse takes them in."""

import functools
import hashlib
import json
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from synapse.api.constants import StickyEvent
from synapse.api.errors import LimitExceededError

from synapse_sticky.adapter import hooks
from synapse_sticky.adapter.listeners import serves
from synapse_sticky.adapter.staging import start_on_staged_events
from synapse_sticky.homeserver import Cursor, ReceivedPdu, Refusal, Transaction

if TYPE_CHECKING:
    from synapse.server import HomeServer

logger = logging.getLogger(__name__)

_FIELD: str = StickyEvent.EVENT_FIELD_NAME
_MOST_PDUS = 50
"""Synapse answers 400 to a transaction of more."""


class SynapseInbound:
    """Implements ``homeserver.Inbound``."""

    def __init__(self, hs: "HomeServer") -> None:
        self._store: Any = hs.get_datastores().main
        self.receives = serves(hs, "federation")
        hooks.method(self._store, "get_received_txn_response", "transaction_id", "origin")
        if self.receives:
            self._server: Any = hs.get_federation_server()
            self._replace = hooks.replace(
                self._server,
                "on_incoming_transaction",
                *("origin", "transaction_id", "destination", "transaction_data"),
            )
            self._clock = hs.get_clock()
            hooks.attribute(self._server, "_active_transactions")
            hooks.attribute(self._server, "_started_handling_of_staged_events")
            hooks.method(self._server, "_handle_old_staged_events")

    def check_transactions(self, check: Callable[[Transaction], Awaitable[Refusal | None]]) -> None:
        original = self._server.on_incoming_transaction

        async def on_incoming_transaction(
            origin: str, transaction_id: str, destination: str, transaction_data: Any
        ) -> Any:
            # One transaction of an origin at a time: Synapse refuses another itself.
            current = self._server._active_transactions.get(origin)
            if current is None or current == transaction_id:
                sticky = sticky_pdus(transaction_data)
            else:
                sticky = []
            if sticky:
                # Synapse does so when the first transaction reaches it. If that is refused for as
                # long as too much is left, it would never begin.
                start_on_staged_events(self._server, self._clock)
                await _raise_if_refused(check, _transaction(origin, transaction_id, sticky))
            return await original(origin, transaction_id, destination, transaction_data)

        self._replace(on_incoming_transaction)

    async def answered(self, origin: str, transaction_id: str) -> bool:
        return await self._store.get_received_txn_response(transaction_id, origin) is not None

    def staged_txn(self, txn: Cursor, origin: str, at_most: int) -> int:
        # Counting is cheap (there is an index by origin), looking into the PDUs is not.
        sql = "SELECT COUNT(*) FROM federation_inbound_events_staging WHERE origin = ?"
        txn.execute(sql, (origin,))
        count = _number(txn)
        if count <= at_most:
            return count
        # The field's name elsewhere in a PDU counts as well: that costs its origin alone.
        txn.execute(f"{sql} AND event_json LIKE ?", (origin, f'%"{_FIELD}"%'))
        return _number(txn)


def sticky_pdus(transaction_data: dict[str, Any]) -> list[dict[str, Any]]:
    """The PDUs with the sticky field. All that a transaction without one costs."""
    pdus = transaction_data.get("pdus")
    if not isinstance(pdus, list) or len(pdus) > _MOST_PDUS:
        return []
    return [pdu for pdu in pdus if isinstance(pdu, dict) and _FIELD in pdu]


async def _raise_if_refused(
    check: Callable[[Transaction], Awaitable[Refusal | None]], transaction: Transaction
) -> None:
    try:
        refusal = await check(transaction)
    except Exception:
        logger.exception("Could not check a transaction of %s, taking it", transaction.origin)
        return
    if refusal is not None:
        raise LimitExceededError(
            f"synapse_sticky_{refusal.limit}", retry_after_ms=refusal.retry_after_ms
        )


def _transaction(origin: str, transaction_id: str, sticky: list[dict[str, Any]]) -> Transaction:
    return Transaction(
        origin,
        transaction_id,
        [
            ReceivedPdu(
                pdu.get("room_id"), pdu.get("sender"), pdu[_FIELD], pdu.get("origin_server_ts")
            )
            for pdu in sticky
        ],
        functools.partial(_fingerprint, sticky),
    )


def _fingerprint(pdus: list[dict[str, Any]]) -> bytes:
    try:
        dumped = json.dumps(pdus, sort_keys=True).encode()
    except RecursionError:
        # Nested almost too deeply to be parsed: not to be known again, but charged all the same.
        dumped = secrets.token_bytes(32)
    return hashlib.sha256(dumped).digest()


def _number(txn: Cursor) -> int:
    row = txn.fetchone()
    return int(row[0]) if row else 0
