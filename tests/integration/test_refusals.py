"""The database refuses single events, for good or for now: only these wait (L3, H1, H2).

A trigger in a Postgres of the test's own raises the SQLSTATE that it is told for an event, or
ends the connection (``gone``). An event that says so takes a while.
"""

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest

from tests.integration.rooms import NO_LIMITS
from tests.integration.test_staging import parked
from tests.lab import Homeserver, Lab, Peer, wait_until
from tests.lab.impatient import IMPATIENT_MODULE
from tests.lab.postgres import Postgres
from tests.lab.scene import Scene, enter

PASSING = ["gone", "08006", "40001", "53200", "55P03", "57P01", "58030", "25006"]
REFUSING = ["54000", "22021", "23514", "42703"]
CANCELED = "57014"

TRIGGER = (
    "CREATE TABLE refusals (event_id TEXT NOT NULL, code TEXT NOT NULL)",
    """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        refusal TEXT;
    BEGIN
        IF NEW.json LIKE '%takes a while%' THEN
            PERFORM pg_sleep(3);
        END IF;
        SELECT code INTO refusal FROM refusals WHERE event_id = NEW.event_id;
        IF refusal = 'gone' THEN
            PERFORM pg_terminate_backend(pg_backend_pid());
            PERFORM pg_sleep(9);
        ELSIF refusal IS NOT NULL THEN
            RAISE EXCEPTION USING ERRCODE = refusal, MESSAGE = 'refused by a test';
        END IF;
        RETURN NEW;
    END $$
    """,
    "CREATE TRIGGER refuse BEFORE INSERT ON event_json FOR EACH ROW EXECUTE FUNCTION refuse()",
)


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[Homeserver]:
    with Postgres() as postgres:
        (started,) = lab.servers(
            {
                "module_name": IMPATIENT_MODULE,
                "config": NO_LIMITS,
                "extra": {"database": postgres.new_database()},
            }
        )
        started.change(*TRIGGER)
        yield started
        lab.close_servers([started])


@pytest.fixture
def scene(server: Homeserver, peer: Peer) -> Scene[Homeserver]:
    return enter(server, peer)


@pytest.fixture
def other(lab: Lab, scene: Scene[Homeserver]) -> Iterator[Scene[Homeserver]]:
    """Another peer in the same room."""
    with closing(lab.peer()) as peer:
        carol = peer.user("carol")
        room = peer.join(scene.server, scene.room_id, carol)
        wait_until(lambda: carol in scene.alice.members(scene.room_id), "the other to be joined")
        yield Scene(scene.server, peer, scene.alice, carol, room)


def refused(scene: Scene[Homeserver], sqlstate: str) -> str:
    """The peer sends a sticky event that the database does not take. Gives its ID."""
    event_id, pdu = scene.peer.sticky(scene.room, scene.eve)
    scene.server.change(f"INSERT INTO refusals VALUES ('{event_id}', '{sqlstate}')")
    assert scene.send(pdu) == {event_id: {}}
    return event_id


def lines_with(server: Homeserver, *texts: str) -> list[str]:
    """What its processes logged of this."""
    lines = (line for log in server.logs().values() for line in log.splitlines())
    return [line for line in lines if all(text in line for text in texts)]


def tries_of(server: Homeserver, event_id: str) -> int:
    return len(lines_with(server, "Failed to handle PDU", event_id))


def drops_of(server: Homeserver, event_id: str) -> list[str]:
    return lines_with(server, " WARNING ", "Dropping the sticky PDU", event_id)


def others_come_in(scene: Scene[Homeserver], other: Scene[Homeserver], *more: str) -> None:
    """What anybody else sends does."""
    sent = [other.sticky(), scene.alice.send_sticky(scene.room_id), *more]
    wait_until(lambda: all(scene.is_there(event_id) for event_id in sent), "the others", 30)


