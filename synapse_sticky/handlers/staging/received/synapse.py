"""How Synapse enters sticky events: this says since when they are."""

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from synapse.module_api import EventBase, LoggingTransaction
from synapse.replication.http.federation import ReplicationFederationSendEventsRestServlet

from synapse_sticky.handlers.staging.received.handler import Tell
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.causes import Cause
from synapse_sticky.homeserver.database import portions
from synapse_sticky.homeserver.process import replace_shared
from synapse_sticky.homeserver.received import Received
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, method, table
from synapse_sticky.homeserver.spec import LONGEST_NAME
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_EVENT_HANDLER = "synapse.handlers.federation_event.FederationEventHandler"
_PERSISTING = "synapse.replication.http.federation.ReplicationFederationSendEventsRestServlet"

SEAMS = (
    method(HOMESERVER, "get_federation_event_handler() -> FederationEventHandler"),
    method(_EVENT_HANDLER, "async on_receive_pdu(origin, pdu)", is_replaced=True),
    method(_EVENT_HANDLER, "async _process_pulled_events(origin, events)", is_replaced=True),
    method(
        _PERSISTING,
        "async _serialize_payload(*, store, event_and_contexts) -> dict",
        is_replaced=True,
    ),
    method(STORE, "insert_sticky_events_txn(txn, events)", is_replaced=True),
    table("federation_inbound_events_staging", "origin text, event_id text, received_ts integer"),
)

_RECEIVED = "org.matrix.msc4354.synapse_sticky.received_ts"
"""The field of what a process hands to an event persister: when each event was received."""

_ENTRY = "_synapse_sticky_received"
"""Functions that all homeservers of a process share find what is noted for one of them by this."""


class SynapseReceiving:
    """Implements ``handler.Receiving``."""

    def __init__(self, homeserver: Homeserver, received: Received) -> None:
        self._homeserver = homeserver
        self._received = received

    def tell(self, tell: Tell) -> None:
        def make_pushed(original: Callable[..., Awaitable[None]]) -> Callable[..., Any]:
            async def receive_later(
                asked: Awaitable[None], origin: str, pdu: EventBase, *args: Any, **options: Any
            ) -> None:
                await asked
                await original(origin, pdu, *args, **options)

            def on_receive_pdu(
                origin: str, pdu: EventBase, *args: Any, **options: Any
            ) -> Awaitable[None]:
                if (asked := self._told(tell, origin, [pdu])) is None:
                    return original(origin, pdu, *args, **options)
                return receive_later(asked, origin, pdu, *args, **options)

            return on_receive_pdu

        def make_pulled(original: Callable[..., Any]) -> Callable[..., Any]:
            async def _process_pulled_events(
                origin: str, events: Collection[EventBase], *args: Any, **options: Any
            ) -> None:
                if (asked := self._told(tell, origin, events)) is not None:
                    await asked
                await original(origin, events, *args, **options)

            return _process_pulled_events

        handler: Any = self._homeserver.hs.get_federation_event_handler()
        store = self._homeserver.store
        self._homeserver.replace(handler, "on_receive_pdu", make_pushed)
        self._homeserver.replace(handler, "_process_pulled_events", make_pulled)
        self._homeserver.replace(store, "insert_sticky_events_txn", self._inserting)
        self._homeserver.enter(store, _ENTRY, self._received)
        self._homeserver.enter(handler, _ENTRY, self._received)
        persisting = ReplicationFederationSendEventsRestServlet
        replace_shared(persisting, "_serialize_payload", _handing_on_received)

    @staticmethod
    def _told(tell: Tell, origin: str, events: Iterable[EventBase]) -> Awaitable[None] | None:
        sticky = [event.event_id for event in events if event.sticky_duration() is not None]
        # Postgres can be asked for no text with NUL in it.
        event_ids = [e for e in sticky if len(e) <= LONGEST_NAME and "\0" not in e]
        return tell(origin, event_ids) if event_ids else None

    def staged_txn(self, txn: Cursor, origin: str, event_ids: Collection[str]) -> Mapping[str, int]:
        found: dict[str, int] = {}
        for portion in portions(event_ids):
            # There is an index by both.
            clause, args = self._homeserver.in_list("event_id", portion)
            txn.execute(
                "SELECT event_id, received_ts FROM federation_inbound_events_staging"
                f" WHERE origin = ? AND {clause}",
                (origin, *args),
            )
            found.update(txn.fetchall())
        return found

    # Entering

    def _inserting(self, original: Callable[..., None]) -> Callable[..., None]:
        def insert_sticky_events_txn(
            txn: LoggingTransaction, events: list[EventBase], *args: Any, **options: Any
        ) -> None:
            original(txn, self._since_receipt_txn(txn, events), *args, **options)

        return insert_sticky_events_txn

    def _since_receipt_txn(self, txn: Cursor, events: Sequence[EventBase]) -> list[Any]:
        """The events, but those that were received before their sender claims to have sent them as
        if they had been sent then: Synapse would enter them for too long."""
        try:
            sticky = [e for e in events if e.sticky_duration() is not None and not self._is_own(e)]
            if not sticky:
                return [*events]
            self._received.learn_txn(txn, [event.event_id for event in sticky])
            received_ms = {e.event_id: self._received.at_ms(e.event_id) for e in sticky}
            return [_since(event, received_ms.get(event.event_id)) for event in events]
        except Exception as e:
            if Cause.of_database(e) is not None:
                raise  # the transaction is no good any more, and Synapse may try it again
            logger.exception("Could not find out when %d events were received", len(events))
            return [*events]

    def _is_own(self, event: EventBase) -> bool:
        return event.sender.partition(":")[2] == self._homeserver.server_name


class _Earlier:
    """An event that was sent earlier than it says. All else of it is as it is."""

    def __init__(self, event: EventBase, sent_ms: int) -> None:
        self._event = event
        self.origin_server_ts = sent_ms

    def __getattr__(self, name: str) -> Any:
        return getattr(self._event, name)


def _since(event: EventBase, received_ms: int | None) -> Any:
    if received_ms is None or event.origin_server_ts <= received_ms:
        return event
    return _Earlier(event, received_ms)


def _handing_on_received(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the process that received events: tells the event persister when that was."""

    async def _serialize_payload(
        *, store: Any, event_and_contexts: Sequence[Any], **options: Any
    ) -> dict[str, Any]:
        payload: dict[str, Any] = await original(
            store=store, event_and_contexts=event_and_contexts, **options
        )
        received: Received | None = getattr(store, _ENTRY, None)
        if received is not None:
            known = {e.event_id: received.at_ms(e.event_id) for e, _ in event_and_contexts}
            handed_on = {event_id: ms for event_id, ms in known.items() if ms is not None}
            if handed_on:
                payload[_RECEIVED] = handed_on
        return payload

    return _serialize_payload


def note_handed_on(handler: Any, content: Any) -> None:
    """In an event persister: notes what it is told.

    Args:
        handler: the homeserver's handler of events from other servers.
        content: the request.
    """
    received: Received | None = getattr(handler, _ENTRY, None)
    handed_on = {} if received is None else content.get(_RECEIVED)
    if received is not None and isinstance(handed_on, dict):
        for event_id, at_ms in handed_on.items():
            received.note(event_id, at_ms)
