"""Where a homeserver finds servers of whatever name, loaded beside the module: for tests only.

A dump names servers. A restored server, and the peers that come back under their old names, listen
on whatever ports the system gives them.
"""

from typing import Any

from synapse.http.federation.matrix_federation_agent import MatrixHostnameEndpoint
from synapse.http.federation.srv_resolver import Server
from synapse.module_api import ModuleApi

ADDRESSES = "tests.upgrade.addresses.Addresses"


class Addresses:
    """Has the homeserver look for servers on 127.0.0.1.

    Args:
        config: the port of each server name. A name has to have a port of its own in it, as
            Synapse asks around for the address of one that has none.
    """

    def __init__(self, config: dict[str, int], api: ModuleApi) -> None:
        original = MatrixHostnameEndpoint._resolve_server

        async def resolve(endpoint: MatrixHostnameEndpoint) -> list[Server]:
            uri: Any = endpoint._parsed_uri
            port = config.get(uri.netloc.decode())
            return await original(endpoint) if port is None else [Server(b"127.0.0.1", port)]

        setattr(MatrixHostnameEndpoint, "_resolve_server", resolve)  # noqa: B010
