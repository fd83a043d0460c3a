"""The index of every process is in step with what Synapse has (E4, S5, C2)."""

import pytest

from tests.conftest import Servers
from tests.integration.rooms import room_of, wait_until_sticky
from tests.lab import Client, wait_until
from tests.lab.client import ApiError


@pytest.mark.slow
def test_local_and_remote_events_also_after_a_restart(servers: Servers) -> None:
    a, b = servers({"probed": True}, {})
    alice, bob = a.user(), b.user()
    room_id = room_of(alice, bob, via=a)
    of_alice = alice.send_sticky(room_id)
    of_bob = bob.send_sticky(room_id)
    plain = alice.send(room_id)
    wait_until_sticky(a, of_bob)
    for _ in range(2):
        assert a.index_knows(of_alice)
        assert a.index_knows(of_bob)
        assert not a.index_knows(plain)
        a.restart()


@pytest.mark.slow
@pytest.mark.requirement("S5")
def test_redacted(servers: Servers) -> None:
    a, b = servers({"probed": True}, {})
    alice, bob = a.user(), b.user()
    room_id = room_of(alice, bob, via=a)
    of_alice, of_bob = alice.send_sticky(room_id), bob.send_sticky(room_id)
    wait_until(lambda: a.index_knows(of_bob), "the event to arrive")
    alice.redact(room_id, of_alice)
    bob.redact(room_id, of_bob)
    for _ in range(2):
        wait_until(lambda: not a.index_knows(of_alice), "the local redaction")
        wait_until(lambda: not a.index_knows(of_bob), "the remote redaction")
        a.restart()


def test_purged(servers: Servers) -> None:
    (a,) = servers({"probed": True})
    alice, admin = a.user(), a.user(admin=True)
    purged, kept = room_of(alice, via=a), room_of(alice, via=a)
    gone, stays = alice.send_sticky(purged), alice.send_sticky(kept)
    assert a.index_knows(gone)
    admin.request("DELETE", f"/_synapse/admin/v1/rooms/{purged}", {"purge": True})
    wait_until(lambda: not a.index_knows(gone), "the purge")
    assert a.index_knows(stays)


@pytest.mark.slow
@pytest.mark.requirement("C2")
def test_soft_failed_and_checked_again(servers: Servers) -> None:
    a, b = servers({"probed": True, "forwarded": True}, {})
    assert a.forwarder is not None
    alice, bob = a.user(), b.user()
    room_id = room_of(alice, bob, via=a)
    a.forwarder.offline()
    of_bob = bob.send_sticky(room_id)
    # A ban that the sender's server does not know of yet.
    alice.request("POST", f"rooms/{room_id}/ban", {"user_id": bob.user_id})
    a.forwarder.online()
    wait_until_sticky(a, of_bob)
    assert not a.index_knows(of_bob)
    a.restart()
    assert not a.index_knows(of_bob)
    alice.request("POST", f"rooms/{room_id}/unban", {"user_id": bob.user_id})
    wait_until(lambda: _can_join(bob, room_id, a.name), "the unban to be known")
    wait_until(lambda: a.index_knows(of_bob), "the event to be accepted after all")


def _can_join(user: Client, room_id: str, via: str) -> bool:
    try:
        user.join(room_id, via)
    except ApiError:
        return False
    return True
