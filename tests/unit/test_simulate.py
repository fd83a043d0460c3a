"""``synapse-sticky simulate``: what is played, by whose rules, and what is said of it (E3, H6)."""

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from synapse_sticky.cli import main
from synapse_sticky.cli.simulate import arrivals as arrivals_module
from synapse_sticky.cli.simulate.arrivals import Arrival, UnusableError, arrival, in_order, read
from synapse_sticky.cli.simulate.arrivals import write as write_arrivals
from synapse_sticky.cli.simulate.flood import Flood
from synapse_sticky.cli.simulate.outcome import Fate
from synapse_sticky.cli.simulate.player import play
from synapse_sticky.config import FederationConfig, LimitConfig, Mode
from tests.unit.configuration import Files
from tests.unit.test_limits import NOW_MS
from tests.unit.test_observer import There, deferring

pytestmark = pytest.mark.requirement("E3", "H6")

LIMITS = FederationConfig(
    per_server=LimitConfig(4, 8),
    per_server_in_room=LimitConfig(3, 5),
    per_sender=LimitConfig(2, 3),
    per_room=LimitConfig(5, 9),
    exempt_servers=("*.example",),
)
SLOW = "federation: {per_sender: {per_second: 1, burst_count: 2}}"


def at_random(seed: int) -> list[Arrival]:
    """Floods of some servers and rooms, with keys and without, some of events that soon expire."""
    dice = random.Random(seed)
    now_ms = NOW_MS
    found = []
    for number in range(400):
        now_ms += dice.choice([0, 5, 40, 100])
        server = dice.choice(["there", "elsewhere", "exempt.example", "here"])
        found.append(
            arrival(
                number,
                now_ms,
                dice.choice(["!room", "!other"]),
                f"@{dice.choice(['mallory', 'mary'])}:{server}",
                duration_ms=dice.choice([500, 30_000, 3_600_000]),
                origin_server_ts=now_ms - dice.randrange(400),
                key=dice.choice([None, 1, 2]),
            )
        )
    return in_order(found)


def let_pass(here: There, until_ms: int) -> None:
    """Lets time pass, and each thing happen when it is due."""
    while here.due and here.due_ms <= until_ms:
        here.pass_ms(max(here.due_ms - here.now, 0))
    here.pass_ms(max(until_ms - here.now, 0))


@pytest.mark.requirement("L4", "D7")
@pytest.mark.parametrize("seed", range(10))
def test_order_and_times_are_those_of_deferral(seed: int) -> None:
    """The same events at the same times, given to the handler that really defers them."""
    arrivals = at_random(seed)
    here = deferring(LIMITS)
    released: dict[str, int] = {}
    enter = here.enter_txn

    def enter_txn(txn: Any, events: Any) -> None:
        released.update((event.event_id, here.now) for event in events)
        enter(txn, events)

    here.enter_txn = enter_txn  # type: ignore[method-assign]
    now = []
    for one in arrivals:
        let_pass(here, one.at_ms)
        if not here.take_in([one.event]):
            now.append(one.event.event_id)
    let_pass(here, here.now + 3_600_000)

    outcome = play(arrivals, LIMITS, "here")
    fates = {event_id: played.fate for event_id, played in outcome.events.items()}
    assert [e for e in outcome.order if fates[e] is Fate.LATER] == here.entered
    assert [e for e in outcome.order if fates[e] is Fate.NOW] == now
    assert {e: outcome.events[e].delivered_ms for e in here.entered} == released
    assert set(fates.values()) == {Fate.NOW, Fate.LATER, Fate.EXPIRED}


def test_without_limits_all_is_delivered_at_once() -> None:
    outcome = play(at_random(1), FederationConfig(mode=Mode.OFF), "here")
    assert {played.fate for played in outcome.events.values()} == {Fate.NOW}
    assert outcome.last_ms() == at_random(1)[-1].at_ms - NOW_MS - (at_random(1)[0].at_ms - NOW_MS)


