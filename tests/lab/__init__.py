"""A lab of real homeservers: Synapse processes that federate over TLS on loopback."""

from tests.lab.client import Client
from tests.lab.federation import FederationRequester
from tests.lab.homeserver import Homeserver
from tests.lab.lab import Lab
from tests.lab.peer import Peer
from tests.lab.wait import wait_until
from tests.lab.workers import WorkerHomeserver

__all__ = [
    "Client",
    "FederationRequester",
    "Homeserver",
    "Lab",
    "Peer",
    "WorkerHomeserver",
    "wait_until",
]
