"""What is redacted all at once, on ten processes: each hears of it, whichever persists it (S5, E2).

The tests are those of one process.
"""

from collections.abc import Iterator

import pytest

from tests.integration.test_redactions import (
    NONE,
    REDACTING,
    bob,
    newcomer,
    scene,
    test_a_crash_before_the_row_is_written,
    test_a_local_user,
    test_a_user_of_another_server,
    test_an_administrator,
    test_what_is_sent_later_counts_again,
)
from tests.lab import Lab, WorkerHomeserver
from tests.lab.faults import FAULTY_MODULE

__all__ = [
    "bob",
    "newcomer",
    "scene",
    "test_a_crash_before_the_row_is_written",
    "test_a_local_user",
    "test_a_user_of_another_server",
    "test_an_administrator",
    "test_what_is_sent_later_counts_again",
]

pytestmark = [pytest.mark.workers, pytest.mark.requirement("S5", "E2")]


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[WorkerHomeserver]:
    lab.prepare()
    started = lab.make_workers(module_name=FAULTY_MODULE, config=NONE, extra=REDACTING)
    started.first_start()
    yield started
    lab.close_servers([started])
