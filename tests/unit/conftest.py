"""Fixtures of tests that load the module, or parts of it, into this very process."""

import gc
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synapse import visibility
from synapse.rest.client.room import RoomSendEventRestServlet, RoomStateEventRestServlet

from synapse_sticky.logs import BOUNDED
from tests.lab.postgres import Postgres
from tests.unit.configuration import Files
from tests.unit.members import ThisProcess, World

_SHARED = (
    (visibility, "filter_and_transform_events_for_client"),
    (visibility, "filter_events_for_server"),
    (RoomSendEventRestServlet, "_do"),
    (RoomStateEventRestServlet, "on_PUT"),
)


@pytest.fixture(autouse=True)
def _no_lines_before() -> None:
    """No test is short of a log line as another one had many."""
    BOUNDED.forget()


@pytest.fixture
def restored() -> Iterator[None]:
    """Puts back afterwards what all homeservers of the process share."""
    yield
    restore()


def restore() -> None:
    """Puts back what all homeservers of the process share, wherever it is held."""
    for owner, name in _SHARED:
        replacement: Any = getattr(owner, name)
        original = inspect.unwrap(replacement)
        if original is replacement:
            continue
        setattr(owner, name, original)
        # Modules' globals, and the copies of them that attrs makes for the methods that it writes.
        for holder in gc.get_referrers(replacement):
            if isinstance(holder, dict) and holder.keys() >= {"__name__", "__builtins__"}:
                found = [key for key, value in holder.items() if value is replacement]
                holder.update(dict.fromkeys(found, original))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """The configuration of a homeserver that has not been started yet."""
    return Files(tmp_path)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def databases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """A homeserver in this process, on each kind of database."""
    folder = tmp_path_factory.mktemp("members")
    if request.param == "sqlite":
        world = World(folder, None)
        yield world
        world.close()
        return
    with Postgres() as postgres:
        world = World(folder, postgres.new_database())
        yield world
        world.close()


@pytest.fixture
def world(databases: World) -> Iterator[World]:
    """The same, without rooms."""
    yield databases
    databases.clear()


@pytest.fixture
def process(world: World) -> Iterator[ThisProcess]:
    """The module's view of it."""
    with world.process() as process:
        yield process
