"""The command ``simulate``: its options, and what it prints."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synapse_sticky.cli.durations import duration_from

if TYPE_CHECKING:
    import click

    from synapse_sticky.cli.simulate.arrivals import Arrival
    from synapse_sticky.cli.simulate.outcome import Outcome

_DEFAULTS = "defaults"
_HERE = "here.example"
_HELP = """
Plays a flood of sticky events of other servers against limits, and shows what clients would get and
when. Nothing is sent, and a database is only read.

What is played: a flood that options describe, or events that really came, from --arrivals or
--database. Against what: the limits of a homeserver.yaml, or of a file with the module's options,
such as `federation: {per_sender: {per_second: 1, burst_count: 30}}`. Give -c twice to compare two.
`-c defaults` and no -c stand for the module's defaults.

The limits decide as on a homeserver, with full buckets at the beginning. How long Synapse itself
takes is not in it.

Exit code: 0 if all events would be delivered, 1 if some expire or are refused, 2 if it failed.
"""
_EXAMPLES = (
    "synapse-sticky simulate --rate 100 --for 2m --senders 5",
    "synapse-sticky simulate -c defaults -c stricter.yaml --svg compared.svg",
    "synapse-sticky simulate -c homeserver.yaml --database homeserver.yaml --since 2h",
    "synapse-sticky simulate --database homeserver.yaml --save-arrivals flood.jsonl",
    "synapse-sticky simulate -c stricter.yaml --arrivals flood.jsonl --json",
)


def command() -> "click.Command":
    """The command, for click."""
    import click

    from synapse_sticky.cli.simulate.arrivals import UnusableError
    from synapse_sticky.cli.texts import examples

    def simulate(**options: Any) -> int:
        try:
            return _simulate(**options)
        except (UnusableError, OSError, UnicodeDecodeError) as e:
            raise click.ClickException(str(e)) from None

    return click.Command(
        "simulate",
        callback=simulate,
        params=_options(),
        help=_HELP,
        epilog=examples(_EXAMPLES),
    )


def _options() -> "list[click.Parameter]":
    import click

    def count(flag: str, least: int, default: int, text: str) -> click.Option:
        kind = click.IntRange(least, 100_000)
        return click.Option([flag], type=kind, default=default, show_default=True, help=text)

    def duration(flags: list[str], default: str, text: str) -> click.Option:
        return click.Option(
            flags,
            metavar="DURATION",
            default=default,
            show_default=True,
            callback=duration_from(1_000, "1s"),
            help=text,
        )

    def file(*flags: str, text: str, multiple: bool = False) -> click.Option:
        kind = click.Path()
        return click.Option([*flags], metavar="FILE", type=kind, multiple=multiple, help=text)

    return [
        file("-c", "--config-path", "configs", text="The limits; once or twice.", multiple=True),
        click.Option(
            ["--rate"],
            type=click.FloatRange(0.01, 100_000),
            default=50.0,
            show_default=True,
            help="How many events arrive a second.",
        ),
        duration(["--for", "for_ms"], "1m", "For how long, such as 30s, 5m or 1h."),
        count("--senders", 1, 1, "How many users send them, in turns."),
        count("--servers", 1, 1, "How many servers these users are on."),
        count("--rooms", 1, 1, "How many rooms they send to, in turns."),
        count("--keys", 0, 0, "How many sticky keys each user has; 0: none that can be read."),
        duration(["--sticky-for", "duration_ms"], "1h", "How long each event is sticky."),
        count("--bystanders", 0, 1, "How many other servers send one event every 10 s."),
        click.Option(
            ["--arrivals"],
            metavar="FILE",
            type=click.File(),
            help="Play what is in this file, of one JSON object a line; - for the input.",
        ),
        file(
            "--database",
            text="Play what came to the server of this homeserver.yaml. Give each file that all"
            " processes read.",
            multiple=True,
        ),
        click.Option(
            ["--since"],
            metavar="TIME",
            default="1h",
            show_default=True,
            help="From the database: from then on; 2h (ago) or 2026-05-01T20:00+02:00.",
        ),
        click.Option(
            ["--until"],
            metavar="TIME",
            default="now",
            show_default=True,
            help="From the database: up to then.",
        ),
        file(
            "--save-arrivals",
            text="Write what is played, for --arrivals. It has no content of events.",
        ),
        file("--svg", text="Draw it."),
        click.Option(
            ["--json", "as_json"], is_flag=True, help="Print one JSON object, with each event."
        ),
    ]


def _simulate(
    configs: Sequence[str], svg: str | None, as_json: bool, save_arrivals: str | None, **what: Any
) -> int:
    from synapse_sticky.cli.report import ALL_FIT, SOMETHING_OFF
    from synapse_sticky.cli.simulate.arrivals import UnusableError, write
    from synapse_sticky.cli.simulate.limits import read_limits
    from synapse_sticky.config import FederationConfig

    if len(set(configs)) > 2:
        raise UnusableError("At most two configurations can be compared: give -c once or twice.")
    limits = {
        _name(path, configs): FederationConfig() if path == _DEFAULTS else read_limits(path)
        for path in configs or (_DEFAULTS,)
    }
    _require_matplotlib(svg)
    server_name, arrivals = _arrivals(**what)
    if save_arrivals is not None:
        with Path(save_arrivals).open("w") as file:
            write(arrivals, file)
    outcomes = _played(arrivals, limits, server_name)
    if as_json:
        found = {name: outcome.as_dict() for name, outcome in outcomes.items()}
        print(json.dumps({"server_name": server_name, "configurations": found}, indent=2))
    else:
        from rich.console import Console

        from synapse_sticky.cli.simulate.drawing import show

        show(Console(), outcomes)
    if svg is not None:
        from synapse_sticky.cli.simulate.drawing import draw

        draw(svg, outcomes)
    is_all = all(len(outcome.order) == len(arrivals) for outcome in outcomes.values())
    return ALL_FIT if is_all else SOMETHING_OFF


def _name(path: str, paths: Sequence[str]) -> str:
    """What a configuration is called: its file's name, if no other has it."""
    names = [Path(other).name for other in {*paths} - {path}]
    return path if Path(path).name in names else Path(path).name


