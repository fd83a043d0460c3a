"""However often strangers have something happen, the lines of one kind are bounded (H3)."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import attr
import pytest

from synapse_sticky import limits
from synapse_sticky.limits import LimitReport
from synapse_sticky.logs import MOST_A_MINUTE, Bounded, bounded
from tests.unit.settable import METRICS

PACKAGE = Path(limits.__file__).parent

# Each of their kinds has a line a step of a back-off, or one at the start of the process.
UNBOUNDED = {
    "backoff.py",
    "homeserver/database.py",
    "homeserver/layout.py",
    "homeserver/process.py",
    "installer.py",
    "loading.py",
    "module.py",
    "wiring.py",
}


@attr.s(auto_attribs=True)
class Log:
    """A logger whose time passes when a test says, and what it wrote."""

    now_s: float = 0.0
    lines: list[str] = attr.Factory(list)
    logger: logging.Logger = attr.Factory(lambda: logging.Logger("a_logger"))

    def __attrs_post_init__(self) -> None:
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        self.logger.addHandler(handler)
        self.logger.addFilter(Bounded(lambda: self.now_s))


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.mark.requirement("H3", "H2")
def test_lines_of_a_kind_are_bounded_and_those_left_out_are_counted(log: Log) -> None:
    for number in range(1_000):
        log.logger.warning("%s of %s", number, "100%s.example")
    assert len(log.lines) == MOST_A_MINUTE
    assert log.lines[-2] == f"{MOST_A_MINUTE - 2} of 100%s.example"
    assert "more such lines within the minute are left out" in log.lines[-1]
    # Another kind is not kept out, nor what an operator asked for.
    log.logger.info("of another kind")
    log.logger.debug("for those who look closely")
    assert log.lines[MOST_A_MINUTE:] == ["of another kind", "for those who look closely"]
    log.now_s += 60
    log.logger.warning("%s of %s", "one more", "a")
    left_out = 1_000 - MOST_A_MINUTE
    assert log.lines[-1] == f"one more of a ({left_out} such lines before this one were left out)"


@pytest.mark.requirement("H3")
def test_an_hour_of_names_made_up_is_a_bounded_number_of_lines(log: Log) -> None:
    for number in range(36_000):
        log.now_s += 0.1
        log.logger.error("Could not do it for %s", f"{number}.example")
    assert len(log.lines) <= 60 * MOST_A_MINUTE
    said = sum(int(n) for line in log.lines for n in re.findall(r"\((\d+) such", line))
    assert len(log.lines) + said >= 36_000 - 600


@pytest.mark.requirement("H3")
def test_a_thousand_servers_past_a_limit_are_a_bounded_number_of_lines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    report = LimitReport(lambda: 0, METRICS.limits)
    with caplog.at_level(logging.INFO):
        for number in range(1_000):
            report.refused("per_server", f"{number}.example", "", 1_000, 1)
    assert len(caplog.records) == MOST_A_MINUTE


def loggers() -> Iterator[tuple[str, str]]:
    for path in PACKAGE.rglob("*.py"):
        if found := re.search(r"^logger = (\w+)", path.read_text(), re.MULTILINE):
            yield path.relative_to(PACKAGE).as_posix(), found[1]


def test_who_logs_is_bounded() -> None:
    found = dict(loggers())
    assert len(found) > len(UNBOUNDED)
    assert {path for path, by in found.items() if by != bounded.__name__} == UNBOUNDED


@pytest.mark.requirement("H3")
def test_a_line_stays_one_line_whatever_strangers_call_themselves(log: Log) -> None:
    names = (
        "!r\n2026-01-01 ERROR",
        "é\x1b[31m\u202e",
        "\ud800",
        ValueError("a\nb"),
        ["\n"],
        5,
        None,
    )
    log.logger.warning("%s %s %s %s %s %d %s", *names)
    log.logger.debug("%s", names[0])
    assert log.lines == [
        "!r\\n2026-01-01 ERROR é\\x1b[31m\\u202e \\ud800 a\\nb ['\\n'] 5 None",
        "!r\\n2026-01-01 ERROR",
    ]
