"""What benchmarks.call sums up: who is shown wrongly, how long and why, against naive models."""

import random
from typing import Any

import attr
import pytest

from benchmarks.call.causes import (
    AFTERWARDS_S,
    ORDINARY,
    PRIORITY,
    Delay,
    Machine,
    Party,
    Sum,
    Trouble,
    Wrong,
    by_row,
    cause_of,
    delays,
    meanwhile,
    sums,
    wrong_spans,
)
from benchmarks.call.report import Result, missed_goals, steps
from benchmarks.call.schedule import AWAY_S, GATEWAY_KEYS, by_account, roles
from benchmarks.call.small import RIGHT, Shown, beside
from benchmarks.call.spans import (
    Change,
    Span,
    complement,
    ghosts,
    intersect,
    maybe_there,
    missing,
    shown_spans,
    subtract,
    surely_there,
)
from benchmarks.call.sticky_map import KEY_FIELD, StickyMap

SEEDS = range(200)
TICKS = 60
HERE, THERE = Party("observer", "A"), Party("member", "B")


def some_spans(chance: random.Random) -> list[Span]:
    edges = sorted(chance.sample(range(TICKS), 2 * chance.randrange(5)))
    return [(float(s), float(e)) for s, e in zip(edges[::2], edges[1::2], strict=True)]


def ticks(spans: list[Span]) -> set[int]:
    """The whole seconds that are in one of the spans."""
    return {t for t in range(-1, TICKS + 1) if any(s <= t < e for s, e in spans)}


@pytest.mark.parametrize("seed", SEEDS)
def test_spans_are_sets_of_ticks(seed: int) -> None:
    chance = random.Random(seed)
    some, others = some_spans(chance), some_spans(chance)
    assert ticks(intersect(some, others)) == ticks(some) & ticks(others)
    assert ticks(subtract(some, others)) == ticks(some) - ticks(others)
    assert ticks(complement(some)) == set(range(-1, TICKS + 1)) - ticks(some)


def some_changes(chance: random.Random) -> list[Change]:
    """Comings and goings, not always in turns, whose requests take up to three ticks."""
    found, at = [], 0
    while (at := at + chance.randint(1, 12)) < TICKS:
        asked, at = at, at + chance.randint(0, 3)
        found.append(Change(comes=chance.random() < 0.5, asked_s=asked, known_s=at))
    return found


def naive_truth(changes: list[Change]) -> tuple[set[int], set[int]]:
    """The ticks in which the participant is there, and in which it may be, tick by tick."""
    surely, maybe = set(), set()
    is_there, in_doubt = False, 0
    for tick in range(TICKS + 20):
        for change in changes:
            if change.comes == is_there:
                continue
            if change.asked_s <= tick < change.known_s:
                in_doubt = max(in_doubt, int(change.known_s))
            elif tick == change.known_s:
                is_there = change.comes
        if tick < in_doubt:
            maybe.add(tick)
        elif is_there:
            surely.add(tick)
            maybe.add(tick)
    return surely, maybe


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_wrong_is_what_the_truth_does_not_have(seed: int) -> None:
    chance = random.Random(seed)
    changes = some_changes(chance)
    surely, maybe = naive_truth(changes)
    in_time = set(range(TICKS))
    assert ticks(surely_there(changes)) & in_time == surely & in_time
    assert ticks(maybe_there(changes)) & in_time == maybe & in_time
    shown, seen = some_spans(chance), some_spans(chance)
    assert ticks(ghosts(shown, changes, seen)) == (ticks(shown) - maybe) & ticks(seen)
    assert ticks(missing(shown, changes, seen)) == (surely - ticks(shown)) & ticks(seen)


def test_who_never_goes_is_there_to_the_end() -> None:
    changes = [Change(comes=True, asked_s=1, known_s=2)]
    assert missing([], changes, [(0, 50)]) == [(2, 50)]
    assert ghosts([(0, 50)], changes, [(0, 50)]) == [(0, 1)]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_client_shows_is_what_it_changed_to(seed: int) -> None:
    chance = random.Random(seed)
    times = sorted(chance.sample(range(TICKS), 8))
    changes = [(float(at), chance.random() < 0.5) for at in times]
    model = {
        tick
        for tick in range(TICKS)
        if ([is_shown for at, is_shown in changes if at <= tick] or [False])[-1]
    }
    spans = shown_spans(changes, float(TICKS))
    assert ticks(spans) == model
    counts = steps(spans, 0.0)
    for tick in range(TICKS):
        assert [count for at, count in counts if at <= tick][-1] == (tick in model)


