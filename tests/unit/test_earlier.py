"""What is remembered of earlier pushes, so that who comes and goes is not sent everything (H3)."""

import itertools

import pytest

from synapse_sticky.handlers.joins.earlier import MOST_REMEMBERED, EarlierPushes

NOW_MS = 1_000_000
HOUR_MS = 3_600_000


@pytest.mark.requirement("H3")
def test_what_was_confirmed_within_the_hour_is_not_pushed_again() -> None:
    earlier = EarlierPushes()
    assert earlier.begin("there", "!room", NOW_MS) == (0, NOW_MS)
    earlier.note("there", "!room", 50, NOW_MS)
    earlier.note("there", "!room", 40, NOW_MS)
    assert earlier.begin("there", "!room", NOW_MS + HOUR_MS)[0] == 50
    assert earlier.begin("there", "!other", NOW_MS)[0] == 0
    assert earlier.begin("there", "!room", NOW_MS + 2 * HOUR_MS + 1) == (
        0,
        NOW_MS + 2 * HOUR_MS + 1,
    )


@pytest.mark.requirement("H2", "H3")
def test_pushes_of_one_room_to_one_server_are_ever_further_apart() -> None:
    earlier = EarlierPushes()
    begun_ms = [NOW_MS]
    now_ms = NOW_MS
    while now_ms < NOW_MS + HOUR_MS:  # it joins again each second
        _, not_before_ms = earlier.begin("there", "!room", now_ms)
        if not_before_ms != begun_ms[-1]:
            begun_ms.append(not_before_ms)
        now_ms += 1_000
    apart_ms = [after - before for before, after in itertools.pairwise(begun_ms)]
    assert 4_000 <= apart_ms[0] <= 7_000
    assert 8_000 <= apart_ms[1] <= 13_000
    assert len(begun_ms) <= 22
    assert max(apart_ms) <= 361_000
    assert begun_ms[-1] - now_ms <= 361_000, "it is not put off further by each join"


@pytest.mark.requirement("H3")
def test_memory_is_bounded() -> None:
    earlier = EarlierPushes()
    for number in range(2 * MOST_REMEMBERED):
        earlier.note("there", f"!{number}", 5, NOW_MS)
        earlier.note("there", "!often", 7, NOW_MS)
    assert earlier.begin("there", f"!{MOST_REMEMBERED - 1}", NOW_MS)[0] == 0
    assert earlier.begin("there", f"!{2 * MOST_REMEMBERED - 1}", NOW_MS)[0] == 5
    assert earlier.begin("there", "!often", NOW_MS)[0] == 7
