"""The call on real homeservers: everybody does what the schedule says, observers look on."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import quote

import requests

from benchmarks.call.causes import Party, Trouble
from benchmarks.call.observers import Observer, SdkObserver, SlidingObserver, SyncObserver
from benchmarks.call.people import Participant
from benchmarks.call.schedule import (
    DELAY_MS,
    FLOOD,
    FLOOD_KEYS,
    A,
    B,
    C,
    D,
    Times,
    by_account,
    roles,
)
from benchmarks.call.sticky_map import KEY_FIELD
from benchmarks.events import cpu_s
from tests.lab import Client, Homeserver, Lab
from tests.lab.client import ApiError
from tests.lab.say import say
from tests.soak.moderation import ANOTHER_HOST, REDACT_FLAG, REDACTING

SETTLES_S = 10.0
"""Observers look on for so long after the end."""


class Call:
    """One call with one seed.

    Args:
        observers: of each kind, at each server.
        sdk: whether one more of each is matrix-js-sdk, in Node.
        plain: without the module.
        exempt: whether the gateway's account is in ``exempt_users``.
    """

    def __init__(
        self,
        lab: Lab,
        seed: int,
        seconds: float,
        *,
        participants: int,
        observers: int,
        sdk: bool,
        plain: bool,
        exempt: bool,
    ) -> None:
        self.times = Times(seconds)
        self.start_s = self.end_s = 0.0
        self.cpu_s = dict.fromkeys((A, B, C, D), 0.0)
        self.troubles: list[Trouble] = []
        self.participants: list[Participant] = []
        self.controls: list[Participant] = []
        self._roles = roles(seed, seconds, participants)
        self.servers = self._start(lab, plain=plain, exempt=exempt)
        self._set_up_rooms()
        self._set_up_people()
        self.observers: list[Observer] = [
            kind(*self._observing(server, kind.kind, number))
            for server in (A, B, C)
            for kind in (SyncObserver, SlidingObserver)
            for number in range(observers)
        ]
        if sdk:
            self.observers += [
                SdkObserver(*self._observing(server, SdkObserver.kind, number), self.room)
                for server in (A, B, C)
                for number in range(observers)
            ]

    # Set-up

    @staticmethod
    def _start(lab: Lab, *, plain: bool, exempt: bool) -> dict[str, Homeserver]:
        lab.prepare()
        made = {
            name: lab.make(
                module=not plain,
                extra=REDACTING,
                forwarded=name == B,
                host=ANOTHER_HOST if name == C else "localhost",
            )
            for name in (A, B, C, D)
        }
        exempted = {"exempt_users": [f"@gateway-*:{made[A].name}"] if exempt else []}
        for name, server in made.items():
            local = {"mode": "off"} if name == D else exempted
            server.configure_module({"federation": exempted, "local": local})
            server.start()
        for server in made.values():
            server.first_start()
        return made

    def _set_up_rooms(self) -> None:
        self._creator = self.servers[A].user("creator")
        self.room, self.quiet_room = (self._creator.create_room() for _ in range(2))
        self._flooder = self.servers[D].user("flooder")
        self._flooder.join(self.room, self.servers[A].name)

    def _set_up_people(self) -> None:
        self._scripts: list[list[tuple[float, Callable[[], object]]]] = []
        self._joining: list[Client] = []
        self._joined = threading.Event()
        for account, of_account in by_account(self._roles).items():
            role = of_account[0]
            user = self.servers[role.server].user(account.replace(" ", "-"))
            room = self.quiet_room if role.is_control else self.room
            if role.server == C:
                self._joining.append(user)
            else:
                user.join(room, self.servers[A].name)
            steps: list[tuple[float, Callable[[], object]]] = []
            if role.server == C:
                steps.append((self.times.newcomer, partial(self._joined.wait, self.times.end)))
            for one in of_account:
                participant = Participant(Party(one.name, one.server, room), user, one.name)
                (self.controls if one.is_control else self.participants).append(participant)
                steps += [(at_s, self._do(participant, step)) for at_s, step in one.steps]
            self._scripts.append(sorted(steps, key=lambda step: step[0]))
            if account == "banned":
                self._of_banned = self._scripts[-1]

    @staticmethod
    def _do(participant: Participant, step: str) -> Callable[[], object]:
        if step == "leave_if_silent":
            return partial(participant.leave_if_silent_for, DELAY_MS)
        do: Callable[[], object] = getattr(participant, step)
        return do

    def _observing(self, server: str, kind: str, number: int) -> tuple[Party, Client]:
        user = self.servers[server].user("observer")
        if server != C:
            for room in (self.room, self.quiet_room):
                user.join(room, self.servers[A].name)
        return Party(f"{server}, {kind} {number + 1}", server), user

    # The call

    def play(self) -> None:
        """The whole call, from its start to some seconds after its end."""
        say(f"  {len(self.participants)} participants, {len(self.observers)} observers", end="")
        try:
            self._play()
        finally:
            for observer in self.observers:
                observer.close()
        say("")

    def _play(self) -> None:
        for observer in self.observers:
            if observer.party.server != C:
                observer.open()
        self.start_s = time.monotonic()
        self._count_cpu(-1)
        scripts = [*self._scripts, *self._events()]
        with ThreadPoolExecutor(len(scripts)) as executor:
            for _ in executor.map(self._perform, scripts):
                pass
        time.sleep(SETTLES_S)
        self.end_s = time.monotonic()
        self._count_cpu(1)

    def _count_cpu(self, sign: int) -> None:
        for name, server in self.servers.items():
            self.cpu_s[name] += sign * cpu_s(server)

    def _events(self) -> list[list[tuple[float, Callable[[], object]]]]:
        """The troubles, each in a thread of its own."""
        times = self.times
        return [
            [(times.flapping[0], self._flapping)],
            [(times.gateway[0], self._gateway)],
            [(times.flood, self._flood)],
            [(times.newcomer, self._join)],
            [(times.crash, self._crash)],
            [(times.ban, self._ban)],
            [(times.away[0], self._away)],
            [(times.app[0], self._restart_app)],
            [(times.denied[0], self._deny)],
            [(times.restart, self._restart)],
        ]

    def _perform(self, steps: list[tuple[float, Callable[[], object]]]) -> None:
        for at_s, do in steps:
            self._wait_until(at_s)
            try:
                do()
            except ApiError as e:
                if e.status != requests.codes.forbidden or steps is not self._of_banned:
                    raise
                return

    def _wait_until(self, at_s: float) -> None:
        time.sleep(max(self.start_s + at_s - time.monotonic(), 0))

    def _trouble(
        self, cause: str, start_s: float, concerns: Callable[[Party, Party], bool]
    ) -> None:
        """It began then, and is over now."""
        say(f", {cause}", end="")
        self.troubles.append(Trouble(cause, start_s, time.monotonic(), concerns))

    def _flapping(self) -> None:
        start_s = time.monotonic()
        self._wait_until(self.times.flapping[1])
        self._trouble("flapper", start_s, lambda _, p: p.name == "flapper")

    def _gateway(self) -> None:
        start_s = time.monotonic()
        self._wait_until(self.times.end)
        self._trouble("gateway", start_s, lambda _, p: p.name.startswith("gateway"))

    def _flood(self) -> None:
        start_s = time.monotonic()
        for number in range(FLOOD):
            key = f"flood {number % FLOOD_KEYS}"
            self._flooder.send_sticky(self.room, content={KEY_FIELD: key, "number": number})
        self._trouble("flood", start_s, lambda _, p: True)

    def _join(self) -> None:
        """The third server joins: its observers, then those who are to take part."""
        start_s = time.monotonic()
        for observer in self.observers:
            if observer.party.server == C:
                self._have_join(observer.user)
                observer.open()
        with ThreadPoolExecutor(2) as executor:
            list(executor.map(self._have_join, self._joining))
        self._joined.set()
        self._trouble("newcomer", start_s, lambda o, _: o.server == C)

    def _have_join(self, user: Client) -> None:
        """Under load it may take so long that the room denies the server, or A is restarted."""
        while True:
            try:
                user.join(self.room, self.servers[A].name)
            except ApiError:
                if time.monotonic() > self.start_s + self.times.end:
                    raise
                time.sleep(1)
            else:
                return

    def _crash(self) -> None:
        start_s = time.monotonic()
        time.sleep(DELAY_MS / 1000)
        self._trouble("crash", start_s, lambda _, p: p.name == "crasher")

    def _ban(self) -> None:
        banned = next(p for p in self.participants if p.party.name == "banned")
        asked_s = time.monotonic()
        body = {"user_id": banned.user_id, REDACT_FLAG: True}
        self._creator.request("POST", f"rooms/{quote(self.room)}/ban", body)
        banned.gone(asked_s, time.monotonic())
        self._trouble("ban", asked_s, lambda _, p: p.name == "banned")

    def _away(self) -> None:
        forwarder = self.servers[B].forwarder
        assert forwarder is not None
        start_s = time.monotonic()
        forwarder.offline()
        self._wait_until(self.times.away[1])
        forwarder.online()
        self._trouble("absent", start_s, _between(B))

    def _restart_app(self) -> None:
        app = next(o for o in self.observers if isinstance(o, SlidingObserver))
        start_s = time.monotonic()
        app.close()
        self._wait_until(self.times.app[1])
        app.open()
        self._trouble("app restarted", start_s, lambda o, _: o is app.party)

    def _deny(self) -> None:
        start_s = time.monotonic()
        acl: dict[str, Any] = {"allow": ["*"], "deny": [f"{ANOTHER_HOST}*"]}
        self._creator.send_state(self.room, "m.room.server_acl", acl)
        self._wait_until(self.times.denied[1])
        self._creator.send_state(self.room, "m.room.server_acl", {**acl, "deny": []})
        self._trouble("denied", start_s, _between(C))

    def _restart(self) -> None:
        start_s = time.monotonic()
        self.cpu_s[A] += cpu_s(self.servers[A])
        self.servers[A].restart()
        self._trouble("restart", start_s, lambda o, p: A in (o.server, p.server))


def _between(server: str) -> Callable[[Party, Party], bool]:
    """Whether one of the two is of this server, and the other is not."""
    return lambda o, p: server in (o.server, p.server) and o.server != p.server
