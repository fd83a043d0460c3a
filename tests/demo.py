"""The main job, side by side: a server joins a room that has sticky events already.

Starts three real homeservers without the module and plays the story, then three with it.
"""

import sys
import time

import attr

from tests.integration.rooms import room_of
from tests.lab import Homeserver, Lab

EVENTS_EACH = 130
# Without the module nothing is on its way to the newcomer: no use in waiting for long.
PATIENCE_S = {False: 20.0, True: 60.0}

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


def say(text: str, end: str = "\n") -> None:
    """Shows progress at once, also through a pipe."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def play(servers: list[Homeserver], events_each: int, patience_s: float) -> Outcome:
    """Users of two servers send sticky events; then a user of a third joins their room."""
    a, b, c = servers
    alice, bob, carol = a.user("alice"), b.user("bob"), c.user("carol")
    room_id = room_of(alice, bob, via=a)
    say(f"  alice and bob send {events_each} sticky events each", end="")
    old = set()
    for number in range(events_each):
        old |= {alice.send_sticky(room_id), bob.send_sticky(room_id)}
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


def main() -> None:
    """Plays both sides and prints the table."""
    rows: dict[bool, list[Outcome]] = {}
    with Lab() as lab:
        for module in (False, True):
            name = "with" if module else "without"
            say(f"Starting three homeservers {name} the module")
            servers = lab.servers(*({"module": module},) * 3)
            rows[module] = [
                play(servers, events, PATIENCE_S[module]) for events in (1, EVENTS_EACH)
            ]
            lab.close_servers(servers)
    say("\nA third server joins a room in which two others' users sent sticky events before:\n")
    line = "{:<34}{:>16}{:>20}"
    say(line.format("", "plain Synapse", "with synapse-sticky"))
    for plain, sticky in zip(rows[False], rows[True], strict=True):
        events = f"{sticky.sent // 2} event(s) each"
        say(line.format(f"{events}: arrived", str(plain), str(sticky)))
        say(line.format(f"{events}: time to the last", plain.time, sticky.time))
    say(HOW_TO)
    if any(outcome.arrived != outcome.sent for outcome in rows[True]):
        sys.exit("Not everything arrived with the module.")


if __name__ == "__main__":
    main()
