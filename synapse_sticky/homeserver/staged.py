"""The PDUs that an earlier run left in the inbound staging area."""

from typing import Any

from synapse_sticky.homeserver.process import Homeserver
from synapse_sticky.homeserver.seams import HOMESERVER, Attribute, method

_SERVER = "synapse.federation.federation_server.FederationServer"

_MINUTE_MS = 60_000

SEAMS = (
    method(HOMESERVER, "get_federation_server() -> FederationServer"),
    Attribute(_SERVER, "_started_handling_of_staged_events"),
    method(_SERVER, "async _handle_old_staged_events()"),
)


def begin_on_staged_pdus(homeserver: Homeserver) -> None:
    """Has Synapse process what an earlier run left, if it has not begun.

    Synapse itself begins with the next transaction of anybody. This process must receive them.
    """
    server: Any = homeserver.hs.get_federation_server()

    def begin() -> None:
        # It is a background process of its own: whoever waits for that loses the logging context.
        server._handle_old_staged_events()

    if not server._started_handling_of_staged_events:
        server._started_handling_of_staged_events = True
        begin()
        homeserver.api.looping_background_call(
            begin,
            _MINUTE_MS,
            desc="synapse_sticky_staged",
            run_on_all_instances=True,
        )