@pytest.mark.requirement("L3", "H1")
def test_what_passes_is_parked_at_once(scene: Scene[Homeserver], other: Scene[Homeserver]) -> None:
    sent = {refused(scene, sqlstate): sqlstate for sqlstate in PASSING}
    others_come_in(scene, other, scene.sticky())
    wait_until(lambda: sent.keys() <= parked(scene.server), "all to be parked")
    assert not any(scene.is_there(event_id) for event_id in sent)
    scene.server.change("DELETE FROM refusals")
    scene.wait_until_there(*sent)
    wait_until(lambda: not sent.keys() & parked(scene.server), "none to be parked any more")
    wait_until(lambda: sent.keys() <= {*scene.sections()[0]}, "all to be in the section")
    assert not any(drops_of(scene.server, event_id) for event_id in sent)


@pytest.mark.requirement("L3", "H1", "H2")
def test_what_is_refused_is_dropped(scene: Scene[Homeserver], other: Scene[Homeserver]) -> None:
    sent = {refused(scene, sqlstate): sqlstate for sqlstate in REFUSING}
    others_come_in(scene, other, scene.sticky())
    wait_until(lambda: all(drops_of(scene.server, event_id) for event_id in sent), "the drops")
    assert not sent.keys() & parked(scene.server)
    for event_id, sqlstate in sent.items():
        (line,) = drops_of(scene.server, event_id)
        assert sqlstate in line
        assert tries_of(scene.server, event_id) == 1


@pytest.mark.requirement("L3", "H1", "H2")
def test_an_index_row_that_is_too_large(scene: Scene[Homeserver], other: Scene[Homeserver]) -> None:
    """What the peer can bring about by itself."""
    relation = {"rel_type": secrets.token_hex(9_000), "event_id": scene.room.extremities[0]}
    event_id, pdu = scene.peer.sticky(scene.room, scene.eve, content={"m.relates_to": relation})
    assert scene.send(pdu) == {event_id: {}}
    others_come_in(scene, other, scene.sticky())
    wait_until(lambda: drops_of(scene.server, event_id), "it to be dropped")
    (line,) = drops_of(scene.server, event_id)
    assert "54000" in line
    assert tries_of(scene.server, event_id) == 1


@pytest.mark.requirement("H1")
@pytest.mark.parametrize(
    ("sqlstate", "tries"), [("54000", 1), pytest.param(CANCELED, 3, marks=pytest.mark.slow)]
)
def test_what_is_persisted_together_does_not_fail_together(
    scene: Scene[Homeserver], sqlstate: str, tries: int
) -> None:
    """Meanwhile Synapse makes one batch of whatever comes for the room."""
    alice, room_id = scene.alice, scene.room_id
    with ThreadPoolExecutor(5) as threads:
        first = threads.submit(alice.send, room_id, {"body": "takes a while"})
        sleeping = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        wait_until(lambda: scene.server.query(sleeping), "the room to be busy")
        event_id = refused(scene, sqlstate)
        begun = ("handling received PDU", event_id)
        wait_until(lambda: lines_with(scene.server, *begun), "it to be looked at")
        sent = [first, *(threads.submit(alice.send, room_id) for _ in range(4))]
        assert all(scene.is_there(sending.result()) for sending in sent)
    wait_until(lambda: drops_of(scene.server, event_id), "it to be dropped")
    assert tries_of(scene.server, event_id) == tries
    assert lines_with(scene.server, "parts of a batch", room_id)
    assert scene.alice.sync()["rooms"]["join"][room_id]["timeline"]["events"][-1]["event_id"] in {
        sending.result() for sending in sent
    }


@pytest.mark.requirement("L3", "H1", "H2")
def test_what_nobody_knows_is_tried_three_times(
    scene: Scene[Homeserver], other: Scene[Homeserver]
) -> None:
    event_id = refused(scene, CANCELED)
    others_come_in(scene, other, scene.sticky())
    wait_until(lambda: drops_of(scene.server, event_id), "it to be dropped")
    assert event_id not in parked(scene.server)
    (line,) = drops_of(scene.server, event_id)
    assert CANCELED in line
    assert tries_of(scene.server, event_id) == 3


@pytest.mark.slow
@pytest.mark.requirement("L3", "H1", "H2")
def test_what_ends_its_connection_each_time_is_not_tried_for_long(scene: Scene[Homeserver]) -> None:
    event_id = refused(scene, "gone")

    def is_dropped() -> bool:
        # Others show that it is not the database.
        scene.alice.send(scene.room_id)
        return bool(drops_of(scene.server, event_id))

    wait_until(is_dropped, "it to be dropped", 240)
    assert event_id not in parked(scene.server)
    assert 12 <= tries_of(scene.server, event_id) <= 20


