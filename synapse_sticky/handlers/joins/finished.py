"""The own events that a push is done with while an earlier one is still open."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence


class Finished:
    """Stream IDs, as runs. Events that follow each other make one run, so that memory follows the
    number of gaps: of events that are still open (H3)."""

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        """
        Args:
            runs: the first and the last stream ID of each, ascending.
        """
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in runs:
            self._starts.append(start)
            self._ends.append(end)

    def __len__(self) -> int:
        """How many runs there are."""
        return len(self._starts)

    def __contains__(self, stream_id: int) -> bool:
        return self.end_of(stream_id) is not None

    def end_of(self, stream_id: int) -> int | None:
        """The last stream ID of the run that has this one, None if none has it."""
        at = bisect_right(self._starts, stream_id) - 1
        return self._ends[at] if at >= 0 and stream_id <= self._ends[at] else None

    @property
    def last(self) -> int:
        """The highest stream ID; there must be one."""
        return self._ends[-1]

    def add(self, stream_id: int) -> None:
        """The push is done with this event."""
        if stream_id not in self:
            at = bisect_right(self._starts, stream_id)
            self._starts.insert(at, stream_id)
            self._ends.insert(at, stream_id)

    def after(self, position: int) -> "Finished":
        """A copy, without the runs that end before the position."""
        at = bisect_left(self._ends, position)
        return Finished(zip(self._starts[at:], self._ends[at:], strict=True))

    def join(self, open_ids: Sequence[int], up_to: int) -> None:
        """Makes one run of those that have no open event in between.

        Args:
            open_ids: ascending, all that there are up to ``up_to``.
        """
        starts, ends = self._starts, self._ends
        self._starts, self._ends = [], []
        for start, end in zip(starts, ends, strict=True):
            if (
                self._ends
                and end <= up_to
                and bisect_left(open_ids, start) == bisect_left(open_ids, self._ends[-1])
            ):
                self._ends[-1] = end
            else:
                self._starts.append(start)
                self._ends.append(end)
