"""Ways not to be joined to a room, and what those users are given."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

from tests.lab.client import ApiError, Client


def nothing(alice: Client, bob: Client, room_id: str) -> None:
    pass


def invite(alice: Client, bob: Client, room_id: str) -> None:
    alice.invite(room_id, bob.user_id)


def join_and_leave(alice: Client, bob: Client, room_id: str) -> None:
    bob.join(room_id)
    bob.leave(room_id)


def kick(alice: Client, bob: Client, room_id: str) -> None:
    bob.join(room_id)
    alice.kick(room_id, bob.user_id)


def ban(alice: Client, bob: Client, room_id: str) -> None:
    bob.join(room_id)
    alice.ban(room_id, bob.user_id)


def knock(alice: Client, bob: Client, room_id: str) -> None:
    alice.send_state(room_id, "m.room.join_rules", {"join_rule": "knock"})
    bob.request("POST", f"knock/{quote(room_id)}")


NOT_JOINED = [nothing, invite, join_and_leave, kick, ban, knock]
"""Each makes bob somebody who is not joined to alice's room."""


def let_in(alice: Client, bob: Client, room_id: str) -> None:
    """Whatever the user is to the room, they join."""
    alice.send_state(room_id, "m.room.join_rules", {"join_rule": "public"})
    members = alice.request("GET", f"rooms/{quote(room_id)}/members")["chunk"]
    if any(m["state_key"] == bob.user_id and m["content"]["membership"] == "ban" for m in members):
        alice.request("POST", f"rooms/{quote(room_id)}/unban", {"user_id": bob.user_id})
    bob.join(room_id)


def asked_one_by_one(user: Client, room_id: str, event_id: str) -> list[str]:
    """What the endpoints for single rooms and events say, those that refuse left out."""
    room, event = quote(room_id), quote(event_id)
    paths = [
        f"rooms/{room}/event/{event}",
        f"rooms/{room}/context/{event}",
        f"rooms/{room}/messages?dir=b&limit=100",
        f"rooms/{room}/messages?dir=f&limit=100",
    ]
    answers = []
    for path in paths:
        with allowed_to_fail(403, 404):
            answers.append(json.dumps(user.request("GET", path)))
    return answers


@contextmanager
def allowed_to_fail(*statuses: int) -> Iterator[None]:
    """What may be refused with one of these statuses, but not fail otherwise."""
    try:
        yield
    except ApiError as e:
        if e.status not in statuses:
            raise
