"""What a push costs others: questions within default limits, and nothing sent again and again (H2,
H3, H4). The newcomers are plain homeservers, or peers that answer in any way.
"""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import pytest

from synapse_sticky.handlers.joins.confirmation.questions import APART_MS
from synapse_sticky.handlers.joins.sent import MOST_SENDS
from tests.conftest import Servers
from tests.integration.rooms import (
    NO_LIMITS,
    introduce,
    joined_line,
    room_of,
    send_old_events,
    wait_until_all_pushed,
    wait_until_gone,
    wait_until_sticky,
)
from tests.lab import Homeserver, Peer, wait_until
from tests.lab.ledger import questions, times_sent, with_ledger

SENDER: dict[str, Any] = {"config": NO_LIMITS}


def wait_until_all_sticky(server: Homeserver, event_ids: set[str], timeout_s: float = 240) -> None:
    def missing() -> int:
        return len(event_ids - {e for (e,) in server.query("SELECT event_id FROM sticky_events")})

    wait_until(lambda: not missing(), "all of them", timeout_s, missing)


def warnings(server: Homeserver) -> list[str]:
    """What the module warned of."""
    lines = server.output().splitlines()
    return [line for line in lines if "WARNING synapse_sticky" in line]


def check_questions(newcomer: Homeserver, residents: list[Homeserver], most: int) -> None:
    """They were few, none was refused, and each was about many."""
    asked = questions(newcomer)
    of = {resident.name: [q for q in asked if q.origin == resident.name] for resident in residents}
    assert all(0 < len(asked) <= most for asked in of.values()), of
    assert {question.code for question in asked} == {200}
    assert {question.path.split("/")[0] for question in asked} == {"backfill"}


