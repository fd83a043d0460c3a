"""What MatrixRTC's clients send: who takes part in a room's call."""

import itertools
from typing import Any
from urllib.parse import quote

from tests.lab.client import HOUR_MS, STICKY_PARAMETER, Client
from tests.lab.sticky_map import STICKY_KEY

MEMBER = "org.matrix.msc4143.rtc.member"

_SLOT = "m.call#ROOM"

_transactions = itertools.count()


def send_member(user: Client, room_id: str, duration_ms: int = HOUR_MS) -> str:
    """The user is in the room's call. Gives the event's ID."""
    joined = {
        "application": {"type": "m.call"},
        "member": {"user_id": user.user_id, "device_id": "DEVICE", "id": "device"},
        "transports": {"published": [], "can_subscribe": ["livekit"]},
        "versions": [],
    }
    return _send(user, room_id, joined, duration_ms)


def send_leave(user: Client, room_id: str) -> str:
    """The user leaves the call. Gives the event's ID."""
    return _send(user, room_id, {}, HOUR_MS)


def _send(user: Client, room_id: str, content: Any, duration_ms: int) -> str:
    content = {"slot_id": _SLOT, STICKY_KEY: f"device of {user.user_id}", **content}
    path = f"rooms/{quote(room_id)}/send/{MEMBER}/rtc-{next(_transactions)}"
    sent = user.request("PUT", path, content, **{STICKY_PARAMETER: duration_ms})
    return str(sent["event_id"])


def members_of(events: list[Any]) -> set[str]:
    """The senders of those of these events that say that somebody is in the call."""
    return {e["sender"] for e in events if e["type"] == MEMBER and "application" in e["content"]}
