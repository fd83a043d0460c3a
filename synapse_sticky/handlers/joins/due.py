"""Which of many is due first, where the times of some change."""

import heapq
import itertools


class DueTimes:
    """A time (ms since the epoch) for each of some keys. Work follows what is due or changes, not
    the number of keys (H3)."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, int]] = {}
        self._heap: list[tuple[int, int, str]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def keys(self) -> list[str]:
        """All that have a time."""
        return list(self._entries)

    def get(self, key: str) -> int | None:
        """When the key is due, None if it has no time."""
        entry = self._entries.get(key)
        return entry[0] if entry else None

    def set(self, key: str, due_ms: int | None) -> None:
        """Of those due at one time, the one that was set first is first."""
        if due_ms is None:
            self._entries.pop(key, None)
            return
        number = next(self._numbers)
        self._entries[key] = due_ms, number
        heapq.heappush(self._heap, (due_ms, number, key))
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [(*entry, key) for key, entry in self._entries.items()]
            heapq.heapify(self._heap)

    def _is_valid(self, entry: tuple[int, int, str]) -> bool:
        return self._entries.get(entry[2]) == entry[:2]

    def first(self) -> tuple[int, str] | None:
        """The one that is due first, and when."""
        while self._heap and not self._is_valid(self._heap[0]):
            heapq.heappop(self._heap)
        return (self._heap[0][0], self._heap[0][2]) if self._heap else None

    def take_first(self) -> str:
        """Takes out the one that is due first; there must be one."""
        self.first()
        key = self._heap[0][2]
        self.set(key, None)
        return key

    def due(self, now_ms: int) -> list[str]:
        """All that are due, in no certain order."""
        found, at = [], [0]
        while at:
            number = at.pop()
            if number < len(self._heap) and self._heap[number][0] <= now_ms:
                if self._is_valid(self._heap[number]):
                    found.append(self._heap[number][2])
                at += (2 * number + 1, 2 * number + 2)
        return found
