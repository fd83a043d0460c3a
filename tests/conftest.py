"""Fixtures, and the end of every server's log beside a test that failed."""

import signal
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.lab import Homeserver, Lab, Peer, starter

# The same examples each time; make fuzz looks for others.
settings.register_profile("default", derandomize=True, deadline=None, database=None)
settings.register_profile("fuzz", deadline=None, database=None, max_examples=3_000)
settings.load_profile("default")

Servers = Callable[..., list[Homeserver]]
"""``servers(2)``, or ``servers({"module": False}, {})`` with Homeserver's options."""

_LOG_LINES = 60
_LONGEST_FIRST = ("workers", "conformance", "integration")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What tests/conformance can be pointed at."""
    parser.addoption(
        "--workers", action="store_true", help="the server under test has many processes"
    )
    group = parser.getgroup("conformance")
    group.addoption("--plain", action="store_true", help="plain Synapse, without the module")
    group.addoption("--record", action="store_true", help="for docs/conformance.md")
    group.addoption("--homeserver", metavar="URL", help="a homeserver that is there already")
    group.addoption("--federation-port", type=int, default=8448, help="its own, on 127.0.0.1")


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The session's lab; what it starts ends with it."""
    with starter.forking(), Lab(workers=request.config.getoption("--workers")) as lab:
        yield lab


@pytest.fixture
def servers(lab: Lab) -> Iterator[Servers]:
    """Starts servers for one test."""
    others = list(lab.servers_started)

    def start(*options: Any) -> list[Homeserver]:
        if len(options) == 1 and isinstance(options[0], int):
            options = ({},) * options[0]
        return lab.servers(*options)

    yield start
    lab.close_servers([server for server in lab.servers_started if server not in others])


@pytest.fixture
def peer(lab: Lab) -> Iterator[Peer]:
    """A server of the lab's own, for what no real one would do."""
    started = lab.peer()
    yield started
    started.close()


@pytest.fixture(scope="module")
def three(lab: Lab) -> Iterator[list[Homeserver]]:
    """Three servers with the module, for tests that do not disturb them."""
    started = lab.servers({}, {}, {})
    yield started
    lab.close_servers(started)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes longest does not begin last; what is about one process is not asked of many."""
    items.sort(key=lambda item: _rank(item.path))
    if config.getoption("--workers"):
        left = [item for item in items if item.get_closest_marker("one_process")]
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)


def _rank(path: Path) -> int:
    """A low number for a file that takes long, by its folder."""
    folder = path.relative_to(Path(__file__).parent).parts[0]
    return _LONGEST_FIRST.index(folder) if folder in _LONGEST_FIRST else len(_LONGEST_FIRST)


def pytest_configure() -> None:
    """Has ``kill`` and ``timeout`` end the tests as Ctrl-C does: with all servers."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    lab = getattr(item, "funcargs", {}).get("lab")
    if report.failed and isinstance(lab, Lab):
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(call.start))
        for server in lab.servers_started:
            for name, log in server.logs().items():
                lines = log.splitlines()[-_LOG_LINES:]
                # Nothing of those that had no part in it.
                if any(line[: len(began)] >= began for line in lines):
                    section = f"log of {name} (module: {server.module})"
                    report.sections.append((section, "\n".join(lines)))
    return report
