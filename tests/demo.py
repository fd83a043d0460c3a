"""The main job, side by side: a server joins a room that has sticky events already, and a server
floods a room; then a small call.

Starts three real homeservers without the module and plays the stories, then three with it. The call
is played on all of them at the same time.
"""

import sys
import time

import attr

from benchmarks.call import small
from tests.integration.rooms import room_of, wait_until_persisted
from tests.lab import Client, Homeserver, Lab
from tests.lab.client import WITHOUT_TIMELINE, sticky_events
from tests.lab.say import say

EVENTS_EACH = 130
EVENTS_OF_A_USER = 26
FLOOD = 600
# Without the module nothing is on its way to the newcomer: no use in waiting for long.
PATIENCE_S = {False: 20.0, True: 60.0}
CALL_PATIENCE_S = {False: 6.0, True: 60.0}
NAMES = {False: "plain Synapse", True: "with synapse-sticky"}

HOW_TO = """
To have this on your homeserver, install synapse-sticky into Synapse's Python environment and put
into homeserver.yaml:

experimental_features:
  msc4354_enabled: true

modules:
  - module: synapse_sticky.StickyEventsModule
    config: {}
"""


@attr.s(auto_attribs=True, frozen=True)
class Outcome:
    """How many of the old events arrived, and when the last one did (seconds after the join)."""

    sent: int
    arrived: int
    last_s: float | None

    def __str__(self) -> str:
        return f"{self.arrived} of {self.sent}"

    @property
    def time(self) -> str:
        return "-" if self.last_s is None else f"{self.last_s:.1f} s"


def play(servers: list[Homeserver], events_each: int, patience_s: float) -> Outcome:
    """Users of two servers send sticky events; then a user of a third joins their room."""
    a, b, c = servers
    users = -(-events_each // EVENTS_OF_A_USER)
    of_a, of_b = ([server.user() for _ in range(users)] for server in (a, b))
    carol = c.user("carol")
    room_id = room_of(*of_a, *of_b, via=a)
    say(f"  {users} user(s) on each of two servers send {events_each} sticky events", end="")
    old = set()
    for number in range(events_each):
        old |= {users[number % len(users)].send_sticky(room_id) for users in (of_a, of_b)}
        if number % 10 == 9:
            say(".", end="")
    say("\n  carol's server joins the room; she sees", end="")
    carol.join(room_id, a.name)
    joined_s = time.monotonic()
    told = 0

    def progress(count: int) -> None:
        nonlocal told
        if count >= told + 20:
            told = count
            say(f" {count}", end="")

    seen = carol.collect_sticky(room_id, old, patience_s, progress)
    say(f" {len(seen)} of {len(old)}")
    arrived = [arrived_s - joined_s for event_id, arrived_s in seen.items() if event_id in old]
    return Outcome(len(old), len(arrived), max(arrived, default=None))


@attr.s(auto_attribs=True, frozen=True)
class FloodOutcome:
    """In which sync the victim's event came, and how many of the flood's came up to then."""

    syncs: int
    before: int


def play_flood(flooder: Homeserver, servers: list[Homeserver]) -> FloodOutcome:
    """A user of one server floods a room; then one of another sends a single sticky event."""
    _, b, c = servers
    mallory, bob, carol = flooder.user("mallory"), b.user("bob"), c.user("carol")
    room_id = room_of(bob, mallory, carol, via=b)
    since = carol.sync()["next_batch"]
    say(f"  mallory floods with {FLOOD} sticky events", end="")
    flood = []
    for number in range(FLOOD):
        flood.append(mallory.send_sticky(room_id))
        if number % 50 == 49:
            say(".", end="")
            # Slowly enough for a plain Synapse to lose none of them.
            wait_until_persisted(c, flood[-1])
    event_id = bob.send_sticky(room_id)
    wait_until_persisted(c, event_id)
    outcome = look_for(carol, room_id, event_id, since)
    say(f"\n  bob sends one; carol has it in sync {outcome.syncs}")
    return outcome


def look_for(client: Client, room_id: str, event_id: str, since: str) -> FloodOutcome:
    """Syncs until the event is there."""
    seen: list[str] = []
    for number in range(1, 100):
        answer = client.sync(since, filter_=WITHOUT_TIMELINE)
        since = answer["next_batch"]
        seen += sticky_events(answer, room_id)
        if event_id in seen:
            return FloodOutcome(number, seen.index(event_id))
    raise AssertionError("carol never gets bob's event")


def play_call(servers: dict[bool, list[Homeserver]]) -> list[small.Row]:
    """The same small call without and with the module, side by side; prints its table."""
    say("Playing a small call on all of them")
    rows = small.play(
        {NAMES[m]: small.SmallCall(of, CALL_PATIENCE_S[m]) for m, of in servers.items()}
    )
    say("\nA small call. Whom a client at each of three servers lacks after each step, and whom it")
    say("shows though gone (ghosts):\n")
    small.say_rows(rows)
    return rows


def say_tables(rows: dict[bool, list[Outcome]], floods: dict[bool, FloodOutcome]) -> None:
    """What arrived at the server that joined, and what the flood got in the way of."""
    say("\nA third server joins a room in which two others' users sent sticky events before:\n")
    line = "{:<34}{:>16}{:>20}"
    say(line.format("", *NAMES.values()))
    for plain, sticky in zip(rows[False], rows[True], strict=True):
        events = f"{sticky.sent // 2} event(s) each"
        say(line.format(f"{events}: arrived", str(plain), str(sticky)))
        say(line.format(f"{events}: time to the last", plain.time, sticky.time))
    plain_flood, sticky_flood = floods[False], floods[True]
    say(f"\nA server floods a room with {FLOOD} sticky events, then another server sends one:\n")
    say(line.format("", *NAMES.values()))
    say(line.format("it is in the client's sync no.", plain_flood.syncs, sticky_flood.syncs))
    say(line.format("sticky events in front of it", plain_flood.before, sticky_flood.before))


def main() -> None:
    """Plays both sides and prints the tables."""
    rows: dict[bool, list[Outcome]] = {}
    floods: dict[bool, FloodOutcome] = {}
    servers: dict[bool, list[Homeserver]] = {}
    with Lab() as lab:
        for module in (False, True):
            name = "with" if module else "without"
            say(f"Starting three homeservers {name} the module")
            servers[module] = lab.servers(*({"module": module},) * 3)
            rows[module] = [
                play(servers[module], events, PATIENCE_S[module]) for events in (1, EVENTS_EACH)
            ]
            # With the module its own users' limit would stop a flood: the flooder has none.
            (flooder,) = lab.servers({"module": False}) if module else servers[module][:1]
            floods[module] = play_flood(flooder, servers[module])
        # Only the latter is a server of its own.
        lab.close_servers([flooder])
        say_tables(rows, floods)
        call = play_call(servers)
    say(HOW_TO)
    if any(outcome.arrived != outcome.sent for outcome in rows[True]):
        sys.exit("Not everything arrived with the module.")
    if floods[True].syncs > 2:
        sys.exit("The flood got in the way of others with the module.")
    if any(shown != small.RIGHT for row in call for shown in row.shown[NAMES[True]].values()):
        sys.exit("Somebody was lacked, or shown wrongly, in the call with the module.")


if __name__ == "__main__":
    main()
