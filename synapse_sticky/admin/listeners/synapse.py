"""The API on Synapse's listeners: for administrators only, on those for clients only."""

import os
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from synapse.http.server import respond_with_json
from synapse.module_api import (
    DirectServeJsonResource,
    Requester,
    SynapseRequest,
    parse_json_object_from_request,
)
from synapse.module_api.errors import Codes, SynapseError
from twisted.web.server import NOT_DONE_YET

from synapse_sticky.admin.requests import Request
from synapse_sticky.admin.throttle import Throttle
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.seams import HOMESERVER, Attribute, attributes, method
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_AUTH = "synapse.api.auth.base.BaseAuth"
_RESOURCE = "synapse.http.server.DirectServeJsonResource"

SEAMS = (
    method(HOMESERVER, "get_auth() -> Auth"),
    method(_AUTH, "async is_server_admin(requester, /) -> bool"),
    method(
        "synapse.http.server",
        "respond_with_json(request, code, json_object, /, *, canonical_json)",
    ),
    method(_RESOURCE, "async _async_render(request)"),
    method(_RESOURCE, "_send_response(request, code, response_object)"),
    *attributes("synapse.config.homeserver.HomeServerConfig", "worker", "server"),
    *attributes("synapse.config.workers.WorkerConfig", "worker_listeners"),
    Attribute("synapse.config.server.ServerConfig", "listeners"),
    *attributes("synapse.config.server.TCPListenerConfig", "http_options", "port"),
    *attributes("synapse.config.server.UnixListenerConfig", "http_options", "path"),
    Attribute("synapse.config.server.HttpListenerConfig", "resources"),
    Attribute("synapse.config.server.HttpResourceConfig", "names"),
)

_CLIENT = "client"
_METHODS = ("GET", "POST", "DELETE")
_LARGEST_BODY = 65_536  # bytes

Answer = Callable[[Request], Awaitable[tuple[int, Any]]]
"""Gives the HTTP status and what is answered as JSON; raises ``SynapseError``."""


class AdminResource(DirectServeJsonResource):
    """Answers everything below the API's path.

    Synapse attaches a module's resource to all of its HTTP listeners. Those for other servers, and
    for the other processes, know nothing of this one.
    """

    isLeaf = True  # noqa: N815  # Twisted's name

    def __init__(self, homeserver: Homeserver, answer: Answer) -> None:
        super().__init__()
        self._api = homeserver.api
        self._auth = homeserver.hs.get_auth()
        self._answer = answer
        self._throttle = Throttle(homeserver.steady_ms)
        self._listens_at = for_clients(homeserver)

    async def _async_render(self, request: Any) -> tuple[int, Any]:
        # What is raised would be answered for any website to read (CORS).
        try:
            return await self._render_or_raise(request)
        except SynapseError as e:
            for name, value in (e.headers or {}).items():
                request.setHeader(name, value)
            return e.code, e.error_dict(None)
        except Exception:
            logger.exception("Could not answer an administrator")
            error = {"errcode": Codes.UNKNOWN, "error": "Internal server error"}
            return HTTPStatus.INTERNAL_SERVER_ERROR, error

    async def _render_or_raise(self, request: Any) -> tuple[int, Any]:
        if place_of(request) not in self._listens_at:
            raise SynapseError(404, "Unrecognized request", Codes.UNRECOGNIZED)
        verb = request.method.decode("ascii", "replace")
        if verb not in _METHODS:
            raise SynapseError(405, "Unrecognized request", Codes.UNRECOGNIZED)
        self._throttle.address(str(getattr(request.getClientAddress(), "host", "")))
        requester = await self._admin(request)
        admin = requester.user.to_string()
        self._throttle.admin(admin)
        return await self._answer(_request_of(request, verb, admin))

    async def _admin(self, request: SynapseRequest) -> Requester:
        """Who asks.

        Raises:
            SynapseError: 401 or 403, if that is nobody who may.
        """
        arguments: Any = request.args
        if b"access_token" in arguments:
            # Proxies log the query.
            problem = "The access token must be in the Authorization header"
            raise SynapseError(401, problem, Codes.MISSING_TOKEN)
        try:
            requester = await self._api.get_user_by_req(request)
        except UnicodeDecodeError:
            raise SynapseError(401, "Unrecognised access token", Codes.UNKNOWN_TOKEN) from None
        # An application service acts for whichever of its users it names.
        if requester.app_service_id is not None or not await self._auth.is_server_admin(requester):
            raise SynapseError(403, "You are not a server admin", Codes.FORBIDDEN)
        return requester

    def _send_response(self, request: SynapseRequest, code: int, response_object: Any) -> None:
        # Without CORS: no website asks this in somebody's browser.
        respond_with_json(request, code, response_object, canonical_json=False)


def refuse(request: Any, code: int) -> int:
    """Answers that there is nothing, or nothing for this method."""
    error = SynapseError(code, "Unrecognized request", Codes.UNRECOGNIZED).error_dict(None)
    respond_with_json(request, code, error, canonical_json=False)
    return NOT_DONE_YET


def _request_of(request: Any, verb: str, admin: str) -> Request:
    try:
        path = [part.decode() for part in request.postpath]
        query = {
            name.decode(): [value.decode() for value in values]
            for name, values in request.args.items()
        }
    except UnicodeDecodeError:
        raise SynapseError(400, "The URL is not UTF-8", Codes.INVALID_PARAM) from None
    body: dict[str, Any] = {}
    if verb == "POST":
        content = request.content
        if content.seek(0, os.SEEK_END) > _LARGEST_BODY:
            raise SynapseError(413, "The body is too large", Codes.TOO_LARGE)
        content.seek(0)
        body = parse_json_object_from_request(request, allow_empty_body=True)
    return Request(verb, path, query, body, admin)


def place_of(request: Any) -> object:
    """Where the listener of the request is: its port, or its path."""
    address: Any = request.getHost()
    if (name := getattr(address, "name", None)) is not None:
        return name.decode("utf-8", "replace") if isinstance(name, bytes) else name
    return address.port


def for_clients(homeserver: Homeserver) -> set[object]:
    """Where this process listens for clients: ports and paths.

    A port that is that of another listener as well, at another address, is none of these.
    """
    config: Any = homeserver.hs.config
    is_main = homeserver.place.is_main
    listeners = config.server.listeners if is_main else config.worker.worker_listeners
    places: dict[object, bool] = {}
    for listener in listeners:
        if listener.http_options is None:
            continue
        names = {name for served in listener.http_options.resources for name in served.names}
        place = getattr(listener, "port", None) or getattr(listener, "path", None)
        places[place] = places.get(place, True) and _CLIENT in names
    return {place for place, is_for_clients in places.items() if is_for_clients}
