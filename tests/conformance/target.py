"""The homeserver that the tests are pointed at: one of the lab, or one that is there already."""

import json
import secrets
from typing import Any

import attr
import requests

from tests.lab import Client, Homeserver
from tests.lab.homeserver import MODULE

PASSWORD = "password"


class NotAvailableError(Exception):
    """A test asks for what only a server of the lab can do."""


@attr.s(auto_attribs=True)
class Target:
    """A homeserver, reached by its public APIs alone.

    Args:
        base_url: its client-server API; anybody may register there.
        name: its server name.
        federation_port: where it federates over TLS, on 127.0.0.1.
        process: the server of the lab that it is, if it is one.
    """

    base_url: str
    name: str
    federation_port: int
    process: Homeserver | None = None

    @classmethod
    def existing(cls, base_url: str, federation_port: int) -> "Target":
        """One that is there already. Its name is found out by registering a user."""
        target = cls(base_url, "", federation_port)
        target.name = target.user().user_id.split(":", 1)[1]
        return target

    @classmethod
    def of_lab(cls, server: Homeserver) -> "Target":
        return cls(server.base_url, server.name, server.federation_port, server)

    def user(self, name: str = "user") -> Client:
        """Registers a user with a name like this."""
        body = {
            "username": f"{name}-{secrets.token_hex(6)}",
            "password": PASSWORD,
            "auth": {"type": "m.login.dummy"},
        }
        answer = requests.post(f"{self.base_url}/_matrix/client/v3/register", json=body, timeout=60)
        assert answer.ok, f"nobody can register at {self.base_url}: {answer.text}"
        return Client(self.base_url, answer.json()["user_id"], answer.json()["access_token"])

    def kill_and_restart(self) -> None:
        """Ends the process as a crash would, and starts it again."""
        process = self._process()
        process.kill()
        process.restart()

    @property
    def receivers(self) -> int:
        """How many of its processes take other servers' transactions."""
        return self._process().receivers

    def metrics(self) -> dict[str, float]:
        """What its processes count, together, by name and labels."""
        return self._process().counters()

    def _process(self) -> Homeserver:
        if self.process is None:
            raise NotAvailableError
        return self.process


def erase(user: Client) -> None:
    """Deactivates the user's account, and asks for its events to be forgotten."""
    identifier = {"type": "m.id.user", "user": user.user_id}
    auth = {"type": "m.login.password", "identifier": identifier, "password": PASSWORD}
    user.request("POST", "account/deactivate", {"auth": auth, "erase": True})


@attr.s(auto_attribs=True, frozen=True)
class Options:
    """How a server of the lab is to be configured. ``module`` and ``module_name`` are not of plain
    Synapse; the others are as those of ``Homeserver``."""

    module: dict[str, Any] = attr.Factory(dict)
    synapse: dict[str, Any] = attr.Factory(dict)
    module_name: str = MODULE
    host: str = "localhost"

    @property
    def key(self) -> str:
        return json.dumps(attr.asdict(self), sort_keys=True)


EXTENDED = Options(
    module={"local": {"mode": "off"}},
    synapse={
        "experimental_features": {"msc4293_enabled": True},
        "retention": {"enabled": True},
    },
    host="127.0.0.1",
)
"""What some tests need beside the defaults, in one server, as each start takes a while: bans that
redact, retention, a host that an ACL can tell from a peer's, and more events of one local user."""
