"""Asking other servers for events: /backfill, /event, and what of their answers is believed."""

import json
import urllib.parse
from collections.abc import Collection, Mapping
from typing import Any

from synapse.api.errors import HttpResponseException, RequestSendFailed
from synapse.events import make_event_from_dict
from synapse.http.client import BodyExceededMaxSize
from synapse.http.matrixfederationclient import JsonParser
from synapse.module_api.errors import SynapseError
from twisted.internet import defer

from synapse_sticky.handlers.joins.confirmation.asking import Answer, AnswerKind, Place
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.database import found_txn, portions
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, attributes, method, table

_TIMEOUT_MS = 10_000
_PREFIX = "/_matrix/federation/v1"
_DENIED = 403  # by the whitelist of this server
_NOT_FOUND = 404
_LIMITED = 429
_HASHED_AT_ONCE = 20
_MOST_REFERRING = 3
_NOT_ROUTED = (_NOT_FOUND, 405, 501)

SEAMS = (
    method(HOMESERVER, "get_federation_http_client() -> MatrixFederationHttpClient"),
    method(
        "synapse.http.matrixfederationclient.MatrixFederationHttpClient",
        "async get_json(destination, /, *, path, args, timeout, ignore_backoff, parser)",
    ),
    *attributes("synapse.http.matrixfederationclient.JsonParser", "MAX_RESPONSE_SIZE"),
    *attributes("synapse.api.errors.RequestSendFailed", "inner_exception", "can_retry"),
    *attributes("synapse.api.errors.HttpResponseException", "response"),
    method(STORE, "async get_room_version(room_id, /) -> RoomVersion"),
    method("synapse.events", "make_event_from_dict(event_dict, /, *, room_version)"),
    table("event_edges", "event_id text, prev_event_id text"),
    table("events", "event_id text, depth integer"),
)


class _OneEvent(JsonParser):
    # JSON may escape a PDU of 64 kB to three times that.
    MAX_RESPONSE_SIZE = 512 * 1024


class _ManyEvents(JsonParser):
    # Parsing holds the reactor, 1 MB for less than 10 ms (H3).
    MAX_RESPONSE_SIZE = 1024 * 1024


