"""A server comes back into a room, and has lost some of what it got there before (P3, P7)."""

from collections.abc import Callable, Sequence

import pytest

from tests.conftest import Servers
from tests.integration.rooms import (
    entered,
    wait_until_all_pushed,
    wait_until_gone,
)
from tests.lab import Homeserver, wait_until

EVENTS = 12


def lose(server: Homeserver, event_ids: Sequence[str]) -> None:
    """As after a restored backup: these events are gone."""
    ids = _quoted(event_ids)
    tables = ("sticky_events", "event_edges", "event_json", "event_to_state_groups", "events")
    server.change(*(f"DELETE FROM {table} WHERE event_id IN ({ids})" for table in tables))


def make_outliers(server: Homeserver, event_ids: Sequence[str]) -> None:
    """As if these events had been fetched only, as prev_events of others."""
    ids = _quoted(event_ids)
    server.change(
        f"DELETE FROM sticky_events WHERE event_id IN ({ids})",
        f"DELETE FROM event_to_state_groups WHERE event_id IN ({ids})",
        f"UPDATE events SET outlier = 1 WHERE event_id IN ({ids})",
        'UPDATE event_json SET internal_metadata = \'{"outlier": true, "stream_ordering": \' ||'
        " (SELECT stream_ordering FROM events WHERE events.event_id = event_json.event_id)"
        f" || '}}' WHERE event_id IN ({ids})",
    )


def _quoted(event_ids: Sequence[str]) -> str:
    return ", ".join(f"'{event_id}'" for event_id in event_ids)


@pytest.mark.requirement("P3", "P7")
@pytest.mark.parametrize("change", [lose, make_outliers])
def test_what_is_lost_comes_again_although_the_last_event_is_there(
    servers: Servers, change: Callable[[Homeserver, Sequence[str]], None]
) -> None:
    a, c = servers({}, {"module": False})
    alice, carol = a.user(), c.user()
    room_id = alice.create_room()
    old = [alice.send_sticky(room_id) for _ in range(EVENTS)]
    carol.join(room_id, a.name)
    wait_until(lambda: {*entered(c, room_id)} >= {*old}, "all to be there")
    wait_until_all_pushed(a, room_id)
    carol.leave(room_id)
    wait_until_gone(alice, room_id, carol)
    c.stop()
    change(c, old[: EVENTS // 2])
    assert {*entered(c, room_id)} == {*old[EVENTS // 2 :]}
    c.start()
    c.wait_until_ready()
    carol.join(room_id, a.name)
    wait_until(lambda: {*entered(c, room_id)} >= {*old}, "what was lost to come again", 60)
