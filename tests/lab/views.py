"""Every endpoint that gives a user events of a room, and which of a thread's it shows."""

import secrets
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from tests.lab.client import STICKY_PARAMETER, Client
from tests.lab.membership import allowed_to_fail

Thread = tuple[str, str]
"""The IDs of a message and of a reply to it."""
View = dict[str, tuple[bool, bool]]
"""By endpoint, whether it shows the message and the reply."""

_BODY = "needle"


def send_thread(user: Client, room_id: str, sticky_ms: int | None = None) -> Thread:
    """A message and a reply to it, both sticky for so long or both not sticky."""
    root = send_message(user, room_id, sticky_ms)
    return root, send_message(user, room_id, sticky_ms, reply_to=root)


def send_message(
    user: Client, room_id: str, sticky_ms: int | None = None, reply_to: str | None = None
) -> str:
    """A message that can be searched for, in the thread of another if need be. Gives its ID."""
    content: dict[str, Any] = {"msgtype": "m.text", "body": _BODY}
    if reply_to is not None:
        content["m.relates_to"] = {"rel_type": "m.thread", "event_id": reply_to}
    path = f"rooms/{quote(room_id)}/send/m.room.message/{secrets.token_hex(8)}"
    query = {} if sticky_ms is None else {STICKY_PARAMETER: sticky_ms}
    event_id: str = user.request("PUT", path, content, **query)["event_id"]
    return event_id


def view(user: Client, room_id: str, thread: Thread) -> View:
    """What the user is shown of it. An endpoint that refuses shows nothing."""
    root, reply = thread
    room = quote(room_id)
    v1 = f"/_matrix/client/v1/rooms/{room}"
    relations = f"{v1}/relations/{quote(root)}"
    paths = {
        "event": f"rooms/{room}/event/{{}}",
        "context": f"rooms/{room}/context/{{}}?limit=100",
        "messages": f"rooms/{room}/messages?dir=b&limit=100",
        "messages forwards": f"rooms/{room}/messages?dir=f&limit=100",
        "relations": f"{relations}?limit=100",
        "relations by type": f"{relations}/m.thread?limit=100",
        "relations by both types": f"{relations}/m.thread/m.room.message?limit=100",
        "threads": f"{v1}/threads?limit=100",
        "initialSync of the room": f"rooms/{room}/initialSync?limit=100",
        "initialSync": "initialSync?limit=100",
    }
    seen: View = {}
    for name, path in paths.items():
        about = (quote(root), quote(reply))
        shown = [_shown(user, "GET", path.format(event)) for event in about]
        seen[name] = (root in shown[0], reply in shown[1])
    for order in ("rank", "recent"):
        term = {
            "search_term": _BODY,
            "filter": {"rooms": [room_id], "limit": 100},
            "order_by": order,
        }
        for name, more in (("", {}), (" with context", {"event_context": {"before_limit": 50}})):
            query = {"search_categories": {"room_events": {**term, **more}}}
            shown_ids = _shown(user, "POST", "search", query)
            seen[f"search by {order}{name}"] = (root in shown_ids, reply in shown_ids)
    return seen


def is_hidden(seen: View) -> bool:
    """Does no endpoint show any of it?"""
    return not any(root or reply for root, reply in seen.values())


def event_ids_in(answer: Any) -> set[str]:
    """The IDs of all events in an answer, those aside that are bundled with others."""
    return set(_event_ids(answer))


def _event_ids(answer: Any) -> Iterator[str]:
    if isinstance(answer, list):
        for item in answer:
            yield from _event_ids(item)
    elif isinstance(answer, dict):
        if answer.keys() >= {"event_id", "type", "content"}:
            yield answer["event_id"]
            return
        for item in answer.values():
            yield from _event_ids(item)


def _shown(user: Client, method: str, path: str, body: object = None) -> set[str]:
    with allowed_to_fail(403, 404):
        return event_ids_in(user.request(method, path, body))
    return set()
