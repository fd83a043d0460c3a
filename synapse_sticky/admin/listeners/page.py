"""The page for administrators: static files on the listeners for clients (E3)."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twisted.web.http import CACHED
from twisted.web.resource import Resource

from synapse_sticky.admin.listeners.synapse import for_clients, place_of, refuse
from synapse_sticky.homeserver import Homeserver

_FOLDER = Path(__file__).parents[1] / "page"
_FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
    "LICENSES.txt": ("LICENSES.txt", "text/plain; charset=utf-8"),
}
"""By its path below the page's own: the file, and of which kind it is."""

HEADERS = {
    # Nothing comes from elsewhere, nothing inline is run, and no text becomes HTML.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # It is asked for each time whether the file is still the same, so an upgrade is seen at once.
    "Cache-Control": "no-cache",
}


class FileResource(Resource):
    """One file, which was read before.

    Synapse attaches it to all HTTP listeners; those that are not for clients know nothing of it.
    """

    isLeaf = True  # noqa: N815  # Twisted's name

    def __init__(self, homeserver: Homeserver, body: bytes, kind: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Twisted has no types
        self._body = body
        self._kind = kind
        self._etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'.encode()
        self._listens_at = for_clients(homeserver)

    def render(self, request: Any) -> Any:
        """The file; an error in Matrix's form if it is not here (404) or not asked for (405)."""
        if place_of(request) not in self._listens_at or request.postpath:
            return refuse(request, 404)
        if request.method not in (b"GET", b"HEAD"):
            return refuse(request, 405)
        for name, value in HEADERS.items():
            request.setHeader(name, value)
        request.setHeader("Content-Type", self._kind)
        if request.setETag(self._etag) is CACHED:
            return b""
        # Twisted leaves the body out of the answer to HEAD.
        return self._body


def page_resources(homeserver: Homeserver) -> Iterator[tuple[str, FileResource]]:
    """Each file, by its path below the page's own; reads them all.

    Raises:
        OSError: one cannot be read.
    """
    for path, (name, kind) in _FILES.items():
        yield path, FileResource(homeserver, (_FOLDER / name).read_bytes(), kind)