def _require_matplotlib(svg: str | None) -> None:
    from importlib.util import find_spec

    from synapse_sticky.cli.simulate.arrivals import UnusableError

    if svg is not None and find_spec("matplotlib") is None:
        raise UnusableError("--svg needs matplotlib: pip install 'synapse-sticky[simulate]'")


def _arrivals(
    arrivals: Any, database: Sequence[str], since: str, until: str, **flood: Any
) -> tuple[str, "list[Arrival]"]:
    """The name of the server that they come to, and what comes."""
    from synapse_sticky.cli.simulate.arrivals import UnusableError, read
    from synapse_sticky.cli.simulate.flood import Flood

    if arrivals is not None and database:
        raise UnusableError("Give --arrivals or --database, not both.")
    if arrivals is not None:
        return _HERE, read(arrivals)
    if not database:
        return _HERE, Flood(per_second=flood.pop("rate"), **flood).arrivals()
    since_ms, until_ms = _time(since), _time(until)
    if since_ms >= until_ms:
        raise UnusableError("--since is not before --until.")
    # Synapse prints while it loads its configuration.
    with redirect_stdout(sys.stderr):
        from synapse_sticky.cli.simulate.synapse import read_database

        return read_database(database, since_ms, until_ms)


def _time(text: str) -> int:
    """A time in ms since the epoch: so long ago, a date and time, or that itself."""
    from synapse_sticky.cli.simulate.arrivals import UnusableError
    from synapse_sticky.options import duration

    if text == "now":
        return int(time.time() * 1000)
    if text.isdecimal() and len(text) > len("100000000000"):
        return int(text)
    if not text.isdecimal():
        try:
            return int(time.time() * 1000) - int(duration(0, 2**53)(text))
        except ValueError:
            pass
    try:
        return int(datetime.fromisoformat(text).timestamp() * 1000)
    except ValueError:
        raise UnusableError(
            f"{text!r} is no time. Write how long ago it was, such as 90m, or a date and a time,"
            " such as 2026-05-01T20:00+02:00."
        ) from None


def _played(
    arrivals: "Sequence[Arrival]", limits: dict[str, Any], server_name: str
) -> "dict[str, Outcome]":
    """By what the configurations are called. A bar says how far it is, where somebody sees it."""
    from rich.console import Console
    from rich.progress import Progress

    from synapse_sticky.cli.simulate.player import play

    outcomes, console = {}, Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for name, config in limits.items():
            bar = progress.add_task(name, total=len(arrivals))
            outcomes[name] = play(arrivals, config, server_name, lambda: progress.advance(bar))  # noqa: B023
    return outcomes
