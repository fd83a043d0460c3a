"""Transactions of other servers, before Synapse accepts them."""

import json
from collections.abc import Awaitable, Callable, Collection, Sequence
from http import HTTPStatus
from typing import Any

from synapse.api.constants import StickyEvent
from synapse.module_api import EventBase
from synapse.module_api.errors import Codes

from synapse_sticky._core import sticky_until_ms
from synapse_sticky.handlers.receipt.handler import Check, ReceivedPdu, Transaction
from synapse_sticky.handlers.receipt.staged import Page, StickyPdu
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.database import portions
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, method, table
from synapse_sticky.homeserver.spec import LONGEST_NAME
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
    method(STORE, "async insert_received_event_to_staging(origin, event)", is_replaced=True),
    table(
        "federation_inbound_events_staging",
        "origin text, event_id text, room_id text, received_ts integer, event_json text",
    ),
)

_FIELD: str = StickyEvent.EVENT_FIELD_NAME
_MAX_PDUS = 50
"""Synapse answers a transaction of more with 400."""

_TOO_MANY = (
    HTTPStatus.TOO_MANY_REQUESTS,
    {"errcode": Codes.UNKNOWN, "error": "Too many concurrent transactions"},
)
"""What Synapse answers to one of a server while it processes another one of that server."""

_PARSED_AT_ONCE = 50  # each is of 200 kB at most
_STAGED = "FROM federation_inbound_events_staging WHERE origin = ?"
_SIZE_ON_SQLITE = "LENGTH(CAST(event_id AS BLOB))"
_MOST_BYTES = 4 * LONGEST_NAME


class SynapseReceipt:
    """Implements ``handler.Receipt``. There is an index by origin and event ID."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        # The origins of which a transaction is being checked, and those of which Synapse has one.
        self._checked: set[str] = set()
        self._processed: set[str] = set()

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
        if "\0" in transaction_id:
            return False  # Postgres cannot even be asked: Synapse answers with an error
        return await self._store.get_received_txn_response(transaction_id, origin) is not None

    def tell_staged(self, staged: Callable[[str, StickyPdu], None]) -> None:
        def make(original: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
            async def insert_sticky(
                origin: str, event: EventBase, *args: Any, **options: Any
            ) -> Any:
                result = await original(origin, event, *args, **options)
                # It is staged, whatever fails here.
                try:
                    field, now_ms = event.get(_FIELD), self._homeserver.now_ms()
                    until_ms = sticky_until_ms(field, event.origin_server_ts, now_ms)
                    staged(origin, StickyPdu(event.event_id, event.room_id, until_ms or 0))
                except Exception:
                    logger.exception("Could not count the staged PDU %s", event.event_id)
                return result

            def insert_received_event_to_staging(
                origin: str, event: EventBase, *args: Any, **options: Any
            ) -> Awaitable[Any]:
                insert = original if event.sticky_duration() is None else insert_sticky
                return insert(origin, event, *args, **options)

            return insert_received_event_to_staging

        self._homeserver.replace(self._store, "insert_received_event_to_staging", make)

    # Reading

    def has_more_txn(self, txn: Cursor, origin: str, at_most: int) -> bool:
        # In the order of the index, or Postgres may read the whole table.
        txn.execute(
            f"SELECT COUNT(*) FROM (SELECT event_id {_STAGED} ORDER BY event_id LIMIT ?) AS first",
            (origin, at_most + 1),
        )
        row = txn.fetchone()
        return row is not None and row[0] > at_most

    def page_txn(self, txn: Cursor, origin: str, after_event_id: str, most: int) -> Page:
        size = "OCTET_LENGTH(event_id)" if self._homeserver.is_postgres else _SIZE_ON_SQLITE
        of_page = f"{_STAGED} AND event_id > ? ORDER BY event_id LIMIT"
        txn.execute(
            f"SELECT CASE WHEN {size} <= {_MOST_BYTES} THEN event_id END {of_page} ?",
            (origin, after_event_id, most),
        )
        found = [event_id for (event_id,) in txn.fetchall()]
        last = found[-1] if found else ""
        if last is None:
            txn.execute(
                f"SELECT event_id {of_page} 1 OFFSET ?", (origin, after_event_id, len(found) - 1)
            )
            row = txn.fetchone()
            last = row[0] if row else ""
        known = [e for e in found if e is not None and len(e) <= LONGEST_NAME]
        return Page(known, last, len(found))

    def staged_txn(self, txn: Cursor, origin: str, event_ids: Sequence[str]) -> Collection[str]:
        clause, args = self._homeserver.in_list("event_id", event_ids)
        txn.execute(f"SELECT event_id {_STAGED} AND {clause}", (origin, *args))
        return {event_id for (event_id,) in txn.fetchall()}

    def pdus_txn(self, txn: Cursor, origin: str, event_ids: Sequence[str]) -> Sequence[StickyPdu]:
        found = []
        for portion in portions(event_ids, _PARSED_AT_ONCE):
            clause, args = self._homeserver.in_list("event_id", portion)
            txn.execute(
                f"SELECT event_id, room_id, received_ts, event_json {_STAGED} AND {clause}",
                (origin, *args),
            )
            found += [_staged_pdu_of(*row) for row in txn.fetchall()]
        return found


def _staged_pdu_of(event_id: str, room_id: str, received_ts_ms: int, event_json: str) -> StickyPdu:
    until_ms = None
    if _FIELD in event_json:
        pdu = json.loads(event_json)
        until_ms = sticky_until_ms(pdu.get(_FIELD), pdu.get("origin_server_ts"), received_ts_ms)
    return StickyPdu(event_id, room_id, until_ms or 0)


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
