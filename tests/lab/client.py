"""A client over HTTP."""

import itertools
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import requests

STICKY_PARAMETER = "org.matrix.msc4354.sticky_duration_ms"
STICKY_FIELD = "msc4354_sticky"
TTL = "msc4354_sticky_duration_ttl_ms"
SLIDING_EXTENSION = "org.matrix.msc4354.sticky_events"
_SLIDING_SYNC = "/_matrix/client/unstable/org.matrix.simplified_msc3575/sync"
HOUR_MS = 3_600_000

_transactions = itertools.count()
_syncs = itertools.count()


def _other_blanks() -> str:
    """White space, never the same."""
    return f"{next(_syncs):b}".replace("0", " ").replace("1", "\t")


class ApiError(AssertionError):
    """A request was answered with an error."""

    def __init__(self, response: requests.Response) -> None:
        self.status = response.status_code
        try:
            self.body = response.json()
        except ValueError:
            self.body = {}
        self.errcode = self.body.get("errcode")
        request = response.request
        super().__init__(f"{request.method} {request.url}: {self.status} {response.text[:500]}")


class Client:
    """One user's device."""

    def __init__(self, base_url: str, user_id: str, access_token: str) -> None:
        self.user_id = user_id
        self.base_url = base_url
        self.access_token = access_token
        self._session = requests.Session()
        self._session.trust_env = False  # the environment may name a proxy
        self._session.headers["Authorization"] = f"Bearer {access_token}"

    def again(self) -> "Client":
        """The same device by another connection, for another thread."""
        return Client(self.base_url, self.user_id, self.access_token)

    def request(self, method: str, path: str, body: object = None, **query: Any) -> Any:
        """A request to the client-server API; ``path`` follows ``/_matrix/client/v3/``.

        Raises:
            ApiError: it was answered with an error.
        """
        if method != "GET" and body is None:
            body = {}
        url = path if path.startswith("/") else f"/_matrix/client/v3/{path}"
        response = self._session.request(
            method, self.base_url + url, json=body, params=query, timeout=90
        )
        if not response.ok:
            raise ApiError(response)
        return response.json()

    def create_room(self, history_visibility: str = "shared", **options: Any) -> str:
        """A public room."""
        visibility = {
            "type": "m.room.history_visibility",
            "state_key": "",
            "content": {"history_visibility": history_visibility},
        }
        body = {"preset": "public_chat", "initial_state": [visibility], **options}
        room_id: str = self.request("POST", "createRoom", body)["room_id"]
        return room_id

    def join(self, room_id: str, via: str | None = None) -> None:
        """Joins by room ID, through the server ``via`` if it is given."""
        self.request("POST", f"join/{quote(room_id)}", **({"via": via} if via else {}))

    def leave(self, room_id: str) -> None:
        self.request("POST", f"rooms/{quote(room_id)}/leave")

    def kick(self, room_id: str, user_id: str) -> None:
        self.request("POST", f"rooms/{quote(room_id)}/kick", {"user_id": user_id})

    def ban(self, room_id: str, user_id: str) -> None:
        self.request("POST", f"rooms/{quote(room_id)}/ban", {"user_id": user_id})

    def invite(self, room_id: str, user_id: str) -> None:
        self.request("POST", f"rooms/{quote(room_id)}/invite", {"user_id": user_id})

    def members(self, room_id: str) -> set[str]:
        """The joined users, as this client's server sees it."""
        return set(self.request("GET", f"rooms/{quote(room_id)}/joined_members")["joined"])

    def send(self, room_id: str, content: object = None, **query: Any) -> str:
        """Sends an event and gives its ID."""
        path = f"rooms/{quote(room_id)}/send/org.example.call/{next(_transactions)}"
        event_id: str = self.request("PUT", path, content or {"body": "here"}, **query)["event_id"]
        return event_id

    def send_sticky(self, room_id: str, duration_ms: int = HOUR_MS, content: object = None) -> str:
        """Sends a sticky event and gives its ID."""
        return self.send(room_id, content, **{STICKY_PARAMETER: duration_ms})

    def send_state(self, room_id: str, kind: str, content: object) -> str:
        path = f"rooms/{quote(room_id)}/state/{kind}/"
        event_id: str = self.request("PUT", path, content)["event_id"]
        return event_id

    def event(self, room_id: str, event_id: str) -> Any:
        return self.request("GET", f"rooms/{quote(room_id)}/event/{quote(event_id)}")

    def redact(self, room_id: str, event_id: str) -> None:
        path = f"rooms/{quote(room_id)}/redact/{quote(event_id)}/{next(_transactions)}"
        self.request("PUT", path)

    def sync(
        self,
        since: str | None = None,
        timeout_ms: int = 0,
        filter_: object = None,
        *,
        may_be_repeated: bool = False,
    ) -> Any:
        """A sync that shows what is there now.

        Synapse answers a request that comes again within two minutes from its cache, unless the
        text of the filter is another. If the answer ``may_be_repeated``, the text is the same.
        """
        filter_text = json.dumps(filter_ or {}) + ("" if may_be_repeated else _other_blanks())
        query: dict[str, Any] = {"timeout": timeout_ms, "filter": filter_text}
        if since is not None:
            query["since"] = since
        return self.request("GET", "sync", **query)

    def sliding_sync(
        self,
        after: Any = None,
        *,
        limit: int = 100,
        timeout_ms: int = 0,
        since: str | None = None,
        **body: Any,
    ) -> Any:
        """Sliding sync with the extension of sticky events, ``after`` an answer or from nothing.

        An answer without the extension's section, as nothing is new, is given one with the token
        of the request; ``has_section`` says whether it had one.

        ``since`` alone goes on from an old position with a new connection. Without anything else in
        ``body`` there is one list of all rooms.
        """
        query: dict[str, Any] = {"timeout": timeout_ms}
        extension: dict[str, Any] = {"enabled": True, "limit": limit}
        if after is not None:
            query["pos"] = after["pos"]
            since = after["extensions"][SLIDING_EXTENSION].get("next_batch")
        if since is not None:
            extension["since"] = since
        everything = {"ranges": [[0, 0]], "timeline_limit": 0, "required_state": []}
        request = {"lists": {"all": everything}, "extensions": {SLIDING_EXTENSION: extension}}
        answer = self.request("POST", _SLIDING_SYNC, {**request, **body}, **query)
        answer["has_section"] = SLIDING_EXTENSION in answer["extensions"]
        nothing = {"rooms": {}, **({"next_batch": since} if since is not None else {})}
        answer["extensions"].setdefault(SLIDING_EXTENSION, nothing)
        return answer

    def collect_sticky(
        self,
        room_id: str,
        expected: set[str],
        timeout_s: float = 90,
        progress: Callable[[int], None] | None = None,
        since: str | None = None,
        filter_: object = None,
    ) -> dict[str, float]:
        """Syncs until all expected sticky events have been seen, or the time is over.

        Gives all sticky events of the room in the order of their arrival, with the monotonic
        second at which each was seen, whether in the sticky section or in the timeline.
        ``progress`` is told how many there are after each sync.
        """
        seen: dict[str, float] = {}
        deadline = time.monotonic() + timeout_s
        while not expected <= seen.keys() and (left_s := deadline - time.monotonic()) > 0:
            answer = self.sync(since, int(min(left_s, 10) * 1000) if since else 0, filter_)
            since = answer["next_batch"]
            for event_id in sticky_events(answer, room_id):
                seen.setdefault(event_id, time.monotonic())
            if progress is not None:
                progress(len(seen))
        return seen


