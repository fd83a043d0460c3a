"""Events that are persisted together, of which the database does not take one (H1)."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import attr
import pytest
from synapse.api.errors import SynapseError
from synapse.logging.context import LoggingContext  # type: ignore[attr-defined]
from synapse.storage.controllers.persist_events import _EventPeristenceQueue, _PersistEventsTask
from twisted.enterprise.adbapi import ConnectionLost
from twisted.internet import defer

from synapse_sticky.handlers.staging.batches import suspects
from synapse_sticky.handlers.staging.batches.synapse import Batches
from synapse_sticky.homeserver.causes import Verdict
from tests.unit.test_causes import of_postgres, of_sqlite, staging_of

ROOM = "!room:test"


@attr.s(auto_attribs=True, frozen=True, eq=False)
class Event:
    """One that fails so."""

    event_id: str
    error: Exception | None = None
    is_sticky: bool = True

    def sticky_duration(self) -> int | None:
        return 1 if self.is_sticky else None


class Persisting:
    """Synapse's own queue, what it persists, and in which batches."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.persisted: list[str] = []
        self.gate: defer.Deferred[None] = defer.Deferred()
        hs: Any = SimpleNamespace(
            run_as_background_process=lambda what, function: defer.ensureDeferred(function())
        )
        self.queue: Any = _EventPeristenceQueue(hs, "test", self._persist)  # type: ignore[arg-type]
        persistence = SimpleNamespace(_event_persist_queue=self.queue)
        hs.get_storage_controllers = lambda: SimpleNamespace(persistence=persistence)

        def replace(owner: object, name: str, make: Callable[..., Any]) -> None:
            setattr(owner, name, make(getattr(owner, name)))

        homeserver: Any = SimpleNamespace(hs=hs, replace=replace)
        self.installed = Batches(homeserver, staging_of().verdict_of)
        self.installed.install()

    async def _persist(self, room_id: str, task: _PersistEventsTask) -> dict[str, str]:
        events: Any = [event for event, _ in task.events_and_contexts]
        self.batches.append([event.event_id for event in events])
        await self.gate
        for event in events:
            if event.error is not None:
                raise event.error
        self.persisted += self.batches[-1]
        return {f"replaced by {event.event_id}": event.event_id for event in events}

    def add(self, *events: Event) -> "defer.Deferred[Any]":
        task = _PersistEventsTask([(event, None) for event in events], False)  # type: ignore[misc]
        return defer.ensureDeferred(self.queue.add_to_queue(ROOM, task))

    def outcomes(self, *parts: list[Event]) -> list[Any]:
        """What each part's sender is told, all but the first being in one batch."""
        with LoggingContext(name="test", server_name="test"):
            waiting = [self.add(*events) for events in parts]
            if not self.gate.called:
                self.gate.callback(None)
        told: list[Any] = [None] * len(parts)
        for number, deferred in enumerate(waiting):

            def note(result: Any, number: int = number) -> None:
                told[number] = getattr(result, "value", result)

            deferred.addBoth(note)
        return told


@pytest.mark.requirement("H1")
@pytest.mark.parametrize(
    "error",
    [
        *map(of_postgres, ("54000", "57014", "XX000")),
        of_sqlite("SQLITE_ERROR"),
        SynapseError(500, "Internal server error"),
    ],
    ids=repr,
)
def test_only_what_is_not_taken_fails(error: Exception) -> None:
    persisting = Persisting()
    parts = [[Event("$0")], [Event("$1")], [Event("$2"), Event("$bad", error)], [Event("$3")]]
    first, second, bad, third = persisting.outcomes(*parts)
    assert persisting.batches == [
        ["$0"],
        ["$1", "$2", "$bad", "$3"],
        ["$1"],
        ["$2", "$bad"],
        ["$3"],
    ]
    assert persisting.persisted == ["$0", "$1", "$3"]
    assert bad is error
    assert first == {"replaced by $0": "$0"}
    assert second == third == {"replaced by $1": "$1", "replaced by $3": "$3"}
    assert persisting.installed._parts == {}


@pytest.mark.requirement("H1")
@pytest.mark.parametrize(
    ("sqlstate", "is_sticky"),
    [("08006", True), ("53100", True), ("54000", False), ("57014", False)],
)
def test_other_batches_fail_as_they_do_without(sqlstate: str, is_sticky: bool) -> None:
    """The database may be away, and what is not sticky is not for the module."""
    persisting, error = Persisting(), of_postgres(sqlstate)
    parts = [[Event("$0")], [Event("$1", None, is_sticky)], [Event("$bad", error, is_sticky)]]
    assert persisting.outcomes(*parts)[1:] == [error, error]
    assert persisting.batches == [["$0"], ["$1", "$bad"]]
    assert persisting.installed._parts == {}


POISON = "$poison"


def verdict_on(persisting: Persisting, event: Event) -> Verdict | None:
    """What the receiving process makes of the error; None if the event was persisted."""
    (told,) = persisting.outcomes([event])
    return staging_of().verdict_of(told) if isinstance(told, Exception) else None


@pytest.mark.requirement("H2")
@pytest.mark.parametrize("error", [of_postgres(None), of_postgres("57P02"), ConnectionLost()])
def test_an_event_that_ends_its_connection_each_time_is_not_tried_for_long(
    error: Exception,
) -> None:
    """Others are persisted in between, so the database is there."""
    persisting = Persisting()
    poison, said = Event(POISON, error), []
    for number in range(15):
        assert verdict_on(persisting, Event(f"${number}", None, number % 2 == 0)) is None
        said.append(verdict_on(persisting, poison))
    assert said == [Verdict.PASSES] * 9 + [Verdict.UNKNOWN] * 6
    # It is the event's own doing, and no other's.
    assert verdict_on(persisting, Event("$other", error)) is Verdict.PASSES
    assert verdict_on(persisting, Event(POISON)) is None
    assert verdict_on(persisting, poison) is Verdict.PASSES, "it begins anew"


@pytest.mark.requirement("L3")
def test_while_the_database_is_away_no_event_is_to_blame() -> None:
    persisting = Persisting()
    events = [Event(f"${number}", of_postgres(None)) for number in range(3)]
    for _ in range(50):
        assert {verdict_on(persisting, event) for event in events} == {Verdict.PASSES}


@pytest.mark.requirement("L3")
@pytest.mark.parametrize("sqlstate", ["53100", "40001", "57P01"])
def test_no_event_is_to_blame_for_what_does_not_end_the_connection(sqlstate: str) -> None:
    persisting = Persisting()
    for number in range(20):
        assert verdict_on(persisting, Event(f"${number}")) is None
        assert verdict_on(persisting, Event(POISON, of_postgres(sqlstate))) is Verdict.PASSES


@pytest.mark.requirement("H3")
def test_what_is_remembered_of_events_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "_MOST", 3)
    persisting = Persisting()
    for number in range(10):
        verdict_on(persisting, Event(f"${number}", of_postgres(None)))
    assert [*persisting.installed._suspects._failed] == ["$7", "$8", "$9"]
