"""``actions``: what administrators order for a time, and what they ordered before (E3)."""

import re
import secrets
from collections.abc import Callable, Collection
from typing import Any, Protocol

import attr
from synapse.module_api.errors import Codes, SynapseError

from synapse_sticky.admin.requests import Request, busy, identifier, not_found, wrong
from synapse_sticky.admin.tables import MOST_IN_FORCE, Action, ActionTable, TooSoonError
from synapse_sticky.config import FederationConfig, Mode
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.logs import bounded

logger = bounded(__name__)

RELEASED_WITHIN_MS = 120_000
"""Each process that has what is to be released sees the order within this time. One that starts
later does not."""

_SHORTEST_MS, _USUAL_MS, _LONGEST_MS = 60_000, 3_600_000, 7 * 24 * 3_600_000
_LONGEST_REASON = 500  # characters
_AT_ONCE = {
    "release": RELEASED_WITHIN_MS,
    "discard": RELEASED_WITHIN_MS,
    # The process that sends may be down. After an hour nothing is sticky that was.
    "push": 3_600_000,
}
"""What is done once: for how long it is in force, if nobody does it."""

# Nothing is of what has another form: nobody would notice that the order does nothing.
_FORMS = {
    "server": ("the name of a server", re.compile(r"[^@!#$/ ]+\Z")),
    "room_id": ("a room ID, which begins with !", re.compile("!.")),
    "sender": ("a user ID, as @user:server", re.compile("@[^:]*:.")),
}
_FIELDS = ("kind", "server", "room_id", "sender", "for_ms", "reason")


class Rooms(Protocol):
    """Who is in a room now."""

    async def is_in_room(self, room_id: str, /) -> bool: ...
    async def is_joined(self, room_id: str, server: str, /) -> bool: ...


