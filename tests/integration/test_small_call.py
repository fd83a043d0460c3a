"""The small call that the demo ends with: nobody is lacked, and nobody shown who is gone."""

import pytest

from benchmarks.call.small import RIGHT, Shown, SmallCall, play
from tests.conftest import Servers

PLAIN, MODULE = "plain", "module"
BEFORE_JOIN, AFTER_JOIN = ("A", "B"), ("A", "B", "C")


@pytest.mark.requirement("P3", "D4")
def test_in_a_small_call_nobody_is_lacked_and_nobody_is_a_ghost(servers: Servers) -> None:
    calls = {
        PLAIN: SmallCall(servers(*({"module": False},) * 3), 6),
        MODULE: SmallCall(servers(3), 60),
    }
    rows = play(calls)
    assert [row.there for row in rows] == [12, 8, 8, 8, 9, 0]
    for number, row in enumerate(rows):
        observers = BEFORE_JOIN if number < 3 else AFTER_JOIN
        assert row.shown[MODULE] == dict.fromkeys(observers, RIGHT), row
    # The same story shows what is lacked: a plain newcomer has only what came after its join.
    after_join, came_back = (row.shown[PLAIN]["C"] for row in rows[3:5])
    assert after_join == Shown(missing=8, ghosts=0)
    assert came_back.missing >= 6
