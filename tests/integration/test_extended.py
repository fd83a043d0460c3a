"""A Synapse whose functions take one more argument, which may be left out: nothing is different."""

import re
from functools import partial

import pytest

from synapse_sticky.duties import DUTIES
from tests.compat import test_story as story
from tests.conftest import Servers
from tests.integration.rooms import NO_LIMITS, limits
from tests.integration.test_duties import LOADED, in_state
from tests.lab import wait_until
from tests.lab.extended import GOT, MODULE

pytestmark = [pytest.mark.one_process, pytest.mark.slow]

NOT_IN_PYTHON = [
    "synapse.synapse_rust.events.EventInternalMetadata.is_outlier",
    "synapse.synapse_rust.events.EventInternalMetadata.is_soft_failed",
]
HANDED_ON = {
    *("create_and_send_nonmember_event", "on_incoming_transaction", "on_receive_pdu"),
    *("insert_sticky_events_txn", "_invalidate_caches_for_event"),
    *("get_sticky_events_in_rooms", "wait_for_sync_for_user"),
}
"""What the story calls of the functions that are replaced, and that is called in the end."""


@pytest.mark.requirement("H5", "P3", "L4", "D5", "S5")
def test_the_story_is_the_same(servers: Servers) -> None:
    two = servers(
        {"module_name": MODULE, "config": limits(per_sender=story.LIMIT), "metrics": True},
        {"module_name": MODULE, "config": NO_LIMITS, "metrics": True},
    )
    # Without limits nothing is refused.
    for server, off in zip(two, ([], ["receipt"]), strict=True):
        assert server.log_has(f" functions take one more, but for {NOT_IN_PYTHON}\n")
        on = [duty for duty in DUTIES if duty not in off]
        at_once = ", ".join(duty for duty in on if duty not in LOADED)
        told = f"{at_once}; loading: {', '.join(LOADED)}" + "".join(f"; off: {d}" for d in off)
        assert server.log_has(f"synapse-sticky runs in master: {told}\n")
        for duty in on:
            wait_until(partial(in_state, server, duty, "on"), f"{duty} to be on")
    story.test_newcomer(two)
    story.test_flood(two)
    story.test_sliding_join(two)
    story.test_redaction(two)
    got = {name for server in two for name in re.findall(f"{GOT}(.*)", server.log_path.read_text())}
    assert got >= HANDED_ON
    for server in two:
        assert " ERROR " not in server.log_path.read_text()
