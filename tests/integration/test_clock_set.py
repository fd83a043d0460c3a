"""Somebody sets the clock of a server while a call goes on: what waits goes on within seconds."""

from collections import Counter
from contextlib import ExitStack, closing
from functools import partial

import pytest

from synapse_sticky.handlers.joins.sent import MOST_SENDS
from tests.conftest import Servers
from tests.integration.rooms import deferred, entered
from tests.lab import Homeserver, Lab, Peer, wait_until
from tests.lab.faults import FAULTY_MODULE, set_clock
from tests.lab.scene import enter
from tests.lab.watch import Watcher

HOUR_S = 3_600
SLOW = {
    "federation": {"per_server": {"per_second": 1, "burst_count": 5}},
    "joins": {"retry_min": "1s", "retry_max": "5s"},
}


@pytest.mark.slow
@pytest.mark.one_process
@pytest.mark.requirement("H2", "L4", "P3", "D4")
def test_back_by_an_hour_and_forward_by_half_of_it(servers: Servers, lab: Lab, peer: Peer) -> None:
    (server,) = servers({"module_name": FAULTY_MODULE, "config": SLOW})
    scene = enter(server, peer)
    room_id = scene.room_id
    bob = server.user()
    bob.join(room_id)
    # Synapse's own limit refuses whoever sends before and after the clock was set back.
    own = scene.alice.send_sticky(room_id)
    sent = [own]
    newcomers: list[Peer] = []
    with ExitStack() as stack:
        stack.enter_context(closing(watcher := Watcher(bob)))
        for offset_s in (-HOUR_S, -HOUR_S / 2):
            flood = scene.flood(12)
            wait_until(partial(is_taken_in, server, room_id, flood), "the flood")
            assert deferred(server)
            # A newcomer that takes nothing at first: what it is pushed waits to be sent again.
            newcomer = stack.enter_context(closing(lab.peer()))
            newcomers.append(newcomer)
            newcomer.refuses = lambda event_id: True
            newcomer.join(server, room_id, newcomer.user("carol"))
            wait_until(partial(bool, newcomer.received), "the newcomer to be sent something")
            newcomer.refuses = lambda event_id: False
            set_clock(server, offset_s)
            sent += flood
            wait_until(partial(is_released, server), "what waits to be released", 60)
            wait_until(partial(has_seen, watcher, room_id, sent), "all to be delivered", 30)
            wait_until(partial(newcomer.events.__contains__, own), "the newcomer to go on", 60)
        # Each reaches a client once, and nobody is sent anything in a storm.
        assert Counter(watcher.seen(room_id)) == Counter(sent)
    for receiver in (peer, *newcomers):
        times = Counter(str(pdu) for pdu in receiver.received)
        assert max(times.values()) <= MOST_SENDS + 1  # and once by the ordinary queue


def is_taken_in(server: Homeserver, room_id: str, event_ids: list[str]) -> bool:
    return set(event_ids) <= deferred(server) | set(entered(server, room_id))


def is_released(server: Homeserver) -> bool:
    return not deferred(server)


def has_seen(watcher: Watcher, room_id: str, event_ids: list[str]) -> bool:
    return set(event_ids) <= set(watcher.seen(room_id))
