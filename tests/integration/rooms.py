"""What several test modules do with rooms and servers."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.lab import Client, Homeserver, Peer, wait_until


def room_of(*users: Client, via: Homeserver, history_visibility: str = "shared") -> str:
    """A room that all users are in, made by the first of them on the server ``via``."""
    room_id = users[0].create_room(history_visibility)
    for user in users[1:]:
        user.join(room_id, via.name)
    everybody = {user.user_id for user in users}
    for user in users:
        wait_until_joined(user, room_id, everybody)
    return room_id


def wait_until_joined(user: Client, room_id: str, members: set[str]) -> None:
    """Waits until these users are joined, as this user's server sees it."""
    wait_until(lambda: members <= user.members(room_id), f"{members} to be joined")


def wait_until_gone(user: Client, room_id: str, gone: Client) -> None:
    """Waits until the user is no longer joined, as this user's server sees it."""
    wait_until(lambda: gone.user_id not in user.members(room_id), f"{gone.user_id} to be gone")


def keep_sending_until_joined(sender: Client, room_id: str, user: Client, joined: Client) -> None:
    """Sends events, so that the sender's server looks whether its back-off is over, until this
    user's server knows that the other one joined."""
    wait_until(
        lambda: sender.send(room_id) and joined.user_id in user.members(room_id),
        f"{joined.user_id} to be joined",
    )


def introduce(newcomer: Homeserver, *servers: Homeserver) -> None:
    """Has the servers fetch the newcomer's keys, without their sending it anything else."""
    for server in servers:
        response = server.as_seen_by(newcomer).event("$of-no-interest")
        assert response.status_code == 404, response.text


def wait_until_seen(server: Homeserver, newcomer: Homeserver | Peer, room_id: str) -> None:
    """Waits until the server has noticed the newcomer."""
    line = joined_line(newcomer, room_id)
    wait_until(lambda: server.log_has(line), f"{newcomer.name} to be noticed")


def joined_line(newcomer: Homeserver | Peer, room_id: str) -> str:
    """What the module logs of a newcomer."""
    return f"{newcomer.name} has newly joined {room_id}"


def wait_until_all_pushed(server: Homeserver, room_id: str) -> None:
    """Waits until the server owes nobody anything of the room."""
    wait_until(lambda: room_id not in backlogged_rooms(server), "everything to be pushed")


def wait_until_sticky(server: Homeserver, event_id: str) -> None:
    """Waits until the server has taken the event for sticky."""
    wait_until(lambda: is_sticky_at(server, event_id), f"{event_id} to arrive at {server.name}")


def send_old_events(room_id: str, senders: list[Client], count: int) -> set[str]:
    """Each sends so many sticky events, all of them in turns."""
    return {sender.send_sticky(room_id) for _ in range(count) for sender in senders}


def backlogged_rooms(server: Homeserver) -> set[str]:
    """The rooms that the server has something left to push of, to anybody."""
    rows = server.query("SELECT room_id FROM destination_rooms_sticky_events_backlog")
    return {room_id for (room_id,) in rows}


def is_sticky_at(server: Homeserver, event_id: str) -> bool:
    """Has the server taken the event for sticky?"""
    return bool(server.query("SELECT 1 FROM sticky_events WHERE event_id = ?", event_id))


def wait_until_expired(server: Homeserver, event_id: str) -> None:
    """Waits for the end of a sticky event."""
    wait_until(
        lambda: (
            not server.query(
                "SELECT 1 FROM sticky_events WHERE event_id = ? AND expires_at > ?",
                event_id,
                int(time.time() * 1000),
            )
        ),
        "the event to expire",
    )


def in_thread(function: Callable[[], object], timeout_s: float = 120) -> Callable[[], None]:
    """Runs the function by itself; the result waits for its end and raises what it raised."""
    executor = ThreadPoolExecutor(1)
    future = executor.submit(function)

    def finish() -> None:
        executor.shutdown(wait=False)
        future.result(timeout_s)

    return finish


NO_LIMITS = {"federation": {"mode": "off"}, "local": {"per_user": None}}
"""The module's configuration for tests of other things that send hundreds of events."""


def limits(mode: str = "defer", **options: object) -> dict[str, object]:
    """A module's configuration with these limits for other servers, and no others."""
    none = dict.fromkeys(("per_server", "per_server_in_room", "per_sender", "per_room"))
    return {"federation": {"mode": mode, **none, **options}}


def deferred(server: Homeserver) -> set[str]:
    """The IDs of the events that wait for their release."""
    return {
        event_id for (event_id,) in server.query("SELECT event_id FROM synapse_sticky_deferred")
    }


def entered(server: Homeserver, room_id: str) -> list[str]:
    """The IDs of the room's events in the sticky events stream, in order."""
    sql = "SELECT event_id FROM sticky_events WHERE room_id = ? ORDER BY stream_id"
    return [event_id for (event_id,) in server.query(sql, room_id)]


def sticky_at(server: Homeserver, room_id: str) -> set[str]:
    """The IDs of the room's events that the server has taken for sticky, delivered or deferred."""
    return {*entered(server, room_id), *deferred(server)}


def has_event(server: Homeserver, event_id: str) -> bool:
    """Has the server persisted the event, in whatever way?"""
    return bool(server.query("SELECT 1 FROM events WHERE event_id = ?", event_id))


def pdus_of(server: Homeserver, event_ids: list[str]) -> list[Any]:
    """The server's own events, as it sends them."""
    sql = "SELECT json FROM event_json WHERE event_id = ?"
    return [json.loads(server.query(sql, event_id)[0][0]) for event_id in event_ids]


def wait_until_persisted(server: Homeserver, event_id: str) -> None:
    """Waits until the server has persisted the event."""
    wait_until(lambda: has_event(server, event_id), f"{event_id} to arrive at {server.name}")


def wait_until_taken_in(server: Homeserver, room_id: str, event_ids: set[str]) -> None:
    """Waits until the server has persisted all of the events: they are sticky, or wait."""
    wait_until(
        lambda: event_ids <= deferred(server) | set(entered(server, room_id)),
        f"{len(event_ids)} events to be taken in",
        timeout_s=240,
    )