# The map


def an_event(chance: random.Random, number: int) -> dict[str, Any]:
    content: dict[str, Any] = {KEY_FIELD: chance.choice("ab")} if chance.random() < 0.9 else {}
    if chance.random() < 0.5:
        content["application"] = "m.call"
    event: dict[str, Any] = {
        "event_id": f"${number % 37}-{number}",
        "type": chance.choice(["m.rtc.member", "other"]),
        "sender": chance.choice(["@a:a", "@b:b"]),
        "origin_server_ts": chance.randrange(20),
        "content": content,
    }
    if chance.random() < 0.9:
        event["msc4354_sticky"] = {"duration_ms": chance.choice([5, 10, 20])}
    return event


@pytest.mark.parametrize("seed", SEEDS)
def test_of_each_key_the_event_that_ends_last_counts(seed: int) -> None:
    chance = random.Random(seed)
    events = [(chance.choice("!?"), an_event(chance, number)) for number in range(30)]
    told = [*events, *chance.sample(events, 10)]
    chance.shuffle(told)
    the_map, taken_in, redacted = StickyMap(), [], set()
    for room_id, event in told:
        the_map.take_in(room_id, event)
        taken_in.append((room_id, event))
        if chance.random() < 0.05:
            sender = chance.choice(["@a:a", "@b:b"])
            the_map.redact_all(room_id, sender)
            redacted |= {
                e["event_id"]
                for r, e in taken_in
                if (r, e["sender"]) == (room_id, sender)
                if "msc4354_sticky" in e and KEY_FIELD in e["content"]
            }
    now_ms = chance.randrange(40)
    winners: dict[Any, Any] = {}
    for room_id, event in events:
        content = event["content"]
        if "msc4354_sticky" not in event or KEY_FIELD not in content:
            continue
        ends_ms = event["origin_server_ts"] + event["msc4354_sticky"]["duration_ms"]
        if event["event_id"] in redacted or ends_ms <= now_ms:
            continue
        key = (room_id, event["sender"], event["type"], content[KEY_FIELD])
        winners.setdefault(key, []).append((ends_ms, event["event_id"], "application" in content))
    assert the_map.shown(now_ms) == {key for key, of_key in winners.items() if max(of_key)[2]}


# Causes


def wrong(start_s: float, end_s: float, observer: Party = HERE, *, is_ghost: bool = True) -> Wrong:
    return Wrong(observer, THERE, is_ghost, start_s, end_s)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_wrong_second_is_counted_once(seed: int) -> None:
    chance = random.Random(seed)
    changes, shown = some_changes(chance), some_spans(chance)
    found = wrong_spans(HERE, THERE, shown, changes, [(0.0, float(TICKS))])
    troubles = [
        Trouble(chance.choice(PRIORITY), start, start + chance.randrange(9), lambda o, p: True)
        for start in map(float, chance.sample(range(TICKS), 2))
    ]
    by_cause = sums(found, troubles, Machine([]))
    in_time = set(range(TICKS))
    surely, maybe = naive_truth(changes)
    assert sum(s.ghost_s for s in by_cause.values()) == len(ticks(shown) - maybe)
    assert sum(s.missing_s for s in by_cause.values()) == len((surely - ticks(shown)) & in_time)
    causes = {row: cause for cause in PRIORITY for row in (cause, meanwhile(cause))}
    for row, one in by_cause.items():
        if row != ORDINARY:
            cause = causes[row]
            spans = [
                w
                for w in found
                for t in troubles
                if t.cause == cause
                if w.start_s < t.end_s + AFTERWARDS_S and w.end_s > t.start_s
            ]
            assert one.total_s <= sum(w.seconds for w in spans)


def test_the_trouble_that_keeps_servers_apart_explains_more_than_others() -> None:
    def always(cause: str) -> Trouble:
        return Trouble(cause, 0, 10, lambda o, p: True)

    assert cause_of(wrong(1, 2), [always("flood"), always("absent")]) == "absent"
    assert cause_of(wrong(1, 2), [always("flood")]) == "flood"
    assert cause_of(wrong(10 + AFTERWARDS_S, 30), [always("flood")]) == ORDINARY
    of_another = Trouble("absent", 0, 10, lambda o, p: o.server == "C")
    assert cause_of(wrong(1, 2), [of_another]) == ORDINARY
    assert cause_of(wrong(1, 2, Party("observer", "C")), [of_another]) == "absent"


