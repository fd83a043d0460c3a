"""What stands in the place of functions by which Synapse drops something from its caches."""

from collections.abc import Callable, Sequence
from typing import Any

from synapse_sticky.logs import bounded

logger = bounded(__name__)

Listeners = Sequence[Callable[[str], None]]
Then = Callable[[Callable[..., None], Listeners], Callable[..., None]]
"""Takes the function, and who is called back after it with what it was called with."""

# With the names of their arguments that Synapse's functions have: each event comes by the first.


def then_of_event(original: Callable[..., None], listeners: Listeners) -> Callable[..., None]:
    """For a function of an event ID."""

    def invalidate(event_id: Any, *args: Any, **options: Any) -> None:
        original(event_id, *args, **options)
        _tell(listeners, event_id)

    return invalidate


def then_of_room(original: Callable[..., None], listeners: Listeners) -> Callable[..., None]:
    """For a function of a room ID."""

    def invalidate(room_id: Any, *args: Any, **options: Any) -> None:
        original(room_id, *args, **options)
        _tell(listeners, room_id)

    return invalidate


def _tell(listeners: Listeners, changed: Any) -> None:
    # What an event says that it redacts is anything at all; and what comes after this must come,
    # whatever fails here.
    if not isinstance(changed, str) or "\0" in changed:
        return
    for listener in listeners:
        try:
            listener(changed)
        except Exception:
            logger.exception("Could not note that %r changed", changed)
