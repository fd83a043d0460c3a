"""Which rooms' state has changed, as Synapse remembers it of the last changes.

Synapse itself goes by this before it asks the database. A Synapse that does not have it is asked
each time.
"""

from synapse_sticky.homeserver.fitting import misfits
from synapse_sticky.homeserver.process import Homeserver
from synapse_sticky.homeserver.seams import STORE, Attribute, method

SEAMS = (
    Attribute(STORE, "_curr_state_delta_stream_cache"),
    method(
        "synapse.util.caches.stream_change_cache.StreamChangeCache",
        "has_any_entity_changed(stream_pos, /) -> bool",
    ),
)


class ChangedRooms:
    """Says that nothing has changed, where Synapse knows that."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._store = homeserver.store
        self._is_there = not misfits(SEAMS)

    def may_have_changed(self, after: int) -> bool:
        """Whether any room's state may have changed after this position of the events stream, among
        the changes that are visible to this process.

        Synapse notes a change before its position is visible here, whichever process made it. Of
        positions that are too long ago it knows nothing: then this is True.
        """
        if not self._is_there:
            return True
        return bool(self._store._curr_state_delta_stream_cache.has_any_entity_changed(after))
