"""A position of the sticky events stream."""

from collections.abc import Mapping
from typing import NamedTuple

NO_WRITERS: Mapping[str, int] = {}
"""Empty. A dict, as every sync asks about it; nobody changes it."""


class Position(NamedTuple):
    """A position of the sticky events stream, which several writers may write to.

    stream_id: the position of every writer that is not in ``writers``.
    writers: the positions of those that are further, by instance name.
    """

    stream_id: int
    writers: Mapping[str, int] = NO_WRITERS

    def of(self, instance_name: str) -> int:
        """The position of this writer."""
        return self.writers.get(instance_name, self.stream_id)

    def is_before_or_at(self, other: "Position") -> bool:
        """Is no writer further here than there?"""
        if not self.writers and not other.writers:
            return self.stream_id <= other.stream_id
        return self.stream_id <= other.stream_id and all(
            self.of(writer) <= other.of(writer) for writer in {*self.writers, *other.writers}
        )