def test_a_full_server_is_refused() -> None:
    config = FederationConfig(per_sender=LimitConfig(0.001, 2), max_deferred_per_server=10)
    outcome = play(Flood(100, 1_000, bystanders=0).arrivals(), config, "here")
    assert outcome.sums().by_fate == {"now": 2, "expired": 10 - 3, "later": 3, "refused": 88}
    assert outcome.most_waiting() == 10


def test_what_cannot_be_simulated_is_said() -> None:
    with pytest.raises(UnusableError, match="Simulate `defer`"):
        play(at_random(1), FederationConfig(mode=Mode.REJECT), "here")


def test_flood_is_as_described() -> None:
    flood = Flood(10, 20_000, servers=2, senders=4, rooms=3, keys=2, bystanders=1)
    arrivals = flood.arrivals()
    events = [one.event for one in arrivals if "flood" in one.server]
    assert len(events) == 200
    assert {event.sender for event in events} == {
        *(f"@flood{n}:flood{n % 2}.example" for n in range(4))
    }
    assert {event.room_id for event in events} == {"!room0", "!room1", "!room2"}
    assert len({event.key for event in events}) == 2
    assert events[-1].expires_at_ms - arrivals[0].at_ms == 3_600_000 + 19_900
    bystander = [one.at_ms - arrivals[0].at_ms for one in arrivals if "bystander" in one.server]
    assert bystander == [5_000, 15_000]
    for unusable in (Flood(0.01, 1_000), Flood(100_000, 10_000), Flood(1, 10_000, servers=2)):
        with pytest.raises(UnusableError):
            unusable.arrivals()


def test_what_is_written_is_read_again() -> None:
    """The same events, with the same ends, for the same result."""
    ahead = arrival(0, NOW_MS, "!room", "@a:there", event_id="$a", origin_server_ts=NOW_MS + 60_000)
    assert ahead is not None
    arrivals = in_order([ahead, *at_random(3)])
    file = io.StringIO()
    write_arrivals(arrivals, file)
    again = read(file.getvalue().splitlines())
    assert [shown(one) for one in again] == [shown(one) for one in arrivals]
    assert play(again, LIMITS, "here").order == play(arrivals, LIMITS, "here").order


def shown(one: Arrival) -> Sequence[object]:
    event = one.event
    return (
        *(one.at_ms, event.event_id, event.room_id, event.sender),
        *(event.expires_at_ms, event.newness_ms, event.key),
    )


NEEDED = {"at_ms": NOW_MS, "room_id": "!room", "sender": "@a:there"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Line 2 is no JSON"),
        ("[]", "Line 2 is no JSON object"),
        (json.dumps({**NEEDED, "at_ms": "now"}), "Line 2 has no at_ms that is of type int"),
        (json.dumps({**NEEDED, "at_ms": -1}), "no time in ms"),
        (json.dumps({**NEEDED, "sender": None}), "Line 2 has no sender"),
        (json.dumps({**NEEDED, "key": 1.5}), "neither a string nor a hash"),
        (json.dumps({**NEEDED, "key": 2**63}), "neither a string nor a hash"),
    ],
)
def test_a_wrong_line_is_named(line: str, said: str) -> None:
    with pytest.raises(UnusableError, match=said):
        read([json.dumps(NEEDED), line])


@pytest.mark.requirement("H3")
def test_too_many_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnusableError, match="nothing to play"):
        read([])
    # What is not sticky when it arrives is none of them.
    with pytest.raises(UnusableError, match="nothing to play"):
        read([json.dumps({**NEEDED, "duration_ms": duration}) for duration in (0, -1, "1h", None)])
    monkeypatch.setattr(arrivals_module, "MOST", 10)
    lines = [json.dumps({**NEEDED, "at_ms": NOW_MS + number}) for number in range(11)]
    assert len(read(lines[:10])) == 10
    with pytest.raises(UnusableError, match="more than 10"):
        read(lines)


