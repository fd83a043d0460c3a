"""What another server refuses in its answer to /send (P7), as Synapse's client gets the answer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synapse.federation.units import Transaction

from synapse_sticky.handlers.joins.synapse import SynapseFederation
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.rooms import Rooms
from tests.unit.test_limits_in_synapse import done, make_homeserver

PDUS = [{"room_id": "!one:here"}, {"room_id": "!two:here"}, {"room_id": "!one:here"}]


class Sending:
    """Sends a transaction with Synapse's own client; below it is no network."""

    def __init__(self, folder: Path) -> None:
        hs = make_homeserver(folder)
        self.homeserver = Homeserver(hs.get_module_api())
        self.federation = SynapseFederation(self.homeserver, Rooms(self.homeserver))
        self.refused: list[tuple[str, set[str], list[str]]] = []
        self.federation.on_refused(self._note)
        self.client: Any = hs.get_federation_transport_client()

    async def _note(self, *refused: Any) -> None:
        self.refused.append(refused)

    def send(self, answer: Any) -> Any:
        async def put_json(destination: str, **options: Any) -> Any:
            return answer

        self.client.client.put_json = put_json
        transaction = Transaction("1", "here", "there", 5, PDUS, [])
        return done(self.client.send_transaction(transaction, dict))


@pytest.fixture
def sending(tmp_path: Path) -> Iterator[Sending]:
    started = Sending(tmp_path)
    yield started
    started.homeserver.close()


@pytest.mark.requirement("P7")
def test_an_error_is_a_refusal_and_nothing_else_is(sending: Sending) -> None:
    answer = {"pdus": {"$taken": {}, "$refused": {"error": "no"}, "$strange": 5}}
    assert sending.send(answer) is answer
    assert sending.refused == [("there", {"!one:here", "!two:here"}, ["$refused", "$strange"])]


@pytest.mark.requirement("P7")
@pytest.mark.parametrize("answer", [{}, {"pdus": {}}, {"pdus": {"$taken": {}}}, {"pdus": []}, []])
def test_any_other_answer_refuses_nothing(sending: Sending, answer: Any) -> None:
    assert sending.send(answer) is answer
    assert sending.refused == []


@pytest.mark.requirement("P7", "H1")
def test_a_failure_does_not_fail_the_transaction(
    sending: Sending, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*refused: object) -> None:
        raise ValueError("a bug")

    sending.federation.on_refused(fail)
    answer = {"pdus": {"$refused": {"error": "no"}}}
    assert sending.send(answer) is answer
    assert "Could not take in what there refused" in caplog.text


def add_rooms(sending: Sending) -> None:
    def write_txn(txn: Any) -> None:
        txn.execute_batch(
            "INSERT INTO rooms (room_id, room_version, is_public) VALUES (?, '11', ?)",
            [("!one:here", False), ("!two:here", False)],
        )

    done(sending.homeserver.transact("test", write_txn))


def backlog_of(sending: Sending, destination: str = "there") -> list[tuple[str, int]]:
    return sorted(done(sending.federation.backlog(destination)))


@pytest.mark.requirement("H7", "E4")
def test_what_is_refused_enters_the_backlog_and_never_moves_it_on(sending: Sending) -> None:
    add_rooms(sending)
    for position in (20, 10, 30):
        some = [("there", "!one:here", position), ("there", "!two:here", position + 1)]
        done(sending.federation.add_to_backlog([*some, ("there", "!gone:here", 5)]))
    done(sending.federation.add_to_backlog([("elsewhere", "!one:here", 40)]))
    assert backlog_of(sending) == [("!one:here", 10), ("!two:here", 11)]
    assert backlog_of(sending, "elsewhere") == [("!one:here", 40)]


@pytest.mark.requirement("H7", "P2")
@pytest.mark.parametrize("last", [None, 5])
def test_what_is_sticky_for_a_server_that_was_never_reached(
    sending: Sending, last: int | None
) -> None:
    add_rooms(sending)
    now_ms = sending.homeserver.now_ms()

    def add_events(txn: Any) -> None:
        txn.execute(
            "INSERT INTO destinations (destination, last_successful_stream_ordering)"
            " VALUES ('there', ?), ('elsewhere', 5)",
            (last,),
        )
        tried = [("there", "!one:here"), ("there", "!two:here"), ("elsewhere", "!one:here")]
        txn.execute_batch("INSERT INTO destination_rooms VALUES (?, ?, 9)", tried)
        txn.execute_batch(
            "INSERT INTO sticky_events (stream_id, instance_name, event_id, event_stream_ordering,"
            " room_id, sender, expires_at) VALUES (?, 'master', ?, ?, ?, ?, ?)",
            [
                (1, "$1", 1, "!one:here", "@alice:here", now_ms - 1),
                (2, "$2", 2, "!one:here", "@bob:there", now_ms + 60_000),
                (3, "$3", 3, "!one:here", "@alice:here", now_ms + 60_000),
                (4, "$4", 4, "!one:here", "@alice:here", now_ms + 60_000),
                (5, "$5", 5, "!two:here", "@bob:there", now_ms + 60_000),
            ],
        )

    done(sending.homeserver.transact("test", add_events))
    done(sending.federation.add_if_never_reached("there"))
    assert backlog_of(sending) == ([("!one:here", 3)] if last is None else [])