def test_what_is_wrong_while_servers_are_apart_has_a_row_of_its_own() -> None:
    troubles = [Trouble(cause, 0, 10, lambda o, p: True) for cause in ("denied", "flood")]
    end_s = 10 + AFTERWARDS_S
    assert by_row(wrong(1, 12), troubles) == [(meanwhile("denied"), wrong(1, 12))]
    assert by_row(wrong(1, end_s), troubles) == [(meanwhile("denied"), wrong(1, end_s))]
    assert by_row(wrong(1, end_s + 3), troubles) == [
        (meanwhile("denied"), wrong(1, end_s)),
        ("denied", wrong(end_s, end_s + 3)),
    ]
    assert by_row(wrong(1, end_s + 3), troubles[1:]) == [("flood", wrong(1, end_s + 3))]


def test_what_the_machine_costs_is_taken_off_each_span() -> None:
    near = [Delay(100 + number, True, 0.5) for number in range(4)]
    far = [Delay(200, True, 4.5), Delay(100, False, 0.1)]
    machine = Machine([*near, *far])
    assert machine.cost_s(101, is_remote=True) == 0.5
    # Too few are near: all of that kind.
    assert machine.cost_s(200, is_remote=True) == pytest.approx(1.3)
    assert machine.cost_s(101, is_remote=False) == 0.1
    assert machine.rest_of(wrong(101, 103)) == 1.5
    assert machine.rest_of(wrong(101, 101.2)) == 0
    found = sums([wrong(101, 103), wrong(101, 101.2, is_ghost=False)], [], machine)[ORDINARY]
    assert (found.ghost_s, found.missing_s, found.spans) == (1.5, 0, [1.5])


def test_a_delay_is_what_is_wrong_until_the_next_change() -> None:
    changes = [Change(comes=True, asked_s=1, known_s=2), Change(comes=False, asked_s=5, known_s=6)]
    found = wrong_spans(HERE, THERE, [(3, 8)], changes, [(0, 20)])
    assert delays(HERE, THERE, changes, found) == [Delay(2, True, 1), Delay(6, True, 2)]


# The schedule


def test_the_seed_says_what_happens() -> None:
    assert roles(1, 200, 60) == roles(1, 200, 60) != roles(2, 200, 60)
    for seconds in (60, 200):
        found = roles(7, seconds, 60)
        assert len(found) == 60
        assert len(by_account(found)["gateway"]) == GATEWAY_KEYS
        for role in found:
            moves = [step for _, step in role.steps if step in ("come", "go", "crash")]
            assert moves[::2] == ["come"] * len(moves[::2])
            assert "come" not in moves[1::2]
            assert role.steps == sorted(role.steps, key=lambda step: step[0])
    assert AWAY_S == 60


def result(**by_row: Sum) -> Result:
    return Result(by_row, [], 0.0, 0.0, {}, {}, 1.0, {}, [])


def test_a_goal_that_is_missed_is_named() -> None:
    plain = result(newcomer=Sum(500, 500, [500, 500]), flood=Sum(1, 0, [1]))
    assert missed_goals(result(flood=Sum(5, 0.9, [0.01] * 99 + [4.9])), plain) == []
    apart = {meanwhile("absent"): Sum(900, 0, [900])}
    assert missed_goals(attr.evolve(result(), by_cause=apart), plain) == []
    assert missed_goals(result(flood=Sum(7, 0)), plain) == ["flood: 7.0 s, plain Synapse 1.0 s"]
    (too_much,) = missed_goals(result(newcomer=Sum(11, 10)), plain)
    assert too_much.startswith("21.0 ghost and missing seconds are more than 2%")
    few_short = missed_goals(result(flood=Sum(0, 0, [0.1] * 98 + [3, 5.1])), plain)
    assert few_short == [
        "only 98.0% of the spans are under 2 s",
        "the longest span is 5.1 s, above 5 s",
    ]


# The small call


def test_whom_an_observer_lacks_and_who_is_a_ghost() -> None:
    one, two, three, four = (("!room", f"@{name}:a", "kind", "device") for name in "abcd")
    assert beside({one, two}, {two, three, four}) == Shown(missing=1, ghosts=2)
    assert beside({one, two}, {two, one}) == beside(set(), set()) == RIGHT
    told = [str(shown) for shown in (RIGHT, Shown(8, 0), Shown(0, 2), Shown(8, 2))]
    assert told == ["right", "lacks 8", "ghosts 2", "lacks 8, ghosts 2"]
