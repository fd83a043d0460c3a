"""``GET rooms/{room_id}/events``: what is sticky in a room, or waits (E3)."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from synapse_sticky.admin.facts import Parked, Table
from synapse_sticky.admin.requests import Request, identifier, not_found, wrong
from synapse_sticky.admin.way import limit_of
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.layout import versions_txn

_NOT_RECORDED = "not recorded"
_KINDS = ("active", "deferred", "parked")
"""In this order the pages go through them."""


class Deferred(Protocol):
    """A deferred event."""

    @property
    def event_id(self) -> str: ...
    @property
    def sender(self) -> str: ...
    @property
    def limit(self) -> str | None: ...
    @property
    def deferred_ms(self) -> int | None: ...
    @property
    def expires_at_ms(self) -> int: ...


class DeferredOfRoom(Table, Protocol):
    """The deferred events."""

    def of_room_txn(
        self, txn: Cursor, room_id: str, after: str, limit: int, /
    ) -> Sequence[Deferred]: ...


class ParkedOfRoom(Table, Protocol):
    """The parked PDUs."""

    def of_room_txn(
        self, txn: Cursor, room_id: str, after: str, limit: int, /
    ) -> Sequence[tuple[str, str | None, str | None, Parked]]: ...


class Active(Protocol):
    """What Synapse has of sticky events."""

    def active_txn(
        self, txn: Cursor, room_id: str, after: int | None, limit: int
    ) -> list[tuple[int, dict[str, Any]]]: ...
    def types_txn(self, txn: Cursor, event_ids: Collection[str]) -> Mapping[str, str]: ...


class Known(Protocol):
    """The rooms that this server knows."""

    def is_known_txn(self, txn: Cursor, room_id: str) -> bool: ...


class RoomEvents:
    """Lists the events of one room."""

    def __init__(
        self,
        homeserver: Homeserver,
        known: Known,
        active: Active,
        deferred: DeferredOfRoom,
        parked: ParkedOfRoom,
    ) -> None:
        self._homeserver = homeserver
        self._known = known
        self._active = active
        self._deferred = deferred
        self._parked = parked

    async def get(self, request: Request) -> dict[str, Any]:
        """The answer. Raises ``SynapseError``: 400 for a wrong parameter, 404 for a room that this
        server does not know."""
        request.only("from", "limit")
        room_id, limit = identifier("room_id", request.path[1]), request.limit()
        kind, after = _place_of(request)

        def read_txn(txn: Cursor) -> tuple[list[dict[str, Any]], str | None]:
            if not self._known.is_known_txn(txn, room_id):
                raise not_found("This server does not know the room")
            return self._page_txn(txn, room_id, kind, after, limit)

        found, after_it = await self._homeserver.transact("admin_room", read_txn)
        answer = {"room_id": room_id, "now_ms": self._homeserver.now_ms(), "events": found}
        return {**answer, **({"next": after_it} if after_it is not None else {})}

    def _page_txn(
        self, txn: Cursor, room_id: str, kind: str, after: str, limit: int
    ) -> tuple[list[dict[str, Any]], str | None]:
        versions = versions_txn(txn, is_postgres=self._homeserver.is_postgres)
        found: list[dict[str, Any]] = []
        for this in _KINDS[_KINDS.index(kind) :]:
            left, start = limit - len(found), after if this == kind else ""
            if left <= 0:
                return found, f"{this}~{start}"
            table = {"deferred": self._deferred, "parked": self._parked}.get(this)
            if table is not None and versions.get(table.duty, 0) < table.layout:
                continue
            rows, last = self._of_kind_txn(txn, room_id, this, start, left)
            found += rows
            # A page of parked PDUs is shorter.
            if last is not None:
                return found, f"{this}~{last}"
        return found, None

    def _of_kind_txn(
        self, txn: Cursor, room_id: str, kind: str, after: str, limit: int
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Events of a kind, and after which there may be more; None if there are none."""
        if kind == "active":
            active = self._active.active_txn(txn, room_id, int(after) if after else None, limit)
            is_full = len(active) >= limit
            return [event for _, event in active], str(active[-1][0]) if is_full else None
        if kind == "deferred":
            deferred = self._deferred.of_room_txn(txn, room_id, after, limit)
            types = self._active.types_txn(txn, [event.event_id for event in deferred])
            entries = [_deferred(event, types.get(event.event_id)) for event in deferred]
            return entries, deferred[-1].event_id if len(deferred) >= limit else None
        parked = self._parked.of_room_txn(txn, room_id, after, limit)
        return [_parked(*pdu) for pdu in parked], parked[-1][0] if parked else None


def _deferred(event: Deferred, kind: str | None) -> dict[str, Any]:
    why = _NOT_RECORDED if event.limit is None else limit_of(event.limit)
    return {
        "event_id": event.event_id,
        "sender": event.sender,
        "type": kind,
        "state": "deferred",
        "why": why,
        "since_ms": event.deferred_ms,
        "ends_ms": event.expires_at_ms,
    }


def _parked(event_id: str, sender: str | None, kind: str | None, pdu: Parked) -> dict[str, Any]:
    return {
        "event_id": event_id,
        "sender": sender,
        "type": kind,
        "state": "parked",
        "why": pdu.why or _NOT_RECORDED,
        "since_ms": pdu.received_ms,
        "ends_ms": pdu.until_ms,
    }


def _place_of(request: Request) -> tuple[str, str]:
    """The kind to begin with, and after which of it."""
    token = request.token()
    if token is None:
        return _KINDS[0], ""
    kind, tilde, after = token.partition("~")
    if not tilde or kind not in _KINDS or (kind == "active" and not _is_position(after)):
        raise wrong("'from' must be the 'next' of an answer")
    return kind, after


def _is_position(text: str) -> bool:
    digits = text.removeprefix("-")
    is_number = digits.isascii() and digits.isdecimal() and len(digits) <= 19
    return not text or (is_number and -(2**63) <= int(text) < 2**63)
