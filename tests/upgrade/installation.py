"""A homeserver and the servers that it knows, under the names that the dump has them under."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from signedjson.key import encode_signing_key_base64, read_signing_keys
from signedjson.types import SigningKey

from tests.lab import Homeserver, Lab, Peer
from tests.upgrade.addresses import ADDRESSES
from tests.upgrade.database import Database

FOLDER = Path(__file__).parent
SECRETS = ("registration_shared_secret", "macaroon_secret_key", "form_secret")

HOME = "home.example:8448"
FLOODER = "flooder.example:8448"
NEWCOMER = "newcomer.example:8448"


def dump_path(engine: str) -> Path:
    """The dump itself: SQL, compressed."""
    return FOLDER / f"{engine}.sql.gz"


def facts_path(engine: str) -> Path:
    """What a test has to know of it."""
    return FOLDER / f"{engine}.json"


def make_server(
    lab: Lab,
    database: Database,
    peers: Mapping[str, Peer],
    config: object,
    secrets: Mapping[str, str] | None = None,
) -> Homeserver:
    """The homeserver, not started yet. It finds the peers by their names."""
    extra = {
        "server_name": HOME,
        "database": database.settings,
        "modules": [
            {
                "module": ADDRESSES,
                "config": {name: peer.port for name, peer in peers.items()},
            }
        ],
        **(secrets or {}),
    }
    return lab.make(config=config, extra=extra)


def start(server: Homeserver) -> None:
    """Starts it. From then on the lab has its true name."""
    server.first_start()
    # The lab names a server after its port, which need not be the same after a first start.
    server.name = HOME


def key_to_text(key: SigningKey) -> str:
    """As in a homeserver's file."""
    return f"{key.alg} {key.version} {encode_signing_key_base64(key)}"


def key_from_text(text: str) -> SigningKey:
    """The reverse."""
    (key,) = read_signing_keys([text])
    return key


def facts_of(engine: str) -> Any:
    """Reads what a test has to know of the dump."""
    return json.loads(facts_path(engine).read_text())
