"""How often parked PDUs are tried."""

import random

import pytest

from synapse_sticky.handlers.staging.parking.pace import (
    EACH_RARE_MS,
    LONGEST_DELAY_MS,
    ROUNDS,
    Pace,
    Paces,
    Pair,
)

HOUR_MS = 3_600_000


class Rounds:
    """All parked PDUs are tried whenever they may be. Each round takes no time."""

    def __init__(self, *pairs: Pair) -> None:
        random.seed(1)
        self.paces = Paces()
        self.now_ms = 0
        self.begun: dict[Pair, list[int]] = {pair: [] for pair in pairs}
        for pair in pairs:
            self.pace(pair)

    def pace(self, pair: Pair) -> Pace:
        return self.paces.of(pair)

    def run(self, for_ms: int, *, lacks: bool = True) -> None:
        for _ in range(for_ms // 1_000):
            self.now_ms += 1_000
            for pair, begun in self.begun.items():
                pace = self.pace(pair)
                if pace.may_begin(self.now_ms, self.paces.share_ms(pair[0], self.now_ms)):
                    begun.append(self.now_ms)
                    pace.begin(["$parked"], self.now_ms)
                    self.end(pair, lacks=lacks)

    def end(self, pair: Pair, *, has_progress: bool = False, lacks: bool = True) -> bool:
        rooms = self.paces.rooms(pair[0])
        answers = self.pace(pair).ended(has_progress, rooms, self.now_ms, lacks=lacks)
        self.paces.note(pair)
        return answers

    def in_last(self, for_ms: int, *pairs: Pair) -> int:
        """How many rounds of these began lately, of all if none is named."""
        return sum(
            sum(ms > self.now_ms - for_ms for ms in begun)
            for pair, begun in self.begun.items()
            if pair in pairs or not pairs
        )


@pytest.mark.requirement("H2", "L3")
def test_few_are_tried_as_often_as_before() -> None:
    rounds = Rounds(("there", "!room"), ("elsewhere", "!room"))
    rounds.run(HOUR_MS)
    assert rounds.pace(("there", "!room")).is_rare
    assert rounds.in_last(HOUR_MS // 2) >= 2 * HOUR_MS // 2 // (ROUNDS.max_ms + 1_000)


@pytest.mark.requirement("H2", "L3")
def test_rounds_that_fail_here_do_not() -> None:
    """The database, say, does not take what lacks nothing."""
    rounds = Rounds(*((f"s{s}", "!room") for s in range(100)))
    rounds.run(HOUR_MS, lacks=False)
    assert rounds.in_last(HOUR_MS // 2) >= 100 * HOUR_MS // 2 // (ROUNDS.max_ms + 1_000)


@pytest.mark.requirement("H1", "H3")
@pytest.mark.parametrize(("servers", "rooms"), [(1, 400), (100, 12), (1_000, 1)])
def test_all_rare_rounds_are_few_and_another_server_has_its_share(servers: int, rooms: int) -> None:
    strangers = [(f"s{s}", f"!{r}") for s in range(servers) for r in range(rooms)]
    honest = ("honest", "!room")
    rounds = Rounds(*strangers, honest, *(("honest", f"!fine{n}") for n in range(50)))
    rounds.run(HOUR_MS // 4)
    for pair in rounds.begun:
        if "!fine" in pair[1]:
            rounds.end(pair, has_progress=True)
    last_ms = HOUR_MS // 3
    for pair in [pair for pair in rounds.begun if "!fine" in pair[1]]:
        del rounds.begun[pair]
    rounds.run(2 * last_ms)
    assert rounds.in_last(last_ms) <= last_ms // EACH_RARE_MS * 5 // 4
    # A server with PDUs parked in 51 rooms has two rounds a second as well.
    share_ms = max(3 * (servers + 1) * EACH_RARE_MS // 2, 51 * 500) + 1_000
    assert rounds.in_last(last_ms, honest) >= last_ms // share_ms - 1
    # The first time that something of it is persisted, it is as before.
    rounds.pace(honest).begin(["$parked"], rounds.now_ms)
    assert rounds.end(honest, has_progress=True)
    assert rounds.pace(honest).may_begin(
        rounds.now_ms, rounds.paces.share_ms("honest", rounds.now_ms)
    )
    assert rounds.pace(honest).at_once > 2


@pytest.mark.requirement("H2")
def test_a_share_grows_when_the_others_are_gone() -> None:
    strangers = [(f"s{s}", "!room") for s in range(400)]
    mine = [("honest", f"!{n}") for n in range(30)]
    rounds = Rounds(*strangers, *mine)
    rounds.run(HOUR_MS // 2)
    assert rounds.in_last(HOUR_MS // 4, *mine) <= 5
    for pair in strangers:
        rounds.end(pair, has_progress=True)
        del rounds.begun[pair]
    for pair in mine:
        rounds.pace(pair).begins_nothing(rounds.now_ms, 10 * HOUR_MS)
        look_ms = rounds.pace(pair).look_ms
        assert look_ms is not None
        assert look_ms <= rounds.now_ms + LONGEST_DELAY_MS
    rounds.run(3 * len(mine) * EACH_RARE_MS // 2)
    assert rounds.in_last(3 * len(mine) * EACH_RARE_MS // 2, *mine) >= len(mine)


@pytest.mark.requirement("H2", "H3")
def test_what_is_rare_is_not_tried_sooner_as_its_server_answers_something_else() -> None:
    rare, other = ("there", "!rare"), ("there", "!other")
    rounds = Rounds(rare, other, *((f"s{s}", "!room") for s in range(50)))
    rounds.run(600_000)
    rounds.end(other, has_progress=True)
    before = {pair: len(begun) for pair, begun in rounds.begun.items()}
    for _ in range(30):
        rounds.paces.wake("there", rounds.now_ms)
        rounds.run(2_000)
    assert len(rounds.begun[rare]) <= before[rare] + 1
    assert len(rounds.begun[other]) >= before[other] + 5


@pytest.mark.requirement("H3")
@pytest.mark.parametrize("expires_after_ms", [30_000, 75_000])
def test_what_expires_and_comes_again_is_not_tried_more_often(expires_after_ms: int) -> None:
    pairs = [(f"s{s}", "!room") for s in range(200)]
    rounds = Rounds(*pairs)
    for _ in range(HOUR_MS // expires_after_ms):
        for pair in pairs:
            rounds.paces.forget(pair)
        rounds.run(expires_after_ms)
    last_ms = HOUR_MS // 2
    assert 0 < rounds.in_last(last_ms) <= last_ms // EACH_RARE_MS * 5 // 4
    # Some time later it is another matter, whoever comes or stays.
    for pair in pairs:
        rounds.paces.forget(pair)
    honest = ("honest", "!room")
    rounds.begun = {honest: []}
    rounds.run(600_000)
    assert rounds.pace(honest).is_rare
    assert rounds.paces.share_ms("honest", rounds.now_ms) == 201 * EACH_RARE_MS
    rounds.run(HOUR_MS)
    assert rounds.paces.share_ms("honest", rounds.now_ms) == EACH_RARE_MS


@pytest.mark.requirement("H3")
def test_what_else_brings_a_missing_event_is_seen_within_a_minute() -> None:
    rounds = Rounds(("there", "!room"), *((f"s{s}", "!room") for s in range(1_000)))
    pace = rounds.pace(("there", "!room"))
    assert pace.look_again_ms(0, 0) == ROUNDS.max_ms
    rounds.run(HOUR_MS // 4)
    assert pace.is_rare
    assert not pace.may_begin(rounds.now_ms, rounds.paces.share_ms("there", rounds.now_ms))
    assert (
        pace.look_again_ms(rounds.now_ms, rounds.paces.share_ms("there", rounds.now_ms))
        <= LONGEST_DELAY_MS
    )