def simulated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    main(["simulate", *arguments, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_two_configurations_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of a homeserver.yaml, one of the module's options alone."""
    options = tmp_path / "options.yaml"
    options.write_text(SLOW)
    homeserver = Files(tmp_path).with_module(federation={"mode": "off"})
    given = ["-c", homeserver, "-c", str(options), "--rate", "10", "--for", "10s"]
    picture, flood = tmp_path / "both.svg", tmp_path / "flood.jsonl"
    assert main(["simulate", *given, "--svg", str(picture), "--save-arrivals", str(flood)]) == 0
    printed = capsys.readouterr()
    for expected in ("delivered at once", "bystander0.example", "per_sender: ", "arrived"):
        assert expected in printed.out
    drawn = picture.read_text()
    assert drawn.startswith("<?xml")
    main(["simulate", *given, "--svg", str(picture)])
    assert picture.read_text() == drawn, "the same picture"
    found = simulated(capsys, *given)["configurations"]
    assert found["homeserver.yaml"]["by_fate"] == {"now": 101}
    assert found["options.yaml"]["by_fate"]["later"] == 98
    assert len(found["options.yaml"]["each"]) == 101
    assert found["options.yaml"]["by_server"]["bystander0.example"]["longest_ms"] == 0
    # The same from the file.
    assert simulated(capsys, "--arrivals", str(flood), *given[:4])["configurations"] == found


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    binary = tmp_path / "flood.jsonl"
    binary.write_bytes(b"\xff\xfe")
    nowhere = str(tmp_path / "none" / "file")
    for arguments, said in (
        (("--arrivals", str(binary)), "can't decode byte 0xff"),
        (("--arrivals", nowhere), "No such file"),
        (("--svg", nowhere), "No such file"),
        (("--save-arrivals", nowhere), "No such file"),
    ):
        assert main(["simulate", *arguments]) == 2
        printed = capsys.readouterr().err
        assert said in printed
        assert "itself failed" not in printed


def test_exit_code_says_if_something_is_lost(tmp_path: Path) -> None:
    options = tmp_path / "options.yaml"
    options.write_text("federation: {per_sender: {per_second: 0.001, burst_count: 1}}")
    assert main(["simulate", "-c", str(options), "--rate", "1", "--for", "10s"]) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("federation: {per_sendr: null}", "did you mean 'per_sender'?"),
        ("federation: {mode: reject}", "cannot be simulated"),
        ("server_name: here", "is not listed under `modules:`"),
        ("server_name: here\nmodules: [{module: other.Module}]", "is not listed"),
        ("[", "is no YAML"),
        ("a string", "neither a homeserver.yaml nor the module's options"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, said: str
) -> None:
    path = tmp_path / "options.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["simulate", "-c", str(path)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--servers", "3"], "need as many senders"),
        (["-c", "a", "-c", "b", "-c", "c"], "At most two"),
        (["--arrivals", "-", "--database", "a"], "not both"),
        (["--database", "a", "--since", "yesterday"], "'yesterday' is no time"),
        (["--database", "a", "--since", "3600"], "'3600' is no time"),
        (["--database", "a", "--since", "1h", "--until", "2h"], "is not before"),
    ],
)
def test_what_does_not_go_together(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["simulate", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_hostile_names_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "flood.jsonl"
    server = "\x1b]0;o\x07[b]there"
    file.write_text(json.dumps({**NEEDED, "sender": f"@a:{server}"}))
    assert main(["simulate", "--arrivals", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert r"\u001b]0;o\u0007[b]there" in printed


def test_yaml_of_the_examples_in_the_help_is_true() -> None:
    from synapse_sticky.cli.simulate.command import _HELP

    example = _HELP.split("such as `")[1].split("`")[0]
    assert yaml.safe_load(example) == {
        "federation": {"per_sender": {"per_second": 1, "burst_count": 30}}
    }
