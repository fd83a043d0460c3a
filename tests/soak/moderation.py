"""Moderators in the soak: they ban users with all that they sent, and deny a server for a while."""

import random
from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import attr

from tests.lab import Homeserver
from tests.lab.client import ApiError
from tests.soak.listeners import Member

REDACTING: dict[str, Any] = {"experimental_features": {"msc4293_enabled": True}}
"""In homeserver.yaml: a ban can redact all events of the user (MSC4293)."""
ANOTHER_HOST = "127.0.0.1"
"""The host of the server that is shut out. ACLs tell servers apart by it."""
REDACT_FLAG = "org.matrix.msc4293.redact_events"
_SENT = 5

T = TypeVar("T")


class Patiently(Protocol):
    """Makes a request to the server of this number, again while that server is down."""

    def __call__(self, number: int, do: Callable[[], T]) -> T: ...


class UnlessLimited(Protocol):
    """The same; None if a rate limit refuses it."""

    def __call__(self, number: int, do: Callable[[], T]) -> T | None: ...


@attr.s(auto_attribs=True, frozen=True)
class Banned:
    """A user who was banned, with the sticky events that it had sent to the room of this number."""

    user_id: str
    server: int
    room: int
    event_ids: set[str]
    bodies: set[str]


class Moderation:
    """What moderators do.

    Args:
        rooms: their room IDs.
        creators: who may ban and deny in each.
    """

    def __init__(
        self,
        servers: list[Homeserver],
        rooms: list[str],
        creators: list[Member],
        patiently: Patiently,
        unless_limited: UnlessLimited,
        chance: random.Random,
    ) -> None:
        self._servers = servers
        self._rooms = rooms
        self._creators = creators
        self._patiently = patiently
        self._unless_limited = unless_limited
        self._random = chance
        self._denying: set[int] = set()
        self.banned: list[Banned] = []

    # Actions

    def ban_with_redactions(self) -> None:
        """A user joins, sends, and is banned with all that it sent."""
        room = self._random.randrange(len(self._rooms))
        number = self._random.randrange(len(self._servers))
        creator, room_id = self._creators[room], self._rooms[room]
        via = self._servers[creator.server].name
        guest = self._patiently(number, lambda: self._servers[number].user("guest"))
        try:
            self._patiently(number, lambda: guest.join(room_id, via))
        except ApiError:
            return  # who was to help with it is down, or denies this server
        banned = Banned(guest.user_id, number, room, set(), set())
        for part in range(_SENT):
            body = f"banned-{guest.user_id}-{part}"
            send = lambda body=body: guest.send_sticky(room_id, content={"body": body})  # noqa: E731
            if (event_id := self._unless_limited(number, send)) is not None:
                banned.event_ids.add(event_id)
                banned.bodies.add(body)
        ban = {"user_id": guest.user_id, REDACT_FLAG: True}
        self._patiently(
            creator.server,
            lambda: creator.client.request("POST", f"rooms/{quote(room_id)}/ban", ban),
        )
        self.banned.append(banned)

    def change_acl(self) -> None:
        """An ACL denies a server, or is put right again."""
        may = [n for n, creator in enumerate(self._creators) if self._is_of_another_host(creator)]
        if may:
            room = self._random.choice(may)
            self._set_acl(room, denies=room not in self._denying)

    def allow_all(self) -> None:
        """Puts right each ACL that denies a server now."""
        for room in sorted(self._denying):
            self._set_acl(room, denies=False)

    def _is_of_another_host(self, creator: Member) -> bool:
        return not self._servers[creator.server].name.startswith(ANOTHER_HOST)

    def _set_acl(self, room: int, *, denies: bool) -> None:
        acl = {"allow": ["*"], "deny": [f"{ANOTHER_HOST}*"] if denies else []}
        creator = self._creators[room]
        self._patiently(
            creator.server,
            lambda: creator.client.send_state(self._rooms[room], "m.room.server_acl", acl),
        )
        (self._denying.add if denies else self._denying.discard)(room)

    # What was promised

    def known_to(self, server: Homeserver, room: int) -> list[Banned]:
        """Who was banned from the room as far as the server knows."""
        sql = (
            "SELECT state_key FROM current_state_events"
            " WHERE room_id = ? AND type = 'm.room.member' AND membership = 'ban'"
        )
        known = {user_id for (user_id,) in server.query(sql, self._rooms[room])}
        return [b for b in self.banned if b.room == room and b.user_id in known]

    def forbidden(self, room: int) -> set[str]:
        """The bodies that a server which joins the room now is not to be sent any more."""
        return {
            body
            for number, server in enumerate(self._servers)
            for banned in self.known_to(server, room)
            if banned.server == number
            for body in banned.bodies
        }
