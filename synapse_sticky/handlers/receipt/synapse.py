"""Transactions of other servers, before Synapse accepts them."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from synapse.api.constants import StickyEvent
from synapse.module_api.errors import Codes

from synapse_sticky.handlers.receipt.handler import Check, ReceivedPdu, Transaction
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, method, table
from synapse_sticky.homeserver.staged import begin_on_staged_pdus
from synapse_sticky.logs import bounded

logger = bounded(__name__)

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
    table(
        "federation_inbound_events_staging",
        "origin text, event_id text, room_id text, event_json text",
    ),
)

_FIELD: str = StickyEvent.EVENT_FIELD_NAME
_STICKY = f'%"{_FIELD}"%'
"""The field's name elsewhere in a PDU counts as well. That costs its origin alone."""

_MAX_PDUS = 50
"""Synapse answers a transaction of more with 400."""

_TOO_MANY = (
    HTTPStatus.TOO_MANY_REQUESTS,
    {"errcode": Codes.UNKNOWN, "error": "Too many concurrent transactions"},
)
"""What Synapse answers to one of a server while it processes another one of that server."""

_READ_AT_ONCE = 500  # a database takes only so many parameters in a statement
_MOST_KNOWN = 100_000
"""Of so many staged PDUs, about 20 MB, it is remembered whether they are sticky."""


class SynapseReceipt:
    """Implements ``handler.Receipt``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        # The origins of which a transaction is being checked, and those of which Synapse has one.
        self._checked: set[str] = set()
        self._processed: set[str] = set()
        # Of each origin with many staged PDUs, by their event IDs: does it have the sticky field?
        # So each PDU is looked into once. The most recently used origins last. Transactions run in
        # several threads.
        self._known: OrderedDict[str, dict[str, bool]] = OrderedDict()
        self._lock = threading.Lock()

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
                sticky = sticky_pdus(transaction_data)
                # While Synapse processes a transaction of an origin, it processes no other. It
                # refuses one, or answers as it does the first if the IDs are the same.
                if sticky and origin not in self._processed:
                    if origin in self._checked:
                        # Synapse does not know of the first yet, but is not to do the work twice.
                        return _TOO_MANY
                    self._checked.add(origin)
                    try:
                        await self._raise_if_refused(check, origin, transaction_id, sticky)
                    finally:
                        self._checked.remove(origin)
                is_first = origin not in self._processed
                self._processed.add(origin)
                try:
                    return await original(
                        origin, transaction_id, destination, transaction_data, *args, **options
                    )
                finally:
                    if is_first:
                        self._processed.remove(origin)

            return on_incoming_transaction

        server = self._homeserver.hs.get_federation_server()
        self._homeserver.replace(server, "on_incoming_transaction", make)

    async def _raise_if_refused(
        self, check: Check, origin: str, transaction_id: str, sticky: list[dict[str, Any]]
    ) -> None:
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

    def count_staged_txn(self, txn: Cursor, origin: str, at_most: int) -> Mapping[str, int]:
        # There is an index by origin and event ID. To look into a PDU is what costs.
        of_origin = "FROM federation_inbound_events_staging WHERE origin = ?"
        txn.execute(f"SELECT COUNT(*) {of_origin}", (origin,))
        row = txn.fetchone()
        if row is None or row[0] <= at_most:
            with self._lock:
                self._known.pop(origin, None)
            return {}
        txn.execute(f"SELECT event_id, room_id {of_origin}", (origin,))
        staged: dict[str, str] = dict(txn.fetchall())
        with self._lock:
            before = self._known.get(origin, {})
        is_sticky = {event_id: before[event_id] for event_id in staged if event_id in before}
        new = [event_id for event_id in staged if event_id not in before]
        for at in range(0, len(new), _READ_AT_ONCE):
            clause, args = self._homeserver.in_list("event_id", new[at : at + _READ_AT_ONCE])
            txn.execute(
                f"SELECT event_id, event_json LIKE ? {of_origin} AND {clause}",
                (_STICKY, origin, *args),
            )
            is_sticky.update((event_id, bool(found)) for event_id, found in txn.fetchall())
        self._remember(origin, is_sticky)
        return Counter(room_id for event_id, room_id in staged.items() if is_sticky.get(event_id))

    def _remember(self, origin: str, is_sticky: dict[str, bool]) -> None:
        with self._lock:
            self._known[origin] = is_sticky
            self._known.move_to_end(origin)
            while len(self._known) > 1 and sum(map(len, self._known.values())) > _MOST_KNOWN:
                self._known.popitem(last=False)


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