WITHOUT_TIMELINE = {"room": {"timeline": {"not_types": ["org.example.call"]}}}
"""A filter for /sync: what the lab's clients send comes in the sticky section only."""


def sticky_events(sync: Any, room_id: str) -> list[str]:
    """The IDs of the room's sticky events in a /sync answer."""
    room = sync.get("rooms", {}).get("join", {}).get(room_id, {})
    events = room.get("msc4354_sticky", {}).get("events", [])
    timeline = room.get("timeline", {}).get("events", [])
    return [e["event_id"] for e in [*events, *(e for e in timeline if STICKY_FIELD in e)]]


def sliding_sticky_events(answer: Any, room_id: str) -> list[str]:
    """The IDs in the room's section of sticky events in an answer of sliding sync."""
    rooms = answer["extensions"][SLIDING_EXTENSION]["rooms"]
    return [event["event_id"] for event in rooms.get(room_id, {}).get("events", [])]


def token_of(answer: Any) -> str:
    """Where an answer of sliding sync has its client go on."""
    token: str = answer["extensions"][SLIDING_EXTENSION]["next_batch"]
    return token


def assert_nothing_new(user: Client, since: str, **body: Any) -> None:
    """A new connection that goes on from there has no section, whatever its limit."""
    for limit in (100, 1, 0):
        assert not user.sliding_sync(since=since, limit=limit, **body)["has_section"], limit


def ignore(user: Client, *others: Client) -> None:
    """The user ignores these, and nobody else."""
    content: Any = {"ignored_users": {other.user_id: {} for other in others}}
    user.request("PUT", f"user/{user.user_id}/account_data/m.ignored_user_list", content)
