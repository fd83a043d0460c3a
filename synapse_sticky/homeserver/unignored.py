"""Whom a user ignored, and does not ignore any more (H7): the tokens of the user's clients are past
the sticky events that were kept from them (D6).

A sync that goes on from before the change gets these events beside what is new. What a user ignores
is noted at each sync, in memory: who takes it back while the process restarts may miss them. A
Synapse without one of the parts is left as it is, and the log says so.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

import attr
from twisted.internet.defer import CancelledError

from synapse_sticky.homeserver.fitting import misfits
from synapse_sticky.homeserver.position import Position
from synapse_sticky.homeserver.process import Homeserver
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, attributes, method
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_SYNC = "synapse.handlers.sync"
_LIST = "m.ignored_user_list"

SEAMS = (
    method(STORE, "async get_global_account_data_by_type_for_user(user_id, data_type, /)"),
    method(STORE, "get_max_account_data_stream_id() -> int"),
    method(HOMESERVER, "get_sync_handler() -> SyncHandler"),
    method(
        f"{_SYNC}.SyncHandler",
        "async sticky_events_by_room(sync_result_builder, now_token, /, since_token)"
        " -> tuple[_, _]",
        is_replaced=True,
    ),
    *attributes(f"{_SYNC}.SyncResultBuilder", "sync_config", "joined_room_ids"),
    Attribute(f"{_SYNC}.SyncConfig", "user"),
    *attributes("synapse.types.StreamToken", "account_data_key", "sticky_events_key"),
)

_MOST_REMEMBERED = 10_000
"""Of so many users it is remembered whom they ignore."""

_HOUR_MS = 3_600_000

EventsOf = Callable[[Collection[str], Collection[str], Position], Awaitable[dict[str, list[str]]]]
"""Senders, rooms and a position of the sticky events stream to the senders' unexpired events up to
it, by room. It bounds how many."""


@attr.s(auto_attribs=True, slots=True)
class _User:
    """
    content: the account data that was looked at last.
    ignored: whom it ignores.
    taken_back: by who is ignored no more, a position of the account data after the change, and when
        it was seen (ms of the steady time).
    """

    content: object
    ignored: frozenset[str]
    taken_back: dict[str, tuple[int, int]] = attr.Factory(dict)


class Unignored:
    """Of the users who sync in this process."""

    def __init__(self, homeserver: Homeserver, events_of: EventsOf) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        self._events_of = events_of
        problems = misfits(SEAMS)
        self._is_there = not problems
        if problems:
            logger.error(
                "This Synapse does not fit: %s. So a user who ignores another one no more does not"
                " get the sticky events that were kept back.",
                "; ".join(problems),
            )
        self._users: OrderedDict[str, _User] = OrderedDict()

    async def events(
        self, user_id: str, after: Any, room_ids: Collection[str], up_to: Position
    ) -> dict[str, list[str]]:
        """By room, the events up to this position whose senders the user ignored at some time after
        Synapse's token ``after``, and does not ignore now. If it fails, there are none."""
        try:
            senders = await self._senders(user_id, after.account_data_key)
            return await self._events_of(senders, room_ids, up_to) if senders else {}
        except CancelledError:
            raise
        except Exception:
            logger.exception("Could not find what %s does not ignore any more", user_id)
            return {}

    async def _senders(self, user_id: str, after: int) -> set[str]:
        if not self._is_there:
            return set()
        content = await self._store.get_global_account_data_by_type_for_user(user_id, _LIST)
        user, now_ms = self._users.get(user_id), self._homeserver.steady_ms()
        if user is None:
            if content:
                self._remember(user_id, _User(content, _ignored(content)))
            return set()
        self._users.move_to_end(user_id)
        if content is not user.content:
            # The change is visible here. So it is before the position that is visible now.
            position, ignored = self._store.get_max_account_data_stream_id(), _ignored(content)
            for sender in user.ignored - ignored:
                user.taken_back[sender] = position, now_ms
            user.content, user.ignored = content, ignored
        # Whatever was kept from the user has expired after an hour.
        user.taken_back = {
            sender: (position, seen_ms)
            for sender, (position, seen_ms) in user.taken_back.items()
            if now_ms - seen_ms < _HOUR_MS and sender not in user.ignored
        }
        if not user.ignored and not user.taken_back:
            del self._users[user_id]
        return {s for s, (position, _) in user.taken_back.items() if after < position}

    def _remember(self, user_id: str, user: _User) -> None:
        self._users[user_id] = user
        if len(self._users) > _MOST_REMEMBERED:
            self._users.popitem(last=False)

    def add_to_sync(self) -> None:
        """From now on /sync has them, unless this Synapse does not fit. Sliding sync asks by
        itself."""
        if not self._is_there:
            return
        mark = self._homeserver.mark()
        try:
            self._add_to_sync()
        except Exception:
            self._homeserver.undo_to(mark)
            logger.warning("What a user does not ignore any more stays away", exc_info=True)

    def _add_to_sync(self) -> None:
        from synapse_sticky.homeserver.tokens import position_of

        def make(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def sticky_events_by_room(
                sync_result_builder: Any,
                now_token: Any,
                since_token: Any = None,
                *args: Any,
                **options: Any,
            ) -> Any:
                reached, by_room = await original(
                    sync_result_builder, now_token, since_token, *args, **options
                )
                more = await self.events(
                    sync_result_builder.sync_config.user.to_string(),
                    since_token or now_token,
                    sync_result_builder.joined_room_ids,
                    position_of((since_token or now_token).sticky_events_key),
                )
                return reached, together(by_room, more) if more else by_room

            return sticky_events_by_room

        self._homeserver.replace(
            self._homeserver.hs.get_sync_handler(), "sticky_events_by_room", make
        )


def together(
    by_room: Mapping[str, list[str]], more: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """The events of both, each once; the earlier ones first."""
    found = {room_id: dict.fromkeys(event_ids) for room_id, event_ids in more.items()}
    for room_id, event_ids in by_room.items():
        found.setdefault(room_id, {}).update(dict.fromkeys(event_ids))
    return {room_id: list(event_ids) for room_id, event_ids in found.items()}


def _ignored(content: Any) -> frozenset[str]:
    """Whom this account data says to ignore, as Synapse reads it."""
    users = content.get("ignored_users") if isinstance(content, Mapping) else None
    return frozenset(users) if isinstance(users, Mapping) else frozenset()
