"""What a plain newcomer with Synapse's default limits is sent and asked."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from benchmarks.harm import Case, Figures, Goal
from tests.integration.rooms import (
    NO_LIMITS,
    introduce,
    joined_line,
    room_of,
    wait_until_all_pushed,
    wait_until_gone,
)
from tests.lab import Homeserver, Lab, wait_until
from tests.lab.ledger import questions, times_sent, with_ledger

_PATIENCE_S = 300


def _wait_until_all_there(server: Homeserver, event_ids: set[str]) -> float:
    """Gives for how many seconds it waited."""

    def missing() -> set[str]:
        return event_ids - {e for (e,) in server.query("SELECT event_id FROM sticky_events")}

    start_s = time.monotonic()
    wait_until(lambda: not missing(), "all of them", _PATIENCE_S, missing)
    return time.monotonic() - start_s


def _figures(newcomer: Homeserver, took_s: float) -> Figures:
    asked = questions(newcomer)
    return {
        "until the last one is there": took_s,
        "questions": len(asked),
        "answers 429": sum(question.code == 429 for question in asked),
        "most times one was sent": max(times_sent(newcomer).values()),
    }


def _goals(most_questions: float, *, seconds: float) -> dict[str, Goal]:
    return {
        "questions": Goal(most_questions, growth=4.4),
        "answers 429": Goal(0),
        "most times one was sent": Goal(2),
        "until the last one is there": Goal(seconds, unit="s"),
    }


def one_room(lab: Lab, size: int, residents: int = 1, *unrouted: str) -> Figures:
    """Each of the residents has so many events in a room when the newcomer joins."""
    *servers, newcomer = lab.servers(*[{"config": NO_LIMITS}] * residents, with_ledger(*unrouted))
    users, carol = [server.user() for server in servers], newcomer.user()
    room_id = room_of(*users, via=servers[0])
    each = 65 * size // residents
    sent = {user.send_sticky(room_id) for _ in range(each) for user in users}
    carol.join(room_id, servers[0].name)
    took_s = _wait_until_all_there(newcomer, sent)
    for server in servers:
        wait_until_all_pushed(server, room_id)
    return _figures(newcomer, took_s)


def two_servers(lab: Lab, size: int) -> Figures:
    """Half of the events are of another server, and each refers to one of the other's. Whatever the
    order, the newcomer asks for what is before each, so it takes twice as long."""
    return one_room(lab, size, 2)


def unrouted(lab: Lab, size: int) -> Figures:
    """The newcomer does not say what it has."""
    return one_room(lab, size, 1, "/event/", "/backfill/", "/get_missing_events/")


def many_rooms(lab: Lab, size: int) -> Figures:
    """The newcomer joins many rooms, four at a time, with five events in each."""
    server, newcomer = lab.servers({"config": NO_LIMITS}, with_ledger())
    alice, carol = server.user(), newcomer.user()
    room_ids = [alice.create_room() for _ in range(20 * size)]
    sent = {alice.send_sticky(room_id) for room_id in room_ids for _ in range(5)}
    introduce(newcomer, server)
    with ThreadPoolExecutor(4) as joining:
        list(joining.map(lambda room_id: carol.again().join(room_id, server.name), room_ids))
    took_s = _wait_until_all_there(newcomer, sent)
    for room_id in room_ids:
        wait_until_all_pushed(server, room_id)
    return _figures(newcomer, took_s)


def again_and_again(lab: Lab, size: int) -> Figures:
    """A newcomer that has everything leaves and joins, five times."""
    server, newcomer = lab.servers({"config": NO_LIMITS}, with_ledger())
    alice, carol = server.user(), newcomer.user()
    room_id = room_of(alice, via=server)
    sent = {alice.send_sticky(room_id) for _ in range(13 * size)}
    carol.join(room_id, server.name)
    _wait_until_all_there(newcomer, sent)
    wait_until_all_pushed(server, room_id)
    before = sum(times_sent(newcomer).values())
    line = joined_line(newcomer, room_id)

    def has_seen(times: int) -> bool:
        return server.output().count(line) == times

    for number in range(5):
        carol.leave(room_id)
        wait_until_gone(alice, room_id, carol)
        carol.join(room_id, server.name)
        wait_until(partial(has_seen, number + 2), "the join to be seen")
    wait_until_all_pushed(server, room_id)
    asked = [question for question in questions(newcomer) if "event/" in question.path]
    return {
        "sent again": sum(times_sent(newcomer).values()) - before,
        "questions": len(asked),
    }


CASES = (
    Case("questions: 260 events in one room", one_room, _goals(65, seconds=10)),
    Case("questions: the same of two servers", two_servers, _goals(65, seconds=20)),
    Case("questions: 80 rooms, 5 events in each", many_rooms, _goals(200, seconds=15)),
    Case(
        "questions: 260 events, the newcomer does not say what it has",
        unrouted,
        _goals(1, seconds=10),
    ),
    Case(
        "newcomers: one that leaves and joins five times",
        again_and_again,
        {"sent again": Goal(0), "questions": Goal(5)},
    ),
)
