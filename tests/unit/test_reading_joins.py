"""When joins are read from the state changes, and when a look at positions suffices (H1, P3)."""

from typing import Any

import pytest

from synapse_sticky.handlers.joins.detection.reader import JoinReader
from tests.unit.process import Process
from tests.unit.test_apart import Changes


class Quiet(Changes):
    """Changes of rooms at few of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.now_at = 0
        self.changed_at = 0

    def state_position(self) -> int:
        return self.now_at

    def may_have_changed(self, after: int) -> bool:
        return self.changed_at > after

    async def page(self, *, after: int, up_to: int) -> tuple[int, list[Any]]:
        self.reads += 1
        return up_to, []


class Counting(Process):
    """Counts what it runs by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.started = 0

    def in_background(self, what: str, function: Any, *args: Any) -> None:
        self.started += 1
        super().in_background(what, function, *args)


def following() -> tuple[Counting, Quiet, JoinReader]:
    process, changes = Counting(), Quiet()
    hs: Any = process
    table: Any = changes
    reader = JoinReader(hs, changes, changes, table, lambda joins, own, until: None)
    reader.start(0)
    return process, changes, reader


def pass_events(changes: Quiet, reader: JoinReader, count: int) -> None:
    for _ in range(count):
        changes.now_at += 1
        reader.wake()


@pytest.mark.requirement("H1")
def test_for_events_that_change_no_state_nothing_is_started() -> None:
    process, changes, reader = following()
    pass_events(changes, reader, 900)
    assert (process.started, changes.reads, changes.positions) == (0, 0, [])


@pytest.mark.requirement("H1", "P3")
def test_a_change_is_read_with_all_that_came_since() -> None:
    process, changes, reader = following()
    pass_events(changes, reader, 50)
    changes.changed_at = 51
    pass_events(changes, reader, 1)
    assert (process.started, changes.reads) == (1, 1)
    pass_events(changes, reader, 50)
    assert (process.started, changes.reads) == (1, 1)


@pytest.mark.requirement("H1", "P3", "E4")
def test_a_change_that_could_not_be_read_is_not_passed_over() -> None:
    process, changes, reader = following()
    changes.changed_at = 1

    async def fail(*, after: int, up_to: int) -> tuple[int, list[Any]]:
        raise OSError("the connection is lost")

    changes.page = fail  # type: ignore[method-assign]
    pass_events(changes, reader, 100)
    assert process.started == 1, "the rest is up to the backoff"
    del changes.page
    process.pass_ms(60_000)
    assert changes.reads == 1


@pytest.mark.requirement("H1", "E4")
def test_the_position_is_stored_now_and_then() -> None:
    process, changes, reader = following()
    for _ in range(10):
        pass_events(changes, reader, 500)
    first = len(changes.positions)
    assert first <= 1, "not more often than once a minute"
    for _ in range(10):
        process.pass_ms(61_000)
        pass_events(changes, reader, 500)
    assert first < len(changes.positions) <= first + 5
    assert changes.now_at - changes.position < 1_500
