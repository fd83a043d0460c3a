"""What stands in the place of functions by which Synapse drops something from its caches."""

from collections.abc import Callable, Sequence
from typing import Any

from synapse_sticky.logs import bounded

logger = bounded(__name__)

Listeners = Sequence[Callable[[str], None]]


def _is_none_known(_: str) -> bool:
    return False


def then_told(
    original: Callable[..., None],
    listeners: Listeners,
    is_known: Callable[[str], bool] = _is_none_known,
) -> Callable[..., None]:
    """Calls the listeners back with what the original was called with, after it.

    Args:
        is_known: tells of what the listeners need not hear.
    """

    # The name is that of an event's function: each event comes by that, so nothing is between.
    def invalidate(event_id: Any, *args: Any, **options: Any) -> None:
        original(event_id, *args, **options)
        if not is_known(event_id):
            _tell(listeners, event_id)

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
