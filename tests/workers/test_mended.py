"""What kept something back ends, on ten processes: then it arrives, whichever of them it concerns,
and whatever was started anew meanwhile (H7, L3, E2)."""

from collections.abc import Iterator

import pytest

from tests.integration.rooms import NO_LIMITS
from tests.integration.test_mended import HOST, check_an_acl_put_right
from tests.integration.test_mended_users import check_who_is_not_ignored_any_more
from tests.integration.test_parking import LONG_BACK_OFF, check_all_come_back, check_auth_events
from tests.lab import Homeserver, Lab, Peer, WorkerHomeserver
from tests.lab.spam import PARTIAL_STATE
from tests.workers.conftest import deployed

pytestmark = [pytest.mark.workers, pytest.mark.requirement("E2", "H7")]


@pytest.fixture(scope="module")
def deployment(lab: Lab) -> Iterator[WorkerHomeserver]:
    extra = {"modules": [{"module": PARTIAL_STATE}], **LONG_BACK_OFF}
    with deployed(lab, host=HOST, config=NO_LIMITS, extra=extra) as started:
        yield started


@pytest.mark.requirement("L3")
def test_auth_events_cannot_be_fetched_for_now(
    plain: Homeserver, deployment: WorkerHomeserver, peer: Peer
) -> None:
    check_auth_events(plain, deployment, peer)


@pytest.mark.requirement("L3", "H4")
def test_all_come_back_once_it_answers(deployment: WorkerHomeserver, peer: Peer) -> None:
    check_all_come_back(deployment, peer, 502)


@pytest.mark.requirement("P3", "E4")
def test_an_acl_put_right_after_a_restart(deployment: WorkerHomeserver, peer: Peer) -> None:
    check_an_acl_put_right(deployment, peer, is_killed=True)


@pytest.mark.requirement("D6", "D4", "E4")
def test_who_is_not_ignored_any_more_after_a_restart(deployment: WorkerHomeserver) -> None:
    check_who_is_not_ignored_any_more(deployment, is_killed=True)
