"""Asks the API for administrators."""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, NoReturn
from urllib.parse import quote, urlencode, urlsplit

_PREFIX = "/_synapse/sticky"
_VERSION = "admin/v1"
_PATIENCE_S = 30
_MOST_BYTES = 32 * 1024 * 1024
"""No answer of the API is that long."""

_WHAT_TO_DO = {
    401: "The token is no good any more, or not of this server. Log in anew for another one.",
    403: "The user of this token is no server admin.",
    404: "Is the module there, with the option `admin` on? Is this a listener with the resource"
    " `client`? Reverse proxies usually do not forward this path.",
    429: "Ask less often.",
}


class AskingError(Exception):
    """The API did not answer as it should; says why, and what to do."""


class Client:
    """Asks the API of one homeserver as one administrator.

    Args:
        url: of the homeserver, such as ``http://localhost:8008``. A path in it takes the place of
            ``/_synapse/sticky``.
        token: the access token of a server admin.

    Raises:
        AskingError: the address or the token is none.
    """

    def __init__(self, url: str, token: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise AskingError(f"{url!r} is no address such as http://localhost:8008.")
        if not token.isascii() or not token.isprintable() or " " in token:
            raise AskingError("The token has characters that no token has.")
        path = parts.path.rstrip("/") or _PREFIX
        self._base = f"{parts.scheme}://{parts.netloc}{path}/{_VERSION}"
        self._token = token
        # Whoever is in between would get the token.
        self._opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))

    def get(self, *path: str, **query: object) -> Any:
        """What is there.

        Args:
            path: its parts, as they are.
            query: those that are None are left out.

        Raises:
            AskingError: it is not to be had.
        """
        asked = urlencode({name: value for name, value in query.items() if value is not None})
        return self._ask("GET", path, query=f"?{asked}" if asked else "")

    def post(self, *path: str, **body: object) -> Any:
        """What comes of it.

        Args:
            body: those that are None are left out.

        Raises:
            AskingError: it was refused, or it is not known what came of it.
        """
        return self._ask("POST", path, {k: v for k, v in body.items() if v is not None})

    def delete(self, *path: str) -> Any:
        """What was ended.

        Raises:
            AskingError: it was refused, or it is not known what came of it.
        """
        return self._ask("DELETE", path)

    def _ask(self, method: str, path: Sequence[str], body: object = None, query: str = "") -> Any:
        address = "/".join((self._base, *(quote(part, safe="") for part in path)))
        request = urllib.request.Request(  # noqa: S310  the scheme was checked
            address + query,
            None if body is None else json.dumps(body).encode(),
            {
                "Authorization": f"Bearer {self._token}",
                "Accept": "application/json",
                "Content-Type": "application/json",
            },
            method=method,
        )
        try:
            with self._opener.open(request, timeout=_PATIENCE_S) as response:
                return self._read(response, address)
        except urllib.error.HTTPError as e:
            self._refused(e, address)
        except (OSError, ValueError) as e:
            reason = getattr(e, "reason", e)
            raise AskingError(
                f"{address} cannot be asked: {reason}. Is Synapse running, and is --url right?"
            ) from None

    @staticmethod
    def _read(response: Any, address: str) -> Any:
        body = response.read(_MOST_BYTES)
        try:
            return json.loads(body)
        except ValueError:
            raise AskingError(
                f"{address} did not answer with JSON. Does --url lead to Synapse itself?"
            ) from None

    def _refused(self, e: urllib.error.HTTPError, address: str) -> NoReturn:
        with e:
            try:
                said = json.loads(e.read(_MOST_BYTES))
                text = f"{said['errcode']}: {said['error']}"
            except (OSError, ValueError, TypeError, KeyError):
                text = str(e.reason)
        hint = _WHAT_TO_DO.get(e.code, "")
        # What is found has its own 404.
        if "M_NOT_FOUND" in text:
            hint = ""
        raise AskingError(f"{address} answered {e.code}: {text}. {hint}".strip())


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other that is none."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None
