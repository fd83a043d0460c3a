"""Rows of the sticky events stream that this process has persisted itself.

Pure: no clock, no database. What is noted spares the query for it; what is not is read.
"""

from collections.abc import Collection
from typing import Protocol, TypeVar


class Row(Protocol):
    """What counts of a row here."""

    @property
    def stream_id(self) -> int: ...
    @property
    def event_id(self) -> str: ...


RowT = TypeVar("RowT", bound=Row)

MOST_NOTED = 500


class NotedRows(dict[int, RowT]):
    """By stream ID: the rows that the index has not taken in yet, ``MOST_NOTED`` at most."""

    def note(self, rows: Collection[RowT]) -> None:
        """Notes rows before their positions are visible."""
        for row in rows:
            # An attempt of the same transaction that failed had another stream ID for it.
            for stream_id in [at for at, noted in self.items() if noted.event_id == row.event_id]:
                del self[stream_id]
            self[row.stream_id] = row
        if len(self) > MOST_NOTED:
            self.clear()

    def forget_if_noted(self, event_id: str) -> None:
        """The event has changed: what is noted has to be read."""
        # Each event comes by here, and most often nothing is noted.
        if self and any(row.event_id == event_id for row in self.values()):
            self.clear()

    def all_between(self, after: int, up_to: int) -> list[RowT] | None:
        """The rows with ``after < stream_id <= up_to``, ascending.

        None if one of these IDs is not noted: it may be another process's, or nobody's. So it does
        not matter who writes to the stream, nor in which ways this process does.
        """
        if up_to - after > len(self):
            return None
        ids = range(after + 1, up_to + 1)
        return [self[at] for at in ids] if all(at in self for at in ids) else None

    def drop(self, up_to: int) -> None:
        """The index has taken in all up to this stream ID."""
        for stream_id in [at for at in self if at <= up_to]:
            del self[stream_id]
