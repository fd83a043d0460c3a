"""A position of the sticky events stream."""

from collections.abc import Mapping

import attr


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Position:
    """A position of the sticky events stream, which several writers may write to.

    stream_id: the position of every writer that is not in ``writers``.
    writers: the positions of those that are further, by instance name.
    """

    stream_id: int
    writers: Mapping[str, int] = attr.Factory(dict)

    def of(self, instance_name: str) -> int:
        """The position of this writer."""
        return self.writers.get(instance_name, self.stream_id)

    def is_before_or_at(self, other: "Position") -> bool:
        """Is no writer further here than there?"""
        return self.stream_id <= other.stream_id and all(
            self.of(writer) <= other.of(writer) for writer in {*self.writers, *other.writers}
        )
