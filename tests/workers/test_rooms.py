"""Rooms that are joined for the first time, and rooms that keep little (E2, F3, S2)."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.test_retention import Order, check_all_parts, policy_first, policy_last
from tests.integration.test_staging import begin_to_join, parked
from tests.lab import Homeserver, Lab, WorkerHomeserver, wait_until
from tests.lab.spam import JOIN_HOLDER, release_joins
from tests.lab.workers import MAIN
from tests.workers.conftest import FAR_LIMITS, deployed

pytestmark = pytest.mark.workers

EXTRA: dict[str, Any] = {
    "modules": [{"module": JOIN_HOLDER}],
    "retention": {"enabled": True},
}


@pytest.fixture(scope="module")
def deployment(lab: Lab) -> Iterator[WorkerHomeserver]:
    with deployed(lab, config=FAR_LIMITS, extra=EXTRA) as started:
        yield started


@pytest.mark.requirement("E2", "E4", "F3", "L3")
def test_the_process_that_joins_is_killed(deployment: WorkerHomeserver, plain: Homeserver) -> None:
    """The others have what came meanwhile."""
    alice, bob = plain.user("alice"), deployment.user("bob")
    room_id = alice.create_room()
    finish = begin_to_join(bob, room_id, plain, held_by=deployment)
    wait_until(lambda: bob.user_id in alice.members(room_id), "the resident to have him")
    only = alice.send_sticky(room_id)
    wait_until(lambda: only in parked(deployment), "it to be parked")
    deployment.kill_process(MAIN)
    release_joins(deployment.folder)
    finish()
    deployment.start_process(MAIN)
    deployment.wait_until_process_is_ready(MAIN)
    bob.join(room_id, plain.name)
    assert bob.collect_sticky(room_id, {only}, timeout_s=4 * 30)
    wait_until(lambda: only not in parked(deployment), "nothing to be left")


@pytest.mark.requirement("E2", "S2", "P3", "D1", "D2")
@pytest.mark.parametrize("order", [policy_first, policy_last])
def test_all_parts_have_one_answer(
    deployment: WorkerHomeserver, plain: Homeserver, order: Order
) -> None:
    check_all_parts(deployment, plain, order)
