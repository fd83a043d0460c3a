"""Other servers choose names as they like, of rooms and of transactions (H1, H3)."""

import pytest

from tests.conftest import Servers
from tests.integration.rooms import limits
from tests.lab import Lab, Peer, wait_until
from tests.lab.postgres import Postgres
from tests.lab.resident import Resident
from tests.lab.scene import enter

FORGED = "2026-01-01 ERROR synapse_sticky all is lost"


@pytest.mark.requirement("H3")
def test_a_room_makes_up_no_line_of_the_log(servers: Servers, peer: Peer) -> None:
    """Those of Synapse are Synapse's matter."""
    (server,) = servers({"config": limits(per_sender={"per_second": 0.001, "burst_count": 1})})
    resident = Resident(peer, f"named\n{FORGED}\x1b[31m")
    bob = server.user("bob")
    bob.join(resident.room_id, peer.name)
    flood = [peer.sticky(resident.room, resident.eve)[1] for _ in range(3)]
    peer.to(server).send("flood", flood).raise_for_status()

    def about_the_limit() -> list[str]:
        return [line for line in server.output().splitlines() if "per_sender: deferred" in line]

    (line,) = wait_until(about_the_limit, "the line about the limit")
    assert f"!named\\n{FORGED}\\x1b[31m:{peer.name}" in line


@pytest.mark.requirement("H1", "H3")
def test_a_transaction_that_no_database_is_asked_for(lab: Lab, peer: Peer) -> None:
    """Synapse itself fails at such an ID. The module adds nothing to that."""
    with Postgres() as postgres:
        (server,) = lab.servers({"extra": {"database": postgres.new_database()}})
        scene = enter(server, peer)
        _, pdu = peer.sticky(scene.room, scene.eve)
        assert peer.to(server).send("%00", [pdu]).status_code == 500
        event_id = scene.sticky()
        scene.wait_until_there(event_id)
        assert not server.log_has("Could not check a transaction")
        lab.close_servers([server])
