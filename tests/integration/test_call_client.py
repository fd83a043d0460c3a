"""A call of real call clients: matrix-js-sdk's MatrixRTC sessions."""

import time

import pytest

from tests.conftest import Servers
from tests.integration.apps import Opened, wait_until_they_show
from tests.integration.rooms import room_of
from tests.lab import Client
from tests.lab.js_sdk import PARTICIPATE, JsSdk

DELAY_S = 10
"""After this time without a sign of life the server sends the leave event."""
RESTART_S = 2
GONE_WITHIN_S = DELAY_S + 2


@pytest.mark.requirement("P1", "P3", "D1", "D5", "S3")
def test_a_call_of_real_clients(servers: Servers, opened: Opened) -> None:
    a, b, c = servers(3)
    alice, bob, carol, dave = a.user("alice"), b.user("bob"), c.user("carol"), c.user("dave")
    # The timeline shows nobody what was before they joined.
    room_id = room_of(alice, bob, via=a, history_visibility="joined")
    alices, bobs = participant(alice, room_id), participant(bob, room_id)
    wait_until_they_show(opened(alices, bobs), alice, bob)

    watching = opened(
        JsSdk(carol, room_id, sync="/sync", via=a.name),
        JsSdk(dave, room_id, sync="sliding", via=a.name),
    )
    wait_until_they_show(watching, alice, bob)

    bobs.kill()
    killed = time.monotonic()
    wait_until_they_show([alices, *watching], alice)
    assert time.monotonic() - killed < 4 * GONE_WITHIN_S


def participant(user: Client, room_id: str) -> JsSdk:
    return JsSdk(user, room_id, PARTICIPATE, delayMs=DELAY_S * 1000, restartMs=RESTART_S * 1000)
