"""When everybody in the call does what: the seed says it, whatever the servers do then.

Pure: nothing here waits or asks. Times are seconds after the call's start.
"""

import random

import attr

A, B, C, D = "ABCD"
"""The servers: the room's own, one that is away for a while, one that joins late, and a flooder."""

AWAY_S = 60.0
DELAY_MS = 5_000
FLOOD, FLOOD_KEYS = 300, 30
FLAPS_PER_SECOND = 5
GATEWAY_KEYS = 20
_RENEWED_AFTER_S = 60.0
_CONTROL_EVERY_S = 2.0
_CONTROL_AT_BURSTS = (4.0, 0.4)
"""For how long after each burst of the gateway the control changes how often."""

Step = tuple[float, str]
"""When, and which method of a participant."""


@attr.s(auto_attribs=True, frozen=True)
class Times:
    """When the troubles of a call of so many seconds begin, and end."""

    seconds: float

    def __call__(self, share: float) -> float:
        return share * self.seconds

    @property
    def gateway(self) -> tuple[float, float, float]:
        """It comes, goes, and comes again, each time with all of its keys at once."""
        return (self(0.05), self(0.74), self(0.77))

    @property
    def flapping(self) -> tuple[float, float]:
        return (self(0.08), self(0.13))

    @property
    def flood(self) -> float:
        return self(0.20)

    @property
    def newcomer(self) -> float:
        return self(0.32)

    @property
    def crash(self) -> float:
        return self(0.36)

    @property
    def ban(self) -> float:
        return self(0.39)

    @property
    def away(self) -> tuple[float, float]:
        start_s = self(0.42)
        return (start_s, start_s + min(AWAY_S, self(0.30)))

    @property
    def app(self) -> tuple[float, float]:
        return (self(0.50), self(0.53))

    @property
    def denied(self) -> tuple[float, float]:
        return (self(0.78), self(0.82))

    @property
    def restart(self) -> float:
        return self(0.87)

    @property
    def end(self) -> float:
        """The last leave; the others leave one after the other shortly before."""
        return self(0.97)

    @property
    def last_leaves(self) -> tuple[float, float]:
        return (self(0.93), self.end)


@attr.s(auto_attribs=True, frozen=True)
class Role:
    """One participant, and all that it does. Those of one ``account`` are of one user."""

    name: str
    server: str
    steps: list[Step]
    account: str
    is_control: bool = False


def roles(seed: int, seconds: float, participants: int) -> list[Role]:
    """All participants."""
    times = Times(seconds)
    special = [
        _flapper(times),
        Role("crasher", A, _crashing(times), "crasher"),
        Role("banned", C, _staying(times(0.34), times.end), "banned"),
        *(_control(f"control {server}", server, times, seed) for server in (A, B)),
    ]
    gateway = [
        Role(f"gateway {number}", A, _gateway(times), "gateway") for number in range(GATEWAY_KEYS)
    ]
    count = max(participants - len(special) - len(gateway), 3)
    servers = (A, B, C) * count
    ordinary = [_ordinary(number, servers[number], times, seed) for number in range(count)]
    return [*special, *gateway, *ordinary]


def _staying(start_s: float, end_s: float) -> list[Step]:
    steps: list[Step] = [(start_s, "come")]
    while steps[-1][0] + _RENEWED_AFTER_S < end_s:
        steps.append((steps[-1][0] + _RENEWED_AFTER_S, "renew"))
    return [*steps, (end_s, "go")]


def _gateway(times: Times) -> list[Step]:
    first, gone, again = times.gateway
    return [*_staying(first, gone), *_staying(again, times.end)]


def _flapper(times: Times) -> Role:
    start_s, end_s = times.flapping
    count = int((end_s - start_s) * FLAPS_PER_SECOND) // 2 * 2
    steps = [
        (start_s + number / FLAPS_PER_SECOND, "go" if number % 2 else "come")
        for number in range(count)
    ]
    return Role("flapper", B, [*steps, *_staying(times(0.3), times.end)], "flapper")


def _crashing(times: Times) -> list[Step]:
    start_s, alive_s = times(0.06), DELAY_MS / 2_000
    steps: list[Step] = [(start_s, "leave_if_silent"), (start_s, "come")]
    while steps[-1][0] + alive_s < times.crash:
        steps.append((steps[-1][0] + alive_s, "is_alive"))
    return [*steps, (times.crash, "crash"), *_staying(times.crash + 30, times.end)]


def _chance(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed} {name}")  # noqa: S311  # the same story every time


def _control(name: str, server: str, times: Times, seed: int) -> Role:
    chance = _chance(seed, name)
    for_s, often_s = _CONTROL_AT_BURSTS
    steps: list[Step] = []
    at_s = times(0.03)
    while at_s < times.end:
        steps.append((at_s, "go" if len(steps) % 2 else "come"))
        is_in_burst = any(burst_s < at_s < burst_s + for_s for burst_s in times.gateway)
        at_s += (often_s if is_in_burst else _CONTROL_EVERY_S) * chance.uniform(0.8, 1.2)
    return Role(name, server, steps, name, is_control=True)


def _ordinary(number: int, server: str, times: Times, seed: int) -> Role:
    name = f"member {number}"
    chance = _chance(seed, name)
    start_s = times.newcomer + 2 if server == C else 0.0
    at_s = start_s + chance.uniform(times(0.01), times(0.06))
    last_s = chance.uniform(*times.last_leaves)
    steps: list[Step] = []
    while at_s < times(0.92):
        leaves_s = min(at_s + chance.expovariate(1 / times(0.25)) + 1, last_s)
        steps += _staying(at_s, leaves_s)
        at_s = leaves_s + chance.expovariate(1 / times(0.08)) + 1
    return Role(name, server, steps, name)


def by_account(found: list[Role]) -> dict[str, list[Role]]:
    """Those of one user, in their order."""
    accounts: dict[str, list[Role]] = {}
    for role in found:
        accounts.setdefault(role.account, []).append(role)
    return accounts
