"""The least that a homeserver's configuration needs."""

from pathlib import Path
from typing import Any

import yaml


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


class Files:
    """A homeserver's configuration, in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options = {
            **configuration(folder, "here", "client", "federation"),
            "modules": [{"module": "synapse_sticky.StickyEventsModule", "config": {}}],
        }
        self.database = Path(self.options["database"]["args"]["database"])

    def write(self, **options: Any) -> str:
        """Writes homeserver.yaml, with these options in place of others, and gives its path."""
        path = self.folder / "homeserver.yaml"
        path.write_text(yaml.safe_dump({**self.options, **options}))
        return str(path)

    def write_worker(self, name: str, **options: Any) -> str:
        path = self.folder / f"{name}.yaml"
        common = {"worker_app": "synapse.app.generic_worker", "worker_name": name}
        path.write_text(yaml.safe_dump({**common, **options}))
        return str(path)

    def with_module(self, **config: Any) -> str:
        modules = [{"module": "synapse_sticky.StickyEventsModule", "config": config}]
        return self.write(modules=modules)
