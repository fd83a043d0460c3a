"""What stops the start, and what it says then."""

from typing import Any

import pytest

from tests.conftest import Servers
from tests.integration.rooms import room_of
from tests.lab import Homeserver, Lab, Peer, extended, wait_until
from tests.lab.client import WITHOUT_TIMELINE, sticky_events
from tests.lab.homeserver import StartError
from tests.lab.scene import enter

pytestmark = pytest.mark.one_process


def start_error(lab: Lab, **options: Any) -> str:
    """Starts a server that must not start, and gives what it said."""
    lab.prepare()
    server = lab.make(**options)
    try:
        with pytest.raises(StartError) as error:
            server.first_start()
        return str(error.value)
    finally:
        lab.close_servers([server])


def test_wrong_option(lab: Lab) -> None:
    said = start_error(lab, config={"joins": {"windwo": 3}})
    assert "joins.windwo is no option; did you mean 'window'?" in said
    assert "config.joins.windwo" in said, "the path in homeserver.yaml"


def test_wrong_value(lab: Lab) -> None:
    said = start_error(lab, config={"joins": {"retry_max": "soon"}})
    assert "joins.retry_max must be a duration from 10 to 3600000 ms" in said


def test_without_synapses_own_sticky_events(lab: Lab) -> None:
    said = start_error(lab, extra={"experimental_features": {"msc4354_enabled": False}})
    assert "synapse-sticky needs Synapse's own sticky events. Add to homeserver.yaml:" in said
    assert "msc4354_enabled: true" in said


def test_older_synapse(lab: Lab) -> None:
    said = start_error(lab, module_name="tests.lab.variants.InOlderSynapse")
    assert "synapse-sticky needs Synapse 1.163 or later, this is 1." in said
    assert "Upgrade Synapse, or take the module out of `modules:`." in said


CHANGED = "tests.lab.variants.InChangedSynapse"
MISFIT = ".un_soft_fail_sticky_events_txn takes (self, txn): too many positional arguments"


@pytest.mark.requirement("H5")
def test_a_synapse_with_another_signature_is_without_that_duty_only(
    lab: Lab, servers: Servers, peer: Peer
) -> None:
    """It starts, says once what is off and what that means, and the other duties go on."""
    (server,) = servers({"module_name": CHANGED, "metrics": True})
    said = server.log_path.read_text()
    assert said.count("deferral is off, as this Synapse does not fit: ") == 1
    assert MISFIT in said
    assert "Without it a flood of another server delays the sticky events of all others." in said
    assert server.log_has(
        "synapse-sticky runs in master: index, delivery, visibility, pruning, receipt, sending,"
        " extremities; loading: sliding, joins, parking; unfit: deferral\n"
    )
    for labels in ('{duty="deferral",state="unfit"}', '{duty="joins",state="on"}'):
        name = f"synapse_sticky_duty{labels}"
        # One with tables is on once these are there.
        wait_until(lambda name=name: server.counters()[name] == 1, name)  # type: ignore[misc]
    # Users talk, and the duty of joins does its work.
    alice = server.user()
    room_id = alice.create_room()
    alice.send(room_id)
    peer.join(server, room_id, peer.user("eve"))
    wait_until(lambda: server.log_has("has newly joined"), "the newcomer to be noticed")


@pytest.mark.requirement("H5")
def test_one_more_optional_argument_changes_nothing(servers: Servers) -> None:
    """Of all functions at once; test_extended.py tells a longer story."""
    (server,) = servers({"module_name": extended.MODULE})
    assert server.log_has(
        "receipt, sending, extremities; loading: sliding, joins, parking, deferral\n"
    )
    alice = server.user()
    room_id = alice.create_room()
    event_id = alice.send_sticky(room_id)
    assert set(alice.collect_sticky(room_id, {event_id})) == {event_id}


@pytest.mark.requirement("H5")
def test_strict_stops_the_start(lab: Lab) -> None:
    said = start_error(lab, module_name=CHANGED, config={"strict": True})
    assert "synapse-sticky does not fit Synapse 1." in said
    assert "deferral: " in said
    assert MISFIT in said


@pytest.mark.requirement("H5")
def test_strict_about_access_does_not_mind_limits(servers: Servers) -> None:
    (server,) = servers({"module_name": CHANGED, "config": {"strict": "access"}})
    assert server.log_has("; unfit: deferral\n")


WITHOUT_TURNS = "tests.lab.variants.InSynapseWithoutTurns"


