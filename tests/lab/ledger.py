"""What a homeserver was sent and asked by others, and endpoints that it does not route."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import attr
from synapse.federation.transport.server.federation import FEDERATION_SERVLET_CLASSES
from synapse.module_api import ModuleApi

from tests.lab.homeserver import Homeserver

_FILE = "ledger.txt"
_ANSWERED = re.compile(
    r"\{(?P<origin>[^}]*)\} Processed request.*B (?P<code>\d{3})!? "
    r'"(?P<method>GET|POST) /_matrix/federation/v\d/(?P<path>\S+) HTTP'
)
_ASKED = ("event/", "backfill/", "get_missing_events/")


class Ledger:
    """A module for the homeserver: it notes each PDU that comes in by its content hash.

    ``unrouted`` in its configuration has the paths (``/event/``) of endpoints that are not there,
    as behind a reverse proxy that does not route them.
    """

    def __init__(self, config: dict[str, Any], api: ModuleApi) -> None:
        for servlet in FEDERATION_SERVLET_CLASSES:
            if servlet.PATH.startswith(tuple(config.get("unrouted", ()))):
                servlet.PATH = f"/unrouted{servlet.PATH}"
        server: Any = api._hs.get_federation_server()
        take = server.on_incoming_transaction

        async def note(origin: str, transaction_id: str, destination: str, data: Any) -> Any:
            with Path(_FILE).open("a") as file:
                file.writelines(f"{pdu['hashes']['sha256']}\n" for pdu in data.get("pdus", []))
            return await take(origin, transaction_id, destination, data)

        server.on_incoming_transaction = note


def with_ledger(*unrouted: str, **options: Any) -> dict[str, Any]:
    """The options of a homeserver that keeps a ledger, by default a plain Synapse."""
    module = {"module": f"{__name__}.{Ledger.__name__}", "config": {"unrouted": list(unrouted)}}
    return {"module": False, "extra": {"modules": [module]}, **options}


def times_sent(server: Homeserver) -> Counter[str]:
    """How often each PDU came in, by its content hash."""
    path = server.folder / _FILE
    return Counter(path.read_text().split()) if path.exists() else Counter()


@attr.s(auto_attribs=True, frozen=True)
class Question:
    """A request by which another server learns what this one has."""

    origin: str
    code: int
    path: str


def questions(server: Homeserver) -> list[Question]:
    """The questions that the server has answered, in order."""
    return [
        Question(found["origin"], int(found["code"]), found["path"])
        for found in _ANSWERED.finditer(server.output())
        if found["path"].startswith(_ASKED)
    ]
