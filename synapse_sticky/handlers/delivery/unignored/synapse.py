"""Whom local users ignore, in Synapse's account data; and what /sync has of it."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from synapse_sticky.handlers.delivery.unignored.handler import ChangedTxn
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.attempt import attempt_txn
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, Attribute, attributes, method, table
from synapse_sticky.homeserver.sections import together
from synapse_sticky.homeserver.spec import IGNORED_USER_LIST
from synapse_sticky.homeserver.tokens import position_of
from synapse_sticky.index import Position
from synapse_sticky.logs import bounded

if TYPE_CHECKING:
    from synapse_sticky.handlers.delivery.unignored.handler import Unignored

logger = bounded(__name__)

_SYNC = "synapse.handlers.sync"

SEAMS = (
    method(
        STORE,
        "_add_account_data_for_user(txn, next_id, user_id, account_data_type, content)",
        is_replaced=True,
    ),
    method(
        STORE,
        "async remove_account_data_for_user(user_id, account_data_type) -> int",
        is_replaced=True,
    ),
    method(STORE, "async add_account_data_for_user(user_id, account_data_type, content, /) -> int"),
    method(STORE, "async get_global_account_data_by_type_for_user(user_id, data_type, /)"),
    method(STORE, "async ignored_users(user_id, /)"),
    Attribute("synapse.util.caches.descriptors.CachedFunction", "invalidate"),
    Attribute(STORE, "_account_data_stream_cache"),
    method(
        "synapse.util.caches.stream_change_cache.StreamChangeCache",
        "has_entity_changed(entity, stream_pos, /) -> bool",
    ),
    table("ignored_users", "ignorer_user_id text, ignored_user_id text"),
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

_LIST = IGNORED_USER_LIST


class SynapseIgnoring:
    """Implements ``handler.Ignoring``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store

    def on_changed(self, changed_txn: ChangedTxn, changed: Callable[[], None]) -> None:
        def make_add(original: Callable[..., None]) -> Callable[..., None]:
            def _add_account_data_for_user(
                txn: Any,
                next_id: int,
                user_id: str,
                account_data_type: str,
                content: Any,
                *args: Any,
                **options: Any,
            ) -> None:
                is_list = account_data_type == _LIST
                before = self._ignored_txn(txn, user_id) if is_list else set[str]()
                original(txn, next_id, user_id, account_data_type, content, *args, **options)
                now = self._ignored_txn(txn, user_id) if is_list else before
                if before == now:
                    return
                change = (user_id, next_id, now - before, before - now)
                problem = attempt_txn(self._homeserver, txn, lambda: changed_txn(txn, *change))
                if problem is not None:
                    logger.warning("Could not note whom %s ignores no more: %s", user_id, problem)
                txn.call_after(changed)

            return _add_account_data_for_user

        def make_remove(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def remove_account_data_for_user(
                user_id: str, account_data_type: str, *args: Any, **options: Any
            ) -> Any:
                # What is removed is empty afterwards: so it is made empty in the one way.
                if account_data_type == _LIST and await self._list_of(user_id):
                    await self._store.add_account_data_for_user(user_id, _LIST, {})
                return await original(user_id, account_data_type, *args, **options)

            return remove_account_data_for_user

        self._homeserver.replace(self._store, "_add_account_data_for_user", make_add)
        self._homeserver.replace(self._store, "remove_account_data_for_user", make_remove)

    @staticmethod
    def _ignored_txn(txn: Cursor, user_id: str) -> set[str]:
        txn.execute(
            "SELECT ignored_user_id FROM ignored_users WHERE ignorer_user_id = ?", (user_id,)
        )
        return {ignored for (ignored,) in txn.fetchall()}

    async def _list_of(self, user_id: str) -> Any:
        return await self._store.get_global_account_data_by_type_for_user(user_id, _LIST)

    async def may_have_changed(self, user_id: str, after: int) -> bool:
        # Of any account data Synapse remembers that it changed. Few users have such a list.
        if not self._store._account_data_stream_cache.has_entity_changed(user_id, after):
            return False
        return await self._list_of(user_id) is not None

    def forget(self, user_id: str) -> None:
        self._store.ignored_users.invalidate((user_id,))

    def add_to_sync(self, unignored: "Unignored") -> None:
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
                if since_token is None:
                    return reached, by_room
                senders = await unignored.senders(
                    sync_result_builder.sync_config.user.to_string(),
                    since_token.account_data_key,
                    now_token.account_data_key,
                )
                if not senders:
                    return reached, by_room
                more = await unignored.events_of(
                    senders,
                    sync_result_builder.joined_room_ids,
                    Position(0),
                    position_of(since_token.sticky_events_key),
                )
                return reached, together(by_room, more)

            return sticky_events_by_room

        handler = self._homeserver.hs.get_sync_handler()
        self._homeserver.replace(handler, "sticky_events_by_room", make)