@pytest.mark.requirement("D7", "H5")
def test_a_part_of_a_duty_is_off_by_itself(servers: Servers, peer: Peer) -> None:
    """PDUs are processed in Synapse's order; that none of them is pruned is another part."""
    (server,) = servers({"module_name": WITHOUT_TURNS, "metrics": True})
    said = server.log_path.read_text()
    assert (
        said.count(" ERROR ")
        == said.count("pruning (turns) is off, as this Synapse does not fit: ")
        == 1
    )
    assert "DataStore.get_next_staged_event_for_room takes " in said
    assert "Without it a flood that is staged delays what other servers send later." in said
    assert server.log_has("; unfit: pruning\n")
    assert server.counters()['synapse_sticky_duty{duty="pruning",state="unfit"}'] == 1
    scene = enter(server, peer)
    scene.wait_until_there(*scene.flood(20))


UNGUARDED = "tests.lab.variants.InSynapseThatNobodyGuards"


@pytest.mark.requirement("D8", "H5")
def test_sections_that_nobody_guards(servers: Servers) -> None:
    """The homeserver starts, and the sections are as it makes them; that is an error."""
    options: dict[str, Any] = {"metrics": True}
    server, guarded = servers({**options, "module_name": UNGUARDED}, options)
    said = server.log_path.read_text()
    assert said.count(" ERROR ") == said.count("access is off, as this Synapse does not fit: ") == 1
    assert "SyncHandler._generate_room_entry takes " in said
    assert "SyncHandler.wait_for_sync_for_user takes " in said
    assert server.log_has("; loading: sliding, joins, parking, deferral; unfit: access\n")
    assert server.counters()['synapse_sticky_duty{duty="access",state="unfit"}'] == 1
    assert is_repeated_after_the_leave(server)
    assert not is_repeated_after_the_leave(guarded)


def is_repeated_after_the_leave(server: Homeserver) -> bool:
    """Does who has left a room get its section once more, with the answer to the same request?"""
    alice, bob = server.user(), server.user()
    room_id = room_of(alice, bob, via=server)
    event_id = alice.send_sticky(room_id)

    def section() -> list[str]:
        answer = bob.sync(filter_=WITHOUT_TIMELINE, may_be_repeated=True)
        return sticky_events(answer, room_id)

    assert section() == [event_id]
    bob.leave(room_id)
    wait_until(lambda: bob.user_id not in alice.members(room_id), "the leave")
    left = section()
    assert left in ([], [event_id])
    return bool(left)


@pytest.mark.requirement("D8", "H5")
def test_strict_about_access(lab: Lab, servers: Servers) -> None:
    config = {"strict": "access"}
    said = start_error(lab, module_name=UNGUARDED, config=config)
    assert "access: " in said
    # One layer suffices.
    (server,) = servers({"module_name": "tests.lab.variants.InSynapseWithOneLayer"})
    assert server.log_has("Only one layer guards the sections: ")
    assert server.log_has(
        "receipt, sending, extremities; loading: sliding, joins, parking, deferral\n"
    )


@pytest.mark.requirement("D8", "S5", "H6")
def test_the_sections_are_guarded_unless_they_are_left_to_synapse(servers: Servers) -> None:
    """To switch a duty off says nothing of who gets what."""
    off = {"delivery": {"enabled": False}, "sliding": {"enabled": False}}
    guarded, native = servers({"config": off}, {"config": {"native": ["delivery", "sliding"]}})
    assert guarded.log_has("; off: delivery, sliding\n")
    assert native.log_has("; off: access; native: delivery, sliding\n")
    for server in (guarded, native):
        alice = server.user()
        room_id = alice.create_room()
        redacted, event_id = alice.send_sticky(room_id), alice.send_sticky(room_id)
        alice.redact(room_id, redacted)
        section = sticky_events(alice.sync(filter_=WITHOUT_TIMELINE), room_id)
        assert section == ([event_id] if server is guarded else [redacted, event_id])


@pytest.mark.requirement("H5", "H6")
def test_duties_that_are_left_to_synapse_or_lack_another(servers: Servers) -> None:
    config = {"native": ["joins"], "index": {"enabled": False}}
    (server,) = servers({"config": config})
    assert server.log_has("extremities is off, as it needs index")
    assert server.log_has(
        "synapse-sticky runs in master: delivery, visibility, pruning, receipt, sending;"
        " loading: sliding, parking, deferral; off: index, extremities; native: joins\n"
    )
    # The database answers in place of the index.
    alice, bob = server.user(), server.user()
    room_id = alice.create_room()
    event_ids = {alice.send_sticky(room_id) for _ in range(3)}
    assert set(alice.collect_sticky(room_id, event_ids)) == event_ids
    bob.join(room_id)
    assert set(bob.collect_sticky(room_id, event_ids)) == event_ids
