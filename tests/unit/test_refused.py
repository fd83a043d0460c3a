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
        self.federation.on_refused(lambda *refused: self.refused.append(refused))
        self.client: Any = hs.get_federation_transport_client()

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
    def fail(*refused: object) -> None:
        raise ValueError("a bug")

    sending.federation.on_refused(fail)
    answer = {"pdus": {"$refused": {"error": "no"}}}
    assert sending.send(answer) is answer
    assert "Could not take in what there refused" in caplog.text
