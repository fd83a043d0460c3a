"""A client names its connections of sliding sync as it likes, and has as many as it likes (H1)."""

import secrets
import time
from collections.abc import Iterator

import pytest

from tests.conftest import Servers
from tests.integration.rooms import NO_LIMITS
from tests.lab import Client, Homeserver, Lab
from tests.lab.client import sliding_sticky_events
from tests.lab.membership import allowed_to_fail
from tests.lab.postgres import Postgres

MOST_OF_DEVICE = 1_000


@pytest.fixture
def on_postgres(lab: Lab) -> Iterator[Homeserver]:
    """SQLite takes any text, of any length."""
    with Postgres() as postgres:
        options = {"config": NO_LIMITS, "extra": {"database": postgres.new_database()}}
        (started,) = lab.servers(options)
        yield started
        lab.close_servers([started])


def joined_late(server: Homeserver, count: int = 3) -> tuple[Client, str, list[str]]:
    """A user whose first sync of a room stores a page, the room, and its sticky events."""
    alice, bob = server.user("alice"), server.user("bob")
    room_id = alice.create_room()
    sent = [alice.send_sticky(room_id) for _ in range(count)]
    bob.join(room_id)
    return bob, room_id, sent


def pages_of(server: Homeserver, user: Client) -> int:
    sql = "SELECT COUNT(*) FROM synapse_sticky_pages WHERE user_id = ?"
    return int(server.query(sql, user.user_id)[0][0])


@pytest.mark.requirement("H1", "D5")
@pytest.mark.parametrize("name", ["\0", secrets.token_hex(5_000)])
def test_a_name_that_no_database_takes(on_postgres: Homeserver, name: str) -> None:
    """It concerns nobody else. Before, no page of anybody was stored until the next one was."""
    server = on_postgres
    bob, _, _ = joined_late(server)
    with allowed_to_fail(500):  # Synapse itself stores the name
        bob.sliding_sync(limit=1, conn_id=name)
    assert not server.log_has("Could not store what is left")
    assert pages_of(server, bob) == 1


@pytest.mark.requirement("D5")
def test_a_long_name_of_a_connection_is_as_good_as_any(servers: Servers) -> None:
    (server,) = servers({"config": NO_LIMITS})
    bob, room_id, sent = joined_late(server)
    answer, given = None, []
    for _ in sent:
        answer = bob.sliding_sync(answer, limit=1, conn_id="é" * 3_000)
        given += sliding_sticky_events(answer, room_id)
    assert given == sent


@pytest.mark.requirement("H1")
def test_the_pages_of_a_device_are_bounded(servers: Servers) -> None:
    """Its latest are kept, and all of other devices."""
    (server,) = servers({"config": NO_LIMITS})
    bob, _, _ = joined_late(server)
    carol, _, _ = joined_late(server)
    bob.sliding_sync(limit=1, conn_id="first")
    carol.sliding_sync(limit=1, conn_id="first")
    ago_ms = int(time.time() * 1000) - 60_000
    for user in (bob, carol):
        server.change(
            "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 1499)"
            " INSERT INTO synapse_sticky_pages"
            " (user_id, device_id, connection, token, older, noted_ts_ms, shown, until)"
            f" SELECT user_id, device_id, 'other-' || i, token, older, {ago_ms} + i, shown, until"
            f" FROM synapse_sticky_pages, n WHERE user_id = '{user.user_id}'"
        )
    bob.sliding_sync(limit=1, conn_id="last")
    assert pages_of(server, bob) == MOST_OF_DEVICE
    assert pages_of(server, carol) == 1_501
    sql = "SELECT connection FROM synapse_sticky_pages WHERE user_id = ? ORDER BY noted_ts_ms"
    names = [name for (name,) in server.query(sql, bob.user_id)]
    assert (names[0], names[-3:]) == ("other-502", ["other-1499", "first", "last"])
