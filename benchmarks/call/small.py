"""A small call, told by counts: whom each observer lacks or shows wrongly after each step.

The same steps are played on several sets of three servers side by side, so that a busy machine
disturbs all of them alike. After each step all wait until they are right, or their patience is
over.
"""

import time
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import attr

from benchmarks.call.causes import Party
from benchmarks.call.observers import SyncObserver
from benchmarks.call.people import Participant
from benchmarks.call.schedule import A, B, C
from benchmarks.call.sticky_map import KEY_FIELD, Key
from tests.lab import Homeserver, wait_until
from tests.lab.say import say

PARTICIPANTS, DEVICES = 12, 2
"""Devices that take part, and how many of them are one user's."""
FLAPS = 5
FLOOD, FLOOD_KEYS = 60, 10
"""No more than a user may send at once with the module's default limits."""


@attr.s(auto_attribs=True, frozen=True)
class Shown:
    """How many participants an observer lacks though they are there, and shows though they are
    gone."""

    missing: int
    ghosts: int

    def __str__(self) -> str:
        parts = ((self.missing, "lacks"), (self.ghosts, "ghosts"))
        return ", ".join(f"{what} {count}" for count, what in parts if count) or "right"


RIGHT = Shown(0, 0)


def beside(there: Set[Key], shown: Set[Key]) -> Shown:
    """What an observer shows, beside who is there in truth."""
    return Shown(len(there - shown), len(shown - there))


@attr.s(auto_attribs=True, frozen=True)
class Row:
    """What there is after a step: how many participants, and of each call what its observers show,
    by their servers. Before the third server joins, nobody looks on there."""

    step: str
    there: int
    shown: dict[str, dict[str, Shown]]


class SmallCall:
    """On three servers: A has made the room, B is in it, and C joins in the middle.

    Args:
        patience_s: how long it waits after a step for its observers to be right.
    """

    def __init__(self, servers: Sequence[Homeserver], patience_s: float) -> None:
        self.patience_s = patience_s
        self._via = servers[0].name
        by_name = dict(zip((A, B, C), servers, strict=True))
        users = {name: server.user("observer") for name, server in by_name.items()}
        self._room = users[A].create_room()
        users[B].join(self._room, self._via)
        self.observers = [SyncObserver(Party(name, name), user) for name, user in users.items()]
        self.participants: list[Participant] = []
        for number in range(PARTICIPANTS // DEVICES):
            name = (A, B)[number % 2]
            user = by_name[name].user()
            user.join(self._room, self._via)
            for device in range(DEVICES):
                party = Party(f"member {number}, device {device}", name, self._room)
                self.participants.append(Participant(party, user, f"device {device}"))
        self._flooder = by_name[B].user("flooder")
        self._flooder.join(self._room, self._via)

    @property
    def steps(self) -> dict[str, list[Callable[[], object]]]:
        """The story, in its order."""
        people = self.participants
        flapper = people[3]
        return {
            f"{PARTICIPANTS} come": [p.come for p in people],
            "4 leave, one after it flapped": [
                *[flapper.go, flapper.come] * FLAPS,
                *(p.go for p in people[:4]),
                *(p.renew for p in people[4:8]),
            ],
            f"a client floods ({FLOOD} events)": [partial(self._flood, n) for n in range(FLOOD)],
            "a third server joins": [self._join],
            "3 come back, 2 others leave": [
                *(p.come for p in people[:3]),
                *(p.go for p in people[4:6]),
            ],
            "all leave": [p.go for p in (*people[:3], *people[6:])],
        }

    def open(self) -> None:
        """The story begins; at C nobody looks on yet."""
        for observer in self.observers[:-1]:
            observer.open()

    def do(self, step: str) -> None:
        """One step."""
        for do in self.steps[step]:
            do()

    def close(self) -> None:
        """The story is over."""
        with ThreadPoolExecutor(len(self.observers)) as executor:
            list(executor.map(lambda observer: observer.close(), self.observers))

    def there(self) -> set[Key]:
        """Whoever is there in truth."""
        return {p.key for p in self.participants if p.is_there}

    def shown(self) -> dict[str, Shown]:
        """What each observer that has looked on shows now, by its server."""
        there, participants = self.there(), {p.key for p in self.participants}
        return {
            observer.party.name: beside(there, observer.now() & participants)
            for observer in self.observers
            if observer.seen(time.monotonic())
        }

    def _flood(self, number: int) -> None:
        key = f"flood {number % FLOOD_KEYS}"
        self._flooder.send_sticky(self._room, content={KEY_FIELD: key, "number": number})

    def _join(self) -> None:
        observer = self.observers[-1]
        observer.user.join(self._room, self._via)
        observer.open()


def play(calls: Mapping[str, SmallCall]) -> list[Row]:
    """Plays all calls side by side, each step on all of them, and closes them."""
    rows = []
    first = next(iter(calls.values()))
    with ThreadPoolExecutor(len(calls)) as executor:
        try:
            for call in calls.values():
                call.open()
            for step in first.steps:
                say(f"  {step}")
                list(executor.map(SmallCall.do, calls.values(), [step] * len(calls)))
                rows.append(Row(step, len(first.there()), _wait(calls)))
        finally:
            list(executor.map(SmallCall.close, calls.values()))
    return rows


def _wait(calls: Mapping[str, SmallCall]) -> dict[str, dict[str, Shown]]:
    """What each call shows as soon as each is right, or has waited as long as it has patience."""
    since_s = time.monotonic()

    def is_over() -> dict[str, dict[str, Shown]]:
        waited_s = time.monotonic() - since_s
        found = {name: call.shown() for name, call in calls.items()}
        for name, call in calls.items():
            if waited_s <= call.patience_s and {*found[name].values()} != {RIGHT}:
                return {}
        return found

    return wait_until(is_over, "the observers", 2 * max(c.patience_s for c in calls.values()))


def say_rows(rows: Sequence[Row]) -> None:
    """A line for each step, a column for each observer of each call."""
    names = list(rows[-1].shown)
    line = "{:<34}{:>6}" + "   {:>8} {:>7} {:>7}" * len(names)
    say(line.format("", "", *(cell for name in names for cell in ("", "", name))))
    say(line.format("", "there", *(f"at {server}" for _ in names for server in (A, B, C))))
    for row in rows:
        cells = [str(row.shown[name].get(server, "-")) for name in names for server in (A, B, C)]
        say(line.format(row.step, row.there, *cells))
