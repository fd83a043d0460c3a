"""A short story on real homeservers, each with the module: what must work on any Synapse."""

from collections.abc import Iterator
from functools import partial
from importlib.metadata import version

import pytest

from tests.compat import is_expected_to_fit
from tests.integration.rooms import (
    NO_LIMITS,
    deferred,
    limits,
    room_of,
    wait_until_sticky,
)
from tests.lab import Client, Homeserver, Lab, wait_until
from tests.lab.client import WITHOUT_TIMELINE, sliding_sticky_events, sticky_events
from tests.lab.homeserver import StartError

SYNAPSE = version("matrix-synapse")
FITS = is_expected_to_fit(SYNAPSE)
OLD = 5
FLOOD = 15
# So few that some are past it on a busy machine, too, where it takes long to send them.
LIMIT = {"per_second": 0.5, "burst_count": 5}

fits = pytest.mark.skipif(not FITS, reason=f"the module does not fit Synapse {SYNAPSE}")
pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def two(lab: Lab) -> Iterator[list[Homeserver]]:
    """The first limits what users of the second send; that has no limits for its own."""
    started = lab.servers({"config": limits(per_sender=LIMIT)}, {"config": NO_LIMITS})
    yield started
    lab.close_servers(started)


def sections(user: Client, room_id: str) -> tuple[list[str], list[str]]:
    """What a new client is given, in /sync and in sliding sync."""
    sync = user.sync(filter_=WITHOUT_TIMELINE)
    return sticky_events(sync, room_id), sliding_sticky_events(user.sliding_sync(), room_id)


def has_only(user: Client, room_id: str, event_id: str) -> bool:
    """Do both sections have this event only?"""
    return sections(user, room_id) == ([event_id], [event_id])


@fits
def test_newcomer(two: list[Homeserver]) -> None:
    """A server that joins a room gets the sticky events of before."""
    a, b = two
    alice, bob = a.user(), b.user()
    room_id = alice.create_room()
    old = {alice.send_sticky(room_id) for _ in range(OLD)}
    bob.join(room_id, a.name)
    assert bob.collect_sticky(room_id, old, filter_=WITHOUT_TIMELINE).keys() == old


@fits
def test_flood(two: list[Homeserver]) -> None:
    """What another server sends past a limit is delivered later, all of it."""
    a, b = two
    alice, mallory = a.user(), b.user()
    room_id = room_of(mallory, alice, via=b)
    flood = {mallory.send_sticky(room_id) for _ in range(FLOOD)}
    waiting = wait_until(lambda: deferred(a), "events to be deferred")
    assert waiting < flood
    assert alice.collect_sticky(room_id, flood, filter_=WITHOUT_TIMELINE).keys() == flood
    wait_until(lambda: not deferred(a), "nothing to be deferred")


@fits
def test_sliding_join(two: list[Homeserver]) -> None:
    """A user of sliding sync who joins gets the sticky events of before."""
    server, _ = two
    alice, bob = server.user(), server.user()
    room_id = alice.create_room()
    old = [alice.send_sticky(room_id) for _ in range(OLD)]
    # A position that is past them.
    bob.send_sticky(bob.create_room())
    before = bob.sliding_sync()
    assert sliding_sticky_events(before, room_id) == []
    bob.join(room_id)
    assert sliding_sticky_events(bob.sliding_sync(before), room_id) == old


@fits
def test_redaction(two: list[Homeserver]) -> None:
    """A redacted event is gone from the sections, on both servers."""
    a, b = two
    alice, bob = a.user(), b.user()
    room_id = room_of(alice, bob, via=a)
    redacted, kept = alice.send_sticky(room_id), alice.send_sticky(room_id)
    for server in two:
        wait_until_sticky(server, kept)
        wait_until_sticky(server, redacted)
    for user in (alice, bob):
        assert set(sections(user, room_id)[0]) == {redacted, kept}
    alice.redact(room_id, redacted)
    for user in (alice, bob):
        wait_until(partial(has_only, user, room_id, kept), "the redacted event to be gone")


@pytest.mark.skipif(FITS, reason=f"the module fits Synapse {SYNAPSE}")
def test_refusal(lab: Lab) -> None:
    """On a Synapse that is too old the start is refused, and says why."""
    lab.prepare()
    server = lab.make()
    with pytest.raises(StartError) as error:
        server.first_start()
    said = str(error.value)
    assert f"synapse-sticky needs Synapse 1.163 or later, this is {SYNAPSE}" in said
    assert "Upgrade Synapse, or take the module out of `modules:`." in said
