"""How often parked PDUs are tried."""

import pytest

from synapse_sticky.handlers.staging.parking.pace import IN_VAIN, LONGEST_DELAY_MS, ROUNDS, Paces

HOUR_MS = 3_600_000


class Rounds:
    """All parked PDUs are tried whenever they may be. Each round takes no time."""

    def __init__(self, *pairs: tuple[str, str]) -> None:
        self.paces = Paces()
        self.now_ms = 0
        # By origin and room, and when each began.
        self.begun: dict[tuple[str, str], list[int]] = {pair: [] for pair in pairs}
        for pair in pairs:
            self.paces.of(pair)

    def run(self, for_ms: int) -> None:
        for _ in range(for_ms // 1_000):
            self.now_ms += 1_000
            for pair, begun in self.begun.items():
                pace = self.paces.of(pair)
                if pace.may_begin(self.now_ms):
                    begun.append(self.now_ms)
                    pace.begin(["$parked"], self.now_ms)
                    self.end(pair, has_progress=False)

    def end(self, pair: tuple[str, str], *, has_progress: bool) -> bool:
        rooms, servers = self.paces.rooms(pair[0]), self.paces.in_vain()
        return self.paces.of(pair).ended(has_progress, rooms, servers, self.now_ms)

    def in_last(self, for_ms: int, *origins: str) -> int:
        """How many rounds of these origins began lately, of all if none is named."""
        return sum(
            sum(ms > self.now_ms - for_ms for ms in begun)
            for (origin, _), begun in self.begun.items()
            if origin in origins or not origins
        )


@pytest.mark.requirement("H2", "H3")
def test_rounds_that_come_to_nothing_become_rare() -> None:
    rounds = Rounds(("there", "!room"))
    rounds.run(60_000)
    assert len(rounds.begun["there", "!room"]) >= 60_000 // ROUNDS.max_ms
    rounds.run(HOUR_MS)
    assert rounds.in_last(HOUR_MS // 2) <= HOUR_MS // 2 // IN_VAIN.max_ms


@pytest.mark.requirement("H1", "H3")
@pytest.mark.parametrize(("servers", "rooms"), [(1, 400), (100, 12), (1_000, 1)])
def test_all_rounds_in_vain_are_few_and_another_server_has_its_share(
    servers: int, rooms: int
) -> None:
    strangers = [(f"s{s}", f"!{r}") for s in range(servers) for r in range(rooms)]
    rounds = Rounds(*strangers, ("honest", "!room"))
    rounds.run(HOUR_MS)
    last_ms = 1_200_000
    assert rounds.in_last(last_ms) <= 2 * last_ms // 1_000 * 11 // 10
    share_ms = max((servers + 1) * 500, LONGEST_DELAY_MS)
    assert rounds.in_last(last_ms, "honest") >= last_ms // share_ms - 1
    # The first time that something of it is persisted, it is as before.
    rounds.paces.of(("honest", "!room")).begin(["$parked"], rounds.now_ms)
    assert rounds.end(("honest", "!room"), has_progress=True)
    assert rounds.paces.of(("honest", "!room")).may_begin(rounds.now_ms)
    assert rounds.paces.of(("honest", "!room")).at_once > 2


@pytest.mark.requirement("H2", "H3")
def test_what_is_in_vain_is_not_tried_sooner_as_its_server_answers_something_else() -> None:
    in_vain, other = ("there", "!vain"), ("there", "!other")
    rounds = Rounds(in_vain, other)
    rounds.run(600_000)
    rounds.paces.of(other).in_vain = 0
    before = {pair: len(begun) for pair, begun in rounds.begun.items()}
    for _ in range(30):
        rounds.paces.wake("there", rounds.now_ms)
        rounds.run(2_000)
    assert len(rounds.begun[in_vain]) <= before[in_vain] + 1
    assert len(rounds.begun[other]) >= before[other] + 5


@pytest.mark.requirement("H3")
def test_what_else_brings_a_missing_event_is_seen_within_a_minute() -> None:
    rounds = Rounds(("there", "!room"), *((f"s{s}", "!room") for s in range(1_000)))
    pace = rounds.paces.of(("there", "!room"))
    assert pace.look_again_ms(0) == ROUNDS.max_ms
    rounds.run(HOUR_MS // 4)
    assert pace.is_in_vain
    assert pace.next_ms - rounds.now_ms > LONGEST_DELAY_MS or pace.may_begin(rounds.now_ms)
    assert pace.look_again_ms(rounds.now_ms) <= LONGEST_DELAY_MS