class Actions:
    """Takes orders, ends them and lists them. Each has a row, and a line in the log.

    Args:
        on_change: is called after each.
        duties: those that are on. Without ``deferral`` nothing can be held, without ``joins``
            nothing is pushed.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        rooms: Rooms,
        table: ActionTable,
        config: FederationConfig,
        on_change: Callable[[], None],
        *,
        duties: Collection[str] = ("deferral", "joins"),
    ) -> None:
        self._homeserver = homeserver
        self._rooms = rooms
        self._duties = duties
        self._table = table
        self._config = config
        self._on_change = on_change
        self._is_made = False

    async def _make_table(self) -> None:
        # This process may be the first one that needs it.
        if not self._is_made:
            await migrate(self._homeserver, self._table)
            self._is_made = True

    async def get(self, request: Request) -> dict[str, Any]:
        """All of them, those made last in front. Raises ``SynapseError`` (400)."""
        request.only("from", "limit")
        limit, before = request.limit(), None
        if (token := request.token()) is not None:
            made, _, action_id = token.partition("~")
            if not action_id or not (made.isascii() and made.isdecimal() and len(made) <= 15):
                raise wrong("'from' must be the 'next' of an answer")
            before = int(made), action_id
        await self._make_table()
        found = await self._table.page(before, limit + 1)
        page, now_ms = found[:limit], self._homeserver.now_ms()
        answer = {"now_ms": now_ms, "actions": [_shown(action, now_ms) for action in page]}
        if len(found) > limit:
            answer["next"] = f"{page[-1].made_ms}~{page[-1].action_id}"
        return answer

    async def post(self, request: Request) -> dict[str, Any]:
        """Makes one. Raises ``SynapseError``: 400 if it is not as it must be, 429 if it is a push
        too soon after another one."""
        request.only()
        action = self._action_of(request)
        if action.kind == "push":
            await self._check_push(str(action.room_id), str(action.server))
        await self._make_table()
        try:
            is_added = await self._table.add(action)
        except TooSoonError as e:
            problem = "This room is being pushed to this server, or was a moment ago"
            raise busy(problem, e.retry_after_ms) from None
        if not is_added:
            problem = f"{MOST_IN_FORCE} actions are in force: end some first"
            raise SynapseError(400, problem, Codes.LIMIT_EXCEEDED)
        self._tell("%s has ordered %s until %d (%s): %r", action, action.made_by)
        return _shown(action, self._homeserver.now_ms())

    async def delete(self, request: Request) -> dict[str, Any]:
        """Ends one. Raises ``SynapseError``: 404 if there is none of this ID."""
        request.only()
        action_id = identifier("action_id", request.path[1])
        await self._make_table()
        ended = await self._table.end(action_id, request.admin)
        if ended is None:
            raise not_found("There is no such action")
        action, was_in_force = ended
        if was_in_force:
            self._tell("%s has ended %s until %d (%s): %r", action, request.admin)
        return _shown(action, self._homeserver.now_ms())

    def _tell(self, text: str, action: Action, admin: str) -> None:
        of_what = ", ".join(filter(None, (action.server, action.room_id, action.sender)))
        what = f"{action.kind} of {of_what}"
        logger.info(text, admin, what, action.until_ms, action.action_id, action.reason)
        self._on_change()

    def _action_of(self, request: Request) -> Action:
        body = request.body
        if unknown := sorted({*body} - {*_FIELDS}):
            raise wrong(f"{unknown[0]!r} is no field; there are: {', '.join(_FIELDS)}")
        kind = body.get("kind")
        given = {name: _of_form(name, body[name]) for name in _FORMS if body.get(name) is not None}
        if kind == "hold":
            self._check_hold(given)
        elif kind == "exempt":
            self._check_exempt(given)
        elif kind == "push":
            if given.keys() != {"server", "room_id"}:
                raise wrong("'push' needs 'server' and 'room_id', and no other")
        elif kind in ("release", "discard"):
            if not given:
                raise wrong(f"{kind!r} needs 'server', 'room_id' or 'sender'; or several of them")
        else:
            raise wrong("'kind' must be one of: hold, exempt, release, discard, push")
        now_ms = self._homeserver.now_ms()
        return Action(
            secrets.token_urlsafe(12),
            kind,
            given.get("server"),
            given.get("room_id"),
            given.get("sender"),
            _reason(body.get("reason", "")),
            request.admin,
            now_ms,
            now_ms + _for_ms(kind, body.get("for_ms")),
        )

    def _check_hold(self, given: dict[str, str]) -> None:
        if given.keys() != {"server"}:
            raise wrong("'hold' needs 'server', and no other")
        if given["server"] == self._homeserver.server_name:
            raise wrong("This server's own events cannot be held")
        if self._config.applied().mode is Mode.OFF:
            mode = self._config.mode.value
            raise wrong(f"Nothing can be held, as federation.mode is {mode!r}")
        if "deferral" not in self._duties:
            raise wrong("Nothing can be held, as the duty 'deferral' is off")

    def _check_exempt(self, given: dict[str, str]) -> None:
        if len(given) != 1 or "room_id" in given:
            raise wrong("'exempt' needs either 'server' or 'sender', and no other")
        if self._config.applied().mode is Mode.OFF:
            mode = self._config.mode.value
            raise wrong(f"There is no limit to be exempt from, as federation.mode is {mode!r}")
        server = given.get("server") or given["sender"].partition(":")[2]
        if server == self._homeserver.server_name:
            raise wrong(
                "This server's own users are limited by local.per_user. Name them in"
                " local.exempt_users, or override their rate limits by Synapse's Admin API"
            )

    async def _check_push(self, room_id: str, server: str) -> None:
        here = self._homeserver.server_name
        if server == here:
            raise wrong("This server pushes nothing to itself")
        if "joins" not in self._duties:
            raise wrong("Nothing is pushed, as the duty 'joins' is off")
        if not await self._rooms.is_in_room(room_id):
            raise wrong("This server is not in the room")
        for name in (here, server):
            if not await self._is_joined(room_id, name):
                raise wrong(f"{name!r} is not in the room, or the room's ACL denies it")

    async def _is_joined(self, room_id: str, server: str) -> bool:
        try:
            return await self._rooms.is_joined(room_id, server)
        except ValueError:
            return False  # no name of a server, by which the ACL could be asked


def _of_form(name: str, value: object) -> str:
    text = identifier(name, value)
    what, form = _FORMS[name]
    if form.match(text) is None:
        raise wrong(f"{name!r} must be {what}")
    return text


def _for_ms(kind: Any, value: object) -> int:
    if kind in _AT_ONCE:
        if value is not None:
            raise wrong(f"{kind!r} has no 'for_ms'")
        return _AT_ONCE[kind]
    if value is None:
        return _USUAL_MS
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(value, int) or not is_number or not _SHORTEST_MS <= value <= _LONGEST_MS:
        raise wrong(f"'for_ms' must be a whole number from {_SHORTEST_MS} to {_LONGEST_MS}")
    return value


def _reason(value: object) -> str:
    if (
        isinstance(value, str)
        and len(value) <= _LONGEST_REASON
        and (not value or value.isprintable())
    ):
        try:
            value.encode()
            return value
        except UnicodeEncodeError:
            pass
    raise wrong(f"'reason' must be printable text of at most {_LONGEST_REASON} characters")


def _shown(action: Action, now_ms: int) -> dict[str, Any]:
    is_in_force = action.ended_ms is None and now_ms < action.until_ms
    return {**attr.asdict(action), "in_force": is_in_force}
