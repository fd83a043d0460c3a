"""How Synapse persists the events that wait for their room, all at once (H1).

While a room's events are being persisted, Synapse makes one batch of those that come meanwhile, and
persists it in one transaction. If the database does not take one of them, all of them fail: those
of other servers are dropped, and local users get an error. Here each part of such a batch is
persisted by itself then. Not where the cause passes: the parts would fail as well.

An event that ends the database's connection each time fails with an error that does not say so,
after a while. It is not tried for long then.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import attr
from synapse.module_api.errors import SynapseError

from synapse_sticky.handlers.staging.batches.suspects import Suspects
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.causes import Cause, Verdict
from synapse_sticky.homeserver.seams import HOMESERVER, Attribute, attributes, method
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_PERSISTING = "synapse.storage.controllers.persist_events"
_QUEUE = f"{_PERSISTING}._EventPeristenceQueue"

SEAMS = (
    method(HOMESERVER, "get_storage_controllers() -> StorageControllers"),
    Attribute("synapse.storage.controllers.StorageControllers", "persistence"),
    Attribute(f"{_PERSISTING}.EventsPersistenceStorageController", "_event_persist_queue"),
    method(_QUEUE, "async add_to_queue(room_id, task)", is_replaced=True),
    Attribute(_QUEUE, "_per_item_callback"),
    *attributes(f"{_PERSISTING}._PersistEventsTask", "events_and_contexts"),
)

_OF_AN_EVENT = (Verdict.REFUSED, Verdict.UNKNOWN)
"""A cause that nobody knows may be one event's, too."""


@attr.s(auto_attribs=True, slots=True, eq=False)
class _Part:
    """What somebody wants persisted, and waits for.

    pairs: events and contexts.
    error: what to raise to them, though the batch went well.
    """

    pairs: list[Any]
    error: Exception | None = None


def _is_sticky(event: Any) -> bool:
    return event.sticky_duration() is not None


def _events_of(task: Any) -> list[Any]:
    # Another task than this is to calculate the room's state.
    return [event for event, _ in getattr(task, "events_and_contexts", ())]


class Batches:
    """Keeps an event that the database does not take from failing those that wait with it."""

    def __init__(
        self, homeserver: Homeserver, verdict_of: Callable[[Exception], Verdict | None]
    ) -> None:
        """
        Args:
            verdict_of: whether the cause of an error passes.
        """
        self._homeserver = homeserver
        self._verdict_of = verdict_of
        self._parts: dict[str, list[_Part]] = {}
        self._suspects = Suspects()

    def install(self) -> None:
        """Takes effect from the next event on, in a process that persists events."""
        persistence: Any = self._homeserver.hs.get_storage_controllers().persistence
        if persistence is None:
            return
        queue = persistence._event_persist_queue
        self._homeserver.replace(queue, "add_to_queue", self._remembering_parts)
        self._homeserver.replace(queue, "_per_item_callback", self._parting)

    def _remembering_parts(self, original: Callable[..., Any]) -> Callable[..., Any]:
        async def add_to_queue(room_id: str, task: Any) -> Any:
            # Another task than this is to calculate the room's state.
            part = _Part([*getattr(task, "events_and_contexts", ())])
            self._parts.setdefault(room_id, []).append(part)
            try:
                result = await original(room_id, task)
            finally:
                self._parts[room_id].remove(part)
                if not self._parts[room_id]:
                    del self._parts[room_id]
            if part.error is not None:
                raise part.error
            return result

        return add_to_queue

    def _parting(self, original: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
        async def persist(room_id: str, task: Any) -> Any:
            events = _events_of(task)
            try:
                result = await original(room_id, task)
            except Exception as e:
                parts = self._parts_to_try(room_id, task, e)
                if not parts:
                    self._raise_if_to_blame(events, e)
                    raise
            else:
                for event in events:
                    self._suspects.persisted(event.event_id)
                return result
            return await self._by_themselves(persist, room_id, task, parts)

        def per_item_callback(room_id: str, task: Any) -> Awaitable[Any]:
            # Each event comes by here.
            is_plain = not self._suspects and not any(map(_is_sticky, _events_of(task)))
            return (original if is_plain else persist)(room_id, task)

        return per_item_callback

    def _parts_to_try(self, room_id: str, task: Any, error: Exception) -> list[_Part]:
        """The parts of a batch that failed with this error, if one of them may be to blame."""
        parts = self._parts_of(room_id, task)
        return parts if len(parts) > 1 and self._verdict_of(error) in _OF_AN_EVENT else []

    @staticmethod
    async def _by_themselves(
        persist: Callable[..., Awaitable[Any]], room_id: str, task: Any, parts: list[_Part]
    ) -> dict[str, str]:
        logger.info("Persisting %d parts of a batch of %s by themselves", len(parts), room_id)
        replaced: dict[str, str] = {}
        for part in parts:
            try:
                alone = attr.evolve(task, events_and_contexts=part.pairs)
                replaced.update(await persist(room_id, alone))
            except Exception as e:
                part.error = e
        return replaced

    def _raise_if_to_blame(self, events: list[Any], error: Exception) -> None:
        """Raises an error of unknown cause if the connection was lost by what is persisted."""
        cause = Cause.of_database(error)
        if len(events) != 1 or cause is None or not cause.is_lost_connection():
            return
        (event,) = events
        if _is_sticky(event) and self._suspects.failed(event.event_id):
            raise SynapseError(500, "It ends the database's connection each time") from error

    def _parts_of(self, room_id: str, task: Any) -> list[_Part]:
        """The parts of a batch that has a sticky event; none if that is not all of it."""
        batch = _events_of(task)
        if not any(map(_is_sticky, batch)):
            return []
        there = set(map(id, batch))
        parts = [p for p in self._parts.get(room_id, ()) if {id(e) for e, _ in p.pairs} & there]
        return parts if sum(len(part.pairs) for part in parts) == len(batch) else []
