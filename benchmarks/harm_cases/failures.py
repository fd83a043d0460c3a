"""What fails, or floods, in one room or of one server; and what others notice of it."""

import logging
import time
from collections.abc import Callable
from contextlib import closing

from benchmarks.harm import Case, Figures, Goal
from tests.integration.rooms import NO_LIMITS
from tests.integration.test_extremities import (
    NOBODY,
    THRESHOLD,
    extremities,
    flood_with_forks,
    forked_room_where_nobody_may_send,
    refused_events,
)
from tests.integration.test_refusals import TRIGGER, drops_of, refused, tries_of
from tests.integration.test_turns import ids, stages
from tests.lab import Lab, wait_until
from tests.lab.postgres import Postgres
from tests.lab.scene import Scene, enter
from tests.unit.process import Process
from tests.unit.test_apart import RETRYING


def refused_by_the_database(lab: Lab, size: int) -> Figures:
    """PDUs that the database will never take, and then what others send in the room."""
    with Postgres() as postgres, closing(lab.peer()) as peer, closing(lab.peer()) as other:
        options = {"config": NO_LIMITS, "extra": {"database": postgres.new_database()}}
        (server,) = lab.servers(options)
        server.change(*TRIGGER)
        scene = enter(server, peer)
        carol = other.user("carol")
        others = Scene(server, other, scene.alice, carol, other.join(server, scene.room_id, carol))
        wait_until(lambda: carol in scene.alice.members(scene.room_id), "carol to be joined")
        start_s = time.monotonic()
        bad = [refused(scene, "54000") for _ in range(5 * size)]
        remote = others.sticky()
        own = scene.alice.send(scene.room_id)
        wait_until(lambda: scene.is_there(remote) and scene.is_there(own), "the others", 300)
        took_s = time.monotonic() - start_s
        wait_until(lambda: all(drops_of(server, event_id) for event_id in bad), "the drops", 300)
        tries = [tries_of(server, event_id) for event_id in bad]
        lab.close_servers([server])
    return {"until what others send is there": took_s, "most tries of one": max(tries)}


def _before_a_flood(lab: Lab, size: int, *, has_the_flood: bool) -> Figures:
    (server,) = lab.servers({})
    with stages(server, lab) as begin:
        stage = begin(1)
        (eve,) = stage.flooders
        held = stage.hold_up(eve)
        flood = eve.chain(150 * size, *stage.base)
        eve.send(server, flood)
        stage.bob.peer.events.update(eve.peer.events)
        own = stage.bob.make(*([flood[-1][0]] if has_the_flood else stage.base))
        stage.bob.send(server, [own])
        stage.gate.open()
        stage.wait_until_all_are_there(*held, *ids(flood), own[0])
        return {
            "PDUs in front": stage.in_front(own[0], [held[1], *ids(flood)]),
            "questions for a state": stage.asked("state_ids"),
        }


def beside_a_flood(lab: Lab, size: int) -> Figures:
    """A server floods a room, and another one sends one event."""
    return _before_a_flood(lab, size, has_the_flood=False)


def on_top_of_a_flood(lab: Lab, size: int) -> Figures:
    """Likewise, on top of the flood."""
    return _before_a_flood(lab, size, has_the_flood=True)


def waking(lab: Lab, size: int) -> Figures:
    """Each job that fails is woken again and again before its time."""
    attempts = timers = 0
    # What each says of its failure is no result.
    logging.getLogger("synapse_sticky").setLevel(logging.CRITICAL)
    for make in RETRYING:
        process = Process()
        wake, count = make(process)
        wake()
        while count() == 0:
            process.pass_ms(min(timer.due_ms for timer in process.timers) - process.now)
        for _ in range(1_000 * size):
            wake()
        attempts = max(attempts, count())
        timers = max(timers, len([t for t in process.timers if "_retry" in t.what]))
    return {"attempts of a job": attempts, "timers of a job": timers}


def nobody_may_send(lab: Lab, size: int) -> Figures:
    """A room whose local members may send no dummy event, while another is brought down."""
    with closing(lab.peer()) as peer:
        (server,) = lab.servers({"config": NO_LIMITS})
        absent = server.user()
        members = [server.user() for _ in range(10 * size)]
        scene = forked_room_where_nobody_may_send(server, peer, absent, *members)
        wait_until(lambda: server.log_has(f"{NOBODY} {scene.room_id}"), "a look", 120)
        other_id = flood_with_forks(server, peer, 60)
        wait_until(lambda: extremities(server, other_id) <= THRESHOLD, "few extremities", 120)
        return {
            "events that were refused": refused_events(server),
            "looks": server.output().count(f"{NOBODY} {scene.room_id}"),
        }


def _case(name: str, measure: Callable[[Lab, int], Figures], **goals: Goal) -> Case:
    return Case(name, measure, {figure.replace("_", " "): goal for figure, goal in goals.items()})


CASES = (
    _case(
        "refused: 20 PDUs that the database does not take, and what others send",
        refused_by_the_database,
        until_what_others_send_is_there=Goal(5, growth=5, unit="s"),
        most_tries_of_one=Goal(1),
    ),
    _case(
        "turns: 600 staged PDUs of one server, one of another beside them",
        beside_a_flood,
        PDUs_in_front=Goal(3, growth=1.5),
        questions_for_a_state=Goal(0),
    ),
    _case(
        "turns: 600 staged PDUs of one server, one of another on top of them",
        on_top_of_a_flood,
        PDUs_in_front=Goal(75, growth=1.5),
        questions_for_a_state=Goal(1, growth=1.5),
    ),
    _case(
        "back-off: a job that fails is woken 4,000 times",
        waking,
        attempts_of_a_job=Goal(1, growth=1.5),
        timers_of_a_job=Goal(1, growth=1.5),
    ),
    _case(
        "extremities: 40 local members, none of whom may send dummy events",
        nobody_may_send,
        events_that_were_refused=Goal(0),
        looks=Goal(1, growth=1.5),
    ),
)
