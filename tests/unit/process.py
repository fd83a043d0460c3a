"""A process of a homeserver whose time passes when a test says."""

from collections.abc import Awaitable, Callable
from typing import Any

import attr

from tests.unit.test_limits import NOW_MS, Here, done


@attr.s(auto_attribs=True, eq=False)
class Timer:
    process: "Process"
    due_ms: int
    what: str
    function: Callable[[], Awaitable[None]]

    def active(self) -> bool:
        return self in self.process.timers

    def cancel(self) -> None:
        self.process.timers.remove(self)


class Silence:
    """A signal that nobody waits for."""

    def fire(self) -> None: ...


class Process(Here):
    """The same homeserver, with any number of timers, and a reactor that has turns."""

    server_name = instance_name = "here"

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW_MS
        self.timers: list[Timer] = []
        self.logged: list[Exception] = []
        self.turns: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def call_later(self, delay_ms: int, what: str, function: Any, *args: Any) -> Any:
        assert not args
        self.timers.append(timer := Timer(self, self.now + delay_ms, what, function))
        return timer

    def in_reactor(self, function: Callable[..., object], *args: Any) -> None:
        self.turns.append((function, args))

    async def transact(self, what: str, function: Any, *args: Any) -> Any:
        self.database.execute("BEGIN")
        try:
            result = await super().transact(what, function, *args)
        except BaseException:
            self.database.execute("ROLLBACK")
            raise
        self.database.execute("COMMIT")
        return result

    transact_alone = transact

    def new_signal(self) -> Silence:
        return Silence()

    async def give_way(self) -> None:
        """Nobody else has anything to do."""

    def take_turns(self) -> None:
        """Lets happen what other threads asked for."""
        turns, self.turns = self.turns, []
        for function, args in turns:
            function(*args)

    def pass_ms(self, ms: int) -> None:
        """Lets time pass, and all that is due by then happen, in its order."""
        until = self.now + ms
        while due := [timer for timer in self.timers if timer.due_ms <= until]:
            first = min(due, key=lambda timer: timer.due_ms)
            self.now = max(self.now, first.due_ms)
            first.cancel()
            try:
                done(first.function())
            except Exception as e:  # noqa: BLE001  # Synapse logs it
                self.logged.append(e)
            self.take_turns()
        self.now = until
