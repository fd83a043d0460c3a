"""The homeservers under test, and the record of what they could do."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from synapse.util import SYNAPSE_VERSION

from tests.conformance import page
from tests.conformance.target import NotAvailableError, Options, Target
from tests.lab import Lab, Peer, wait
from tests.lab.postgres import Postgres
from tests.lab.scene import Scene, enter

TargetWith = Callable[[Options], Target]

_ANYBODY_MAY_REGISTER = {
    "enable_registration": True,
    "enable_registration_without_verification": True,
}
_MOST_OF_MANY_PROCESSES = 2
"""Deployments at a time of their own options: idle ones, too, take from both cores."""
_PLAIN_PATIENCE_S = 20.0
"""Plain Synapse is known to fail some: no need to wait long."""


@pytest.fixture(scope="package")
def target_with(lab: Lab, request: pytest.FixtureRequest) -> Iterator[TargetWith]:
    """Gives a homeserver of the lab with these options; the same one for the same options."""
    plain = request.config.getoption("--plain")
    workers = request.config.getoption("--workers")
    targets: dict[str, Target] = {}
    closable: list[str] = []

    def close_the_eldest() -> None:
        if workers and len(closable) > _MOST_OF_MANY_PROCESSES:
            process = targets.pop(closable.pop(0)).process
            lab.close_servers([process] if process is not None else [])

    def find(options: Options) -> Target:
        if request.config.getoption("--homeserver"):
            pytest.skip("the homeserver is configured as it is")
        if plain:
            options = Options(synapse=options.synapse, host=options.host)
        if options.key not in targets:
            (server,) = lab.servers(
                {
                    "module": not plain,
                    "config": options.module,
                    "extra": {**_ANYBODY_MAY_REGISTER, **options.synapse},
                    "metrics": True,
                    "module_name": options.module_name,
                    "host": options.host,
                }
            )
            targets[options.key] = Target.of_lab(server)
            # The others are a fixture of their own.
            if options.key != Options().key and "database" not in options.synapse:
                closable.append(options.key)
                close_the_eldest()
        return targets[options.key]

    yield find
    lab.close_servers([t.process for t in targets.values() if t.process is not None])


@pytest.fixture(scope="package")
def target(target_with: TargetWith, request: pytest.FixtureRequest) -> Target:
    """The homeserver under test, with the module's defaults if it has the module."""
    base_url = request.config.getoption("--homeserver")
    if base_url:
        return Target.existing(base_url, request.config.getoption("--federation-port"))
    return target_with(Options())


@pytest.fixture(scope="package")
def postgres_target(target_with: TargetWith) -> Iterator[Target]:
    """One with its data in Postgres."""
    with Postgres() as postgres:
        target = target_with(Options(synapse={"database": postgres.new_database()}))
        yield target
        if target.process is not None:
            target.process.stop()  # before its database


@pytest.fixture
def scene(target: Target, peer: Peer) -> Scene[Target]:
    """A room at the homeserver under test, with a user of a peer."""
    return enter(target, peer)


@pytest.fixture
def other_peer(lab: Lab) -> Iterator[Peer]:
    """A second one."""
    started = lab.peer()
    yield started
    started.close()


@pytest.fixture(autouse=True)
def _patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.config.getoption("--plain"):
        monkeypatch.setattr(wait, "patience_s", _PLAIN_PATIENCE_S)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Plain Synapse is not asked about everything."""
    if config.getoption("--plain"):
        left = [item for item in items if page.UNTOLD["plain"].intersection(ids_of(item))]
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)


def ids_of(item: pytest.Item) -> list[str]:
    """The requirements that the test shows."""
    return [i for marker in item.iter_markers("requirement") for i in marker.args]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    try:
        return (yield)
    except NotAvailableError:
        pytest.skip("only a server of the lab can do that")


class Recorder:
    """Writes down how each test went, for docs/conformance.md."""

    def __init__(self, variant: str) -> None:
        self._variant = variant
        self._outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.rsplit("/", 1)[-1]
            self._outcomes[name] = report.outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.items and len(self._outcomes) == len(session.items):
            page.record(self._variant, SYNAPSE_VERSION, self._outcomes)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record"):
        variant = "plain" if config.getoption("--plain") else "module"
        config.pluginmanager.register(Recorder(variant))
