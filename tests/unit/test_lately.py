"""What limits did lately to the events of each server (E3)."""

import pytest

from synapse_sticky import lately
from synapse_sticky.lately import Lately
from synapse_sticky.limits import LimitReport
from tests.unit.settable import METRICS

HALF_AN_HOUR_MS = 1_800_000


class Clock:
    def __init__(self) -> None:
        self.ms = 1_800_000_000_000

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def found(clock: Clock) -> Lately:
    made = Lately(clock)
    made.recorded |= {"refused", "deferred"}
    return made


@pytest.mark.requirement("E3")
def test_the_last_half_hour_and_the_one_before_count(clock: Clock, found: Lately) -> None:
    start_ms = clock.ms
    found.count("refused", "per_server", "there", 5)
    clock.ms += HALF_AN_HOUR_MS
    found.count("refused", "per_server", "there", 2)
    assert (found.of("refused", "there"), found.since_ms) == ({"per_server": 7}, start_ms)
    clock.ms += HALF_AN_HOUR_MS
    assert found.of("refused", "there") == {"per_server": 2}
    assert found.since_ms == start_ms + HALF_AN_HOUR_MS
    clock.ms += 2 * HALF_AN_HOUR_MS
    assert (found.of("refused", "there"), found.since_ms) == ({}, clock.ms)
    # A clock that is set back.
    found.count("refused", "per_server", "there", 3)
    clock.ms -= 10 * HALF_AN_HOUR_MS
    assert (found.of("refused", "there"), found.since_ms) == ({}, clock.ms)


@pytest.mark.requirement("E3")
def test_a_process_that_refuses_nothing_cannot_tell(clock: Clock) -> None:
    found = Lately(clock)
    found.recorded.add("deferred")
    assert (found.of("refused", "there"), found.of("deferred", "there")) == (None, {})


@pytest.mark.requirement("H3")
def test_of_many_servers_the_last_ones_are_known(
    found: Lately, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lately, "MOST_SERVERS", 3)
    for number in range(3):
        found.count("refused", "per_server", f"server{number}", 1 + number)
    found.count("refused", "per_server", "server0", 1)
    found.count("refused", "per_server", "another", 9)
    assert found.most("refused", 2) == [("another", 9), ("server2", 3)]
    assert found.of("refused", "server1") == {}
    assert found.of("refused", "server0") == {"per_server": 2}


@pytest.mark.requirement("E3")
def test_reports_are_counted_for_their_servers(clock: Clock, found: Lately) -> None:
    report = LimitReport(clock, METRICS.limits, found)
    report.refused("per_server", "there", "", 1_000, 4)
    report.refused("per_user", "@alice:here", "", 1_000, 1)
    report.deferred("per_room", "there", "!room", 1, 1_000, "@eve:there")
    assert found.of("refused", "there") == {"per_server": 4}
    assert found.of("deferred", "there") == {"per_room": 1}
    assert found.most("refused", 9) == [("there", 4)]
