"""Fixtures for apps."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.integration.apps import App, Opened


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Opens apps, and closes them after the test."""
    with ExitStack() as stack:

        def open_(*apps: App) -> list[App]:
            for app in apps:
                app.open()
                stack.callback(app.close)
            return [*apps]

        yield open_