@pytest.mark.requirement("L3", "F1", "H1")
@pytest.mark.parametrize("sqlstate", ["54000", pytest.param(CANCELED, marks=pytest.mark.slow)])
def test_what_comes_after_a_refused_event(
    scene: Scene[Homeserver], other: Scene[Homeserver], sqlstate: str
) -> None:
    """An honest server that has it sends its own on top of it. Synapse goes on from the state that
    it asks for at one of these; it cannot at the first."""
    event_id = refused(scene, sqlstate)
    scene.peer.advance(scene.room, event_id)
    first, *later = scene.flood(6)
    others_come_in(scene, other)
    # Once it has been tried often enough, and it is their turn.
    wait_until(lambda: all(map(scene.is_there, later[-2:])), "the last to be there", 180)
    assert first in parked(scene.server)
    wait_until(lambda: not parked(scene.server) & set(later[-2:]), "the last not to be parked")
    wait_until(lambda: drops_of(scene.server, event_id), "it to be dropped")
    assert len(drops_of(scene.server, event_id)) == 1
    # What comes after it is not dropped with it, though it may never come in.
    assert not any(drops_of(scene.server, later_id) for later_id in (first, *later))
    assert all(scene.is_there(e) or e in parked(scene.server) for e in (first, *later))
    # It is not tried again each time that something comes after it.
    passed_over = lines_with(scene.server, "Passing over", event_id)
    receivers = scene.server.receivers if sqlstate == CANCELED else scene.server.receivers - 1
    assert len(passed_over) <= receivers


@pytest.mark.requirement("L3", "F1", "H1")
def test_what_comes_after_an_event_that_waits(
    scene: Scene[Homeserver], other: Scene[Homeserver]
) -> None:
    event_id = refused(scene, "53200")
    scene.peer.advance(scene.room, event_id)
    later = scene.flood(5)
    others_come_in(scene, other)
    wait_until(lambda: {event_id, *later} <= parked(scene.server), "all to be parked")
    scene.server.change("DELETE FROM refusals")
    scene.wait_until_there(event_id, *later)
    wait_until(lambda: not parked(scene.server) & {event_id, *later}, "nothing to be left")


FULL = (
    """
    CREATE FUNCTION is_full() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION USING ERRCODE = '53100', MESSAGE = 'full for a test';
    END $$
    """,
    "CREATE TRIGGER is_full BEFORE INSERT ON synapse_sticky_incomplete"
    " FOR EACH ROW EXECUTE FUNCTION is_full()",
)


@contextmanager
def nothing_can_be_parked(server: Homeserver) -> Iterator[None]:
    server.change(*FULL)
    try:
        yield
    finally:
        server.change(
            "DROP TRIGGER is_full ON synapse_sticky_incomplete", "DROP FUNCTION is_full()"
        )


def staged(server: Homeserver) -> set[str]:
    rows = server.query("SELECT event_id FROM federation_inbound_events_staging")
    return {event_id for (event_id,) in rows}


@pytest.mark.slow
@pytest.mark.requirement("E4", "L3", "H1")
@pytest.mark.parametrize("is_killed", [False, True])
def test_the_disk_is_full_for_an_event_and_for_its_parking(
    scene: Scene[Homeserver], other: Scene[Homeserver], is_killed: bool
) -> None:
    """It is kept by the staging area alone; what comes later in the room does not wait for it."""
    server = scene.server
    with nothing_can_be_parked(server):
        sent = {refused(scene, "53100") for _ in range(3)}
        others_come_in(scene, other, scene.sticky())
        others_come_in(scene, other)
        assert staged(server) & sent == sent
        # Each process has found out by itself, once.
        assert all(1 <= tries_of(server, event_id) <= server.receivers for event_id in sent)
        if is_killed:
            server.kill()
    if is_killed:
        server.start()
        server.wait_until_ready()
    wait_until(lambda: sent <= parked(server), "all to be parked")
    wait_until(lambda: not staged(server) & sent, "none to be staged")
    server.change("DELETE FROM refusals")
    scene.wait_until_there(*sent)
    wait_until(lambda: not parked(server) & sent, "none to be parked")
