"""The least that a homeserver's configuration needs."""

from pathlib import Path
from typing import Any


def configuration(folder: Path, name: str = "here", *resources: str) -> dict[str, Any]:
    """Of a homeserver with its files in the folder, that serves these resources on one port."""
    served = [{"names": [*resources]}]
    listener = {"port": 0, "type": "http", "tls": False, "resources": served}
    return {
        "server_name": name,
        "database": {"name": "sqlite3", "args": {"database": str(folder / f"{name}.db")}},
        "listeners": [listener] if resources else [],
        "signing_key": "ed25519 1 " + "A" * 43,
        "macaroon_secret_key": "macaroon",
        "media_store_path": str(folder / "media"),
        "report_stats": False,
        "trusted_key_servers": [],
        "experimental_features": {"msc4354_enabled": True},
    }