class SynapseAsking:
    """Implements ``asking.Asking``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        self._client: Any = homeserver.hs.get_federation_http_client()

    async def has_events(
        self, destination: str, room_id: str, event_ids: Collection[str], limit: int
    ) -> Answer:
        path = f"{_PREFIX}/backfill/{urllib.parse.quote(room_id, safe='')}"
        args = {"v": list(event_ids), "limit": [str(limit)]}
        answer = await self._ask(destination, path, args, _ManyEvents())
        if isinstance(answer, Answer):
            return answer
        room_version = await self._store.get_room_version(room_id)
        found, pdus = set(), answer[:limit]
        for number, pdu in enumerate(pdus):
            if number % _HASHED_AT_ONCE == 0:
                await self._homeserver.give_way()
            found.add(_event_id(pdu, room_version))
        down_to = min(map(_depth, pdus)) if len(pdus) == limit else 0
        return Answer(AnswerKind.SAYS, found, down_to)

    async def has_event(self, destination: str, event_id: str) -> Answer:
        path = f"{_PREFIX}/event/{urllib.parse.quote(event_id, safe='')}"
        answer = await self._ask(destination, path, None, _OneEvent())
        if isinstance(answer, Answer):
            return answer
        if not answer:
            return Answer(AnswerKind.REFUSES, reason="no PDU")
        return Answer(AnswerKind.SAYS, [event_id])

    async def referenced(self, event_ids: Collection[str]) -> set[str]:
        def read_txn(txn: Cursor) -> set[str]:
            select = "SELECT DISTINCT prev_event_id FROM event_edges WHERE"
            return found_txn(self._homeserver, txn, select, "prev_event_id", event_ids)

        return await self._homeserver.transact("referenced", read_txn)

    async def places(self, event_ids: Collection[str]) -> Mapping[str, Place]:
        def read_txn(txn: Cursor) -> dict[str, Place]:
            found = {}
            for portion in portions(event_ids):
                clause, args = self._homeserver.in_list("event_id", portion)
                txn.execute(f"SELECT event_id, depth FROM events WHERE {clause}", args)
                for event_id, depth in txn.fetchall():
                    # Strangers choose how many there are. One that the newcomer has is enough.
                    select = "SELECT event_id FROM event_edges WHERE prev_event_id = ? LIMIT ?"
                    txn.execute(select, (event_id, _MOST_REFERRING))
                    found[event_id] = Place(depth, [one for (one,) in txn.fetchall()])
            return found

        return await self._homeserver.transact("places", read_txn)

    async def _ask(
        self, destination: str, path: str, args: dict[str, list[str]] | None, parser: JsonParser
    ) -> Answer | list[Any]:
        """The PDUs of the answer; an ``Answer`` that says why if it has none."""
        try:
            # With a timeout of its own, Synapse's client does not ask again. A failed question must
            # not back the destination off: then Synapse would send nothing else there either.
            answer = await self._client.get_json(
                destination,
                path=path,
                args=args,
                timeout=_TIMEOUT_MS,
                ignore_backoff=True,
                parser=parser,
            )
        except HttpResponseException as e:
            return _of_error(e, path)
        except RequestSendFailed as e:
            return _of_failure(e)
        except SynapseError as e:
            if e.code != _DENIED:
                raise
            return Answer(AnswerKind.REFUSES, reason="this server may not ask it")
        except RecursionError:
            return Answer(AnswerKind.SILENT, reason="the answer is nested too deeply")
        pdus = answer.get("pdus")
        if not isinstance(pdus, list):
            return Answer(AnswerKind.SILENT, reason="it has no PDUs")
        return pdus


def _event_id(pdu: Any, room_version: Any) -> str:
    """The event ID of a PDU, which is its hash; "" of what is none."""
    try:
        return make_event_from_dict(pdu, room_version=room_version).event_id
    except Exception:
        return ""  # another server may send anything in the place of a PDU


def _depth(pdu: Any) -> int:
    depth = pdu.get("depth") if isinstance(pdu, dict) else None
    return depth if isinstance(depth, int) else 0


def _of_error(error: HttpResponseException, path: str) -> Answer:
    is_of_one = path.startswith(f"{_PREFIX}/event/")
    reason = f"{error.code} to {'/event' if is_of_one else '/backfill'}"
    if error.code == _NOT_FOUND and is_of_one and _is_not_found(error.response):
        return Answer(AnswerKind.LACKS)
    if error.code in _NOT_ROUTED:
        return Answer(AnswerKind.SILENT, reason=reason)
    return Answer(AnswerKind.REFUSES, reason=reason)


def _is_not_found(body: bytes) -> bool:
    """Is it what a homeserver says of an event that it lacks? What Synapse says is ``""``."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return answer == "" or (isinstance(answer, dict) and answer.get("errcode") == "M_NOT_FOUND")


def _of_failure(failure: RequestSendFailed) -> Answer:
    cause = failure.inner_exception
    if isinstance(cause, BodyExceededMaxSize):
        return Answer(AnswerKind.TOO_LARGE)
    if not failure.can_retry:
        # It is no JSON.
        return Answer(AnswerKind.SILENT, reason=f"the answer cannot be understood: {cause!r}"[:200])
    if isinstance(cause, HttpResponseException) and cause.code == _LIMITED:
        return Answer(AnswerKind.LIMITED)
    # A newcomer that answers 5xx, or that is slow, is there, and has lost nothing.
    is_there = isinstance(cause, (HttpResponseException, TimeoutError, defer.TimeoutError))
    return Answer(AnswerKind.BUSY if is_there else AnswerKind.UNREACHABLE)
