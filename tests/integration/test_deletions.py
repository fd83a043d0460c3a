"""Rooms that are deleted through the admin API while their sticky events go both ways (H1, H3)."""

import threading
from collections.abc import Iterator
from functools import partial

import pytest

from tests.integration.rooms import deferred, in_thread, limits, room_of
from tests.lab import Client, Homeserver, Lab, wait_until
from tests.lab.client import ApiError
from tests.lab.postgres import Postgres

ROOMS = 50
SLOW = {"per_second": 0.001, "burst_count": 2}
"""Nothing is released within a test."""


@pytest.fixture
def two(lab: Lab) -> Iterator[list[Homeserver]]:
    with Postgres() as postgres:
        config = {**limits(per_server=SLOW), "local": {"per_user": None}}
        database = {"database": postgres.new_database()}
        started = lab.servers({"config": config, "extra": database}, {"module": False})
        yield started
        lab.close_servers(started)


def keep_sending(user: Client, rooms: list[str], end: threading.Event) -> None:
    while not end.is_set():
        for room_id in rooms:
            try:
                user.send_sticky(room_id)
            except ApiError:
                pass  # the room is just being deleted


def failures(log: str) -> list[str]:
    """What the log has of errors that are about sticky events. Synapse has others of its own: its
    ordinary queue meets the foreign key of ``destination_rooms``."""
    lines = log.splitlines()
    found = [line for line in lines if "IntegrityError" in line and "sticky" in line]
    for start in (n for n, line in enumerate(lines) if line.startswith("Traceback")):
        end = start + 1
        while end < len(lines) and not lines[end].startswith("20"):
            end += 1
        found.append("\n".join(lines[max(start - 1, 0) : end]))
    return [failure for failure in found if "sticky" in failure]


@pytest.mark.slow
@pytest.mark.requirement("H1", "H3")
@pytest.mark.timeout(1_500)
def test_rooms_are_deleted_under_load(two: list[Homeserver]) -> None:
    a, b = two
    # Those of a new database enter each room into a table, also one that is just being deleted.
    wait_until(
        lambda: not a.query("SELECT update_name FROM background_updates"),
        "Synapse's background updates",
        timeout_s=300,
    )
    alice, bob, admin = a.user(), b.user(), a.user(admin=True)
    kept = room_of(alice, bob, via=a)
    rooms = []
    for _ in range(ROOMS):
        room_id = alice.create_room()
        for _ in range(3):
            alice.send_sticky(room_id)
        bob.join(room_id, a.name)
        rooms.append(room_id)
    in_kept = [bob.send_sticky(kept) for _ in range(5)]
    end = threading.Event()
    sending = [in_thread(partial(keep_sending, user, rooms, end), 1_000) for user in (alice, bob)]
    try:
        wait_until(lambda: len(deferred(a)) > ROOMS, "events to be deferred")
        ids = [
            admin.request("DELETE", f"/_synapse/admin/v2/rooms/{room_id}", {"purge": True})
            for room_id in rooms
        ]
        paths = [f"/_synapse/admin/v2/rooms/delete_status/{i['delete_id']}" for i in ids]

        def statuses() -> list[tuple[str, str]]:
            answers = [admin.request("GET", path) for path in paths]
            return [(answer["status"], answer.get("error", "")) for answer in answers]

        wait_until(
            lambda: {status for status, _ in statuses()} <= {"complete", "failed"},
            "the deletions to end",
            timeout_s=900,
        )
        causes = [part[:6_000] for part in "".join(a.logs().values()).split("scheduled task")[1:]]
        assert statuses() == [("complete", "")] * ROOMS, "\n".join(causes)
    finally:
        end.set()
    for finish in sending:
        finish()

    def rows(table: str) -> set[str]:
        return {room_id for (room_id,) in a.query(f"SELECT room_id FROM {table}")}

    wait_until(lambda: not rows("synapse_sticky_deferred") & set(rooms), "dead events to be gone")
    wait_until(lambda: not rows("synapse_sticky_newcomers") & set(rooms), "newcomers to be gone")
    assert len(deferred(a) & set(in_kept)) >= 3, "those of another room wait as before"
    for log in a.logs().values():
        assert failures(log) == []
