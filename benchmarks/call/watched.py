"""A call that observers look on: all that there is to sum up."""

from benchmarks.call.causes import Trouble
from benchmarks.call.observers import Observer
from benchmarks.call.people import Participant


class WatchedCall:
    """Whatever story is played. ``start_s`` and ``end_s`` are seconds of the monotonic clock,
    ``cpu_s`` is what each server used meanwhile."""

    def __init__(self) -> None:
        self.start_s = self.end_s = 0.0
        self.cpu_s: dict[str, float] = {}
        self.troubles: list[Trouble] = []
        self.participants: list[Participant] = []
        self.controls: list[Participant] = []
        self.observers: list[Observer] = []