@pytest.mark.one_process
@pytest.mark.requirement("P3", "P7", "H4")
@pytest.mark.parametrize(
    ("count", "unrouted"),
    [
        (60, ()),
        pytest.param(260, (), marks=pytest.mark.slow),
        pytest.param(260, ("/event/",), marks=pytest.mark.slow),
        pytest.param(260, ("/event/", "/backfill/"), marks=pytest.mark.slow),
    ],
    ids=["60", "260", "260-one-unrouted", "260-unrouted"],
)
def test_many_events_of_one_room(servers: Servers, count: int, unrouted: tuple[str, ...]) -> None:
    a, c = servers(SENDER, with_ledger(*unrouted))
    alice, carol = a.user(), c.user()
    room_id = room_of(alice, via=a)
    old = send_old_events(room_id, [alice], count)
    carol.join(room_id, a.name)
    wait_until_all_sticky(c, old)
    wait_until_all_pushed(a, room_id)
    sent = times_sent(c)
    assert len(sent) >= count
    assert max(sent.values()) <= MOST_SENDS
    assert not c.log_has("from federation queue")
    assert not a.log_has("pruned events of")
    if "/backfill/" in unrouted:
        assert len(questions(c)) == len(warnings(a)) == 1
    else:
        check_questions(c, [a], count * 2 // 5)
        assert warnings(a) == []


@pytest.mark.one_process
@pytest.mark.requirement("P3", "P7", "H4")
@pytest.mark.slow
@pytest.mark.parametrize("rooms", [15, 80])
def test_a_few_events_of_many_rooms(servers: Servers, rooms: int) -> None:
    a, c = servers(SENDER, with_ledger(forwarded=True))
    assert c.forwarder is not None
    alice, carol = a.user(), c.user()
    room_ids = [alice.create_room() for _ in range(rooms)]
    old = {event_id for r in room_ids for event_id in send_old_events(r, [alice], 5)}
    introduce(c, a)
    c.forwarder.offline()  # so that all of it comes at once
    with ThreadPoolExecutor(4) as joining:
        list(joining.map(lambda room_id: carol.again().join(room_id, a.name), room_ids))
    c.forwarder.online()
    wait_until_all_sticky(c, old)
    for room_id in room_ids:
        wait_until_all_pushed(a, room_id)
    assert max(times_sent(c).values()) <= MOST_SENDS
    assert not a.log_has("pruned events of")
    # One a room, and more only while the newcomer has not come to it.
    check_questions(c, [a], 8 * rooms)
    assert warnings(a) == []


class Answering:
    """A peer that answers questions as it is told, and takes what it is sent."""

    def __init__(self, peer: Peer, *answers: tuple[str, tuple[int, Any]]) -> None:
        self._answers = answers
        self.asked_s: list[float] = []
        peer.override = self._answer

    def _answer(self, method: str, path: str) -> tuple[int, Any] | None:
        if "/backfill/" in path or "/event/" in path:
            self.asked_s.append(time.monotonic())
        return next((answer for part, answer in self._answers if part in path), None)


UNRECOGNIZED = (404, {"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"})
HTML = (404, b"<html><body>Not Found</body></html>")
HTML_200 = (200, b"<html><body>Welcome</body></html>")
_DEEP = b"[" * 20_000 + b"]" * 20_000
DEEP_200 = (200, b'{"pdus": ' + _DEEP + b"}")
DEEP_404 = (404, _DEEP)


@pytest.mark.one_process
@pytest.mark.requirement("P7", "H2")
@pytest.mark.parametrize(
    ("answer", "is_believed_at_once"),
    [
        (UNRECOGNIZED, True),
        pytest.param(HTML, True, marks=pytest.mark.slow),
        pytest.param(HTML_200, True, marks=pytest.mark.slow),
        pytest.param((200, {}), True, marks=pytest.mark.slow),
        ((403, {"errcode": "M_FORBIDDEN"}), False),
        ((404, b'""'), True),
        (DEEP_200, True),
    ],
    ids=["unrecognized", "html", "html-200", "no-pdus", "forbidden", "not-found", "deep"],
)
def test_an_answer_that_says_nothing(
    three: list[Homeserver], peer: Peer, answer: tuple[int, Any], is_believed_at_once: bool
) -> None:
    server = three[0]
    alice = server.user()
    room_id = alice.create_room()
    old = [alice.send_sticky(room_id) for _ in range(20)]
    answering = Answering(peer, ("/backfill/", answer), ("/event/", answer))
    warned = len(warnings(server))
    peer.join(server, room_id, peer.user("eve"))
    wait_until(lambda: len(peer.received) >= len(old), "the events")
    wait_until_all_pushed(server, room_id)
    assert Counter(map(id, peer.received)).most_common(1)[0][1] == 1
    assert len(peer.received) == len(old)
    assert len(answering.asked_s) == (1 if is_believed_at_once else 3)
    assert len(warnings(server)) - warned == is_believed_at_once


@pytest.mark.slow
@pytest.mark.one_process
@pytest.mark.requirement("P7", "H2", "H7")
def test_an_error_for_an_event_may_pass(servers: Servers, peer: Peer) -> None:
    (server,) = servers({"config": {**NO_LIMITS, "joins": {"retry_max": "1s"}}})
    alice = server.user()
    room_id = alice.create_room()
    taken, *refused = [alice.send_sticky(room_id) for _ in range(10)]
    peer.refuses = {*refused}.__contains__
    peer.join(server, room_id, peer.user("eve"))
    wait_until(lambda: len(peer.received) >= 1 + 2 * len(refused), "all to be sent again")
    assert taken in peer.events
    assert server.log_has(f"{peer.name} refuses {len(refused)} events of {room_id}")
    times = Counter(pdu["hashes"]["sha256"] for pdu in peer.received)
    assert min(times.values()) == 1
    assert max(times.values()) <= 3, "one at a time, another one each time"
    # Whatever it was, it has passed.
    peer.refuses = lambda event_id: False
    wait_until(lambda: {*refused} <= peer.events.keys(), "all to be taken")
    wait_until_all_pushed(server, room_id)


@pytest.mark.one_process
@pytest.mark.requirement("P7", "H4")
def test_the_questions_to_one_server_are_apart(three: list[Homeserver], peer: Peer) -> None:
    server = three[0]
    alice = server.user()
    room_ids = [alice.create_room() for _ in range(8)]
    answering = Answering(peer)
    for room_id in room_ids:
        for _ in range(3):
            alice.send_sticky(room_id)
        peer.join(server, room_id, peer.user("eve"))
    for room_id in room_ids:
        wait_until_all_pushed(server, room_id)
    # What is there, and whether some of that are outliers.
    assert len(answering.asked_s) == 2 * len(room_ids)
    for before_s, after_s in zip(answering.asked_s, answering.asked_s[1:], strict=False):
        assert after_s - before_s > APART_MS / 1000 / 2  # as the peer saw it


@pytest.mark.one_process
@pytest.mark.requirement("P3", "D7")
def test_who_is_there_comes_before_a_flood_of_before(servers: Servers, peer: Peer) -> None:
    """A user's newest event shows whether the user is there, whatever others sent since."""
    (server,) = servers(SENDER)
    mallory, *others = (server.user() for _ in range(11))
    room_id = room_of(mallory, *others, via=server)
    there = {user.send_sticky(room_id, content={"user": user.user_id}) for user in others}
    flood = [mallory.send_sticky(room_id, content={"number": n}) for n in range(120)]
    peer.join(server, room_id, peer.user("eve"))
    wait_until(lambda: len(peer.received) == len(there) + len(flood), "all the rest, too")
    senders = [pdu["sender"] for pdu in peer.received]
    behind = [place for place, sender in enumerate(senders) if sender != mallory.user_id]
    # A window of 48 goes out at once, and one event before, to see whether it takes any.
    assert max(behind) < 48 + 1
    numbers = [pdu["content"].get("number") for pdu in peer.received]
    assert numbers.index(119) < 48 + 1


@pytest.mark.slow
@pytest.mark.one_process
@pytest.mark.requirement("P3", "H3")
def test_leaving_and_joining_again_and_again(servers: Servers) -> None:
    a, c = servers(SENDER, with_ledger())
    alice, carol = a.user(), c.user()
    room_id = room_of(alice, via=a)
    old = send_old_events(room_id, [alice], 50)
    carol.join(room_id, a.name)
    wait_until_all_sticky(c, old)
    wait_until_all_pushed(a, room_id)
    sent, asked_before = sum(times_sent(c).values()), len(questions(c))
    joined = joined_line(c, room_id)
    for times in range(2, 6):
        carol.leave(room_id)
        wait_until_gone(alice, room_id, carol)
        carol.join(room_id, a.name)
        wait_until(lambda: a.output().count(joined) == times, "the join to be seen")  # noqa: B023
    # Two questions a join say whether it still has what it had, then the push ends.
    new = alice.send_sticky(room_id)
    wait_until_sticky(c, new)
    wait_until(lambda: len(questions(c)) > asked_before, "the question", 120)
    wait_until_all_pushed(a, room_id)
    asked = questions(c)[asked_before:]
    assert {q.code for q in asked} <= {200, 403}, "it had left again, or has what it had"
    assert len(asked) <= 2 * 5
    assert sum(times_sent(c).values()) - sent == 1


@pytest.mark.slow
@pytest.mark.one_process
@pytest.mark.requirement("P3", "P7")
def test_joining_again_after_a_purge(servers: Servers) -> None:
    a, c = servers(SENDER, {"module": False})
    alice, carol = a.user(), c.user()
    room_id = room_of(alice, via=a)
    old = send_old_events(room_id, [alice], 10)
    carol.join(room_id, a.name)
    wait_until_all_sticky(c, old)
    wait_until_all_pushed(a, room_id)
    carol.leave(room_id)
    wait_until_gone(alice, room_id, carol)
    admin = c.user(admin=True)
    path = f"/_synapse/admin/v1/rooms/{quote(room_id)}"
    admin.request("DELETE", path, {"purge": True})
    assert not c.query("SELECT 1 FROM sticky_events WHERE room_id = ?", room_id)
    carol.join(room_id, a.name)
    wait_until_all_sticky(c, old)


@pytest.mark.slow
@pytest.mark.one_process
@pytest.mark.requirement("P7", "L3")
def test_what_a_plain_newcomer_prunes_is_sent_again(servers: Servers) -> None:
    wide = {**NO_LIMITS, "joins": {"window": 99}}
    a, c = servers({"config": wide, "forwarded": True}, with_ledger())
    assert a.forwarder is not None
    alice, carol = a.user(), c.user()
    room_id = room_of(alice, via=a)
    old = send_old_events(room_id, [alice], 150)
    carol.join(room_id, a.name)
    # It cannot fetch what it lacks, and goes no further.
    a.forwarder.offline()
    a.forwarder.hold()
    a.forwarder.online()
    for _ in range(100):
        alice.send(room_id)
    staged = "SELECT COUNT(*) FROM federation_inbound_events_staging"
    wait_until(lambda: c.query(staged)[0][0] > 110, "more to be staged than it keeps")
    a.forwarder.release()
    wait_until_all_sticky(c, old)
    assert c.log_has("from federation queue")
    wait_until(lambda: a.log_has("pruned events of"), "the loss to be noticed", 120)
    wait_until_all_pushed(a, room_id)
    assert max(times_sent(c).values()) <= MOST_SENDS


@pytest.mark.one_process
@pytest.mark.requirement("P7", "H1")
def test_a_404_that_cannot_be_parsed(servers: Servers, peer: Peer) -> None:
    """Who joins again, and names nothing of what it had, is asked for one event; that it lacks it
    is not what this says."""
    (server,) = servers(SENDER)
    alice, eve = server.user(), peer.user("eve")
    room_id = alice.create_room()
    old = [alice.send_sticky(room_id) for _ in range(3)]
    peer.join(server, room_id, eve)
    wait_until(lambda: len(peer.received) >= len(old), "the events")
    wait_until_all_pushed(server, room_id)
    alice.kick(room_id, eve)
    nothing = (200, {"origin": peer.name, "origin_server_ts": 0, "pdus": []})
    answering = Answering(peer, ("/backfill/", nothing), ("/event/", DEEP_404))
    peer.join(server, room_id, eve)
    wait_until(lambda: answering.asked_s, "the question")
    wait_until(lambda: server.log_has("does not say which events it has (404"), "what it says")
    assert set(old) <= peer.events.keys()
    assert "Traceback" not in server.output()
