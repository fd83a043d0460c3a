"""What it costs to refuse a transaction, beside what plain Synapse spends on accepting one.

``python -m benchmarks.receipt --transactions 4``
"""

import argparse
import os
import sys
import time
import timeit
from pathlib import Path
from typing import Any

from synapse_sticky.handlers.receipt.synapse import sticky_pdus
from tests.integration.rooms import (
    introduce,
    limits,
    pdus_of,
    room_of,
    wait_until_sticky,
    wait_until_taken_in,
)
from tests.lab import Homeserver, Lab, wait_until
from tests.lab.say import say

PDUS = 50
REFUSALS = 400
MOST_RATIO = 0.01
MOST_PLAIN_US = 20.0


def cpu_s(server: Homeserver) -> float:
    """The CPU time that the server's process has used."""
    assert server.process is not None
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle_cpu_s(server: Homeserver, seconds: float) -> float:
    """What the server's process uses in so much time by itself."""
    before_s, until_s = cpu_s(server), time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > until_s, "the time to pass", seconds + 60)
    return cpu_s(server) - before_s


def main() -> None:
    """Sends the same PDUs to a server that accepts and to one that refuses them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transactions", type=int, default=4, help="that are accepted")
    args = parser.parse_args()
    closed = limits("reject", per_server={"per_second": 0.001, "burst_count": 1})
    forwarded = {"forwarded": True}
    with Lab() as lab:
        a, plain, refusing = lab.servers(
            {"module": False},
            {"module": False, **forwarded},
            {"config": closed, **forwarded},
        )
        alice, bob, carol = a.user(), plain.user(), refusing.user()
        room_id = room_of(alice, bob, carol, via=a)
        introduce(a, plain, refusing)
        for server in (plain, refusing):
            assert server.forwarder is not None
            server.forwarder.offline()
        say(f"Making {args.transactions} transactions of {PDUS} sticky events")
        events = [alice.send_sticky(room_id) for _ in range(args.transactions * PDUS)]
        pdus = pdus_of(a, events)

        def part(number: int) -> list[dict[str, Any]]:
            return pdus[number * PDUS : (number + 1) * PDUS]

        requester = plain.as_seen_by(a)
        before_s = cpu_s(plain)
        for number in range(args.transactions):
            assert requester.send(str(number), part(number)).status_code == 200
            # One by one: it would lose some of a hundred.
            for event_id in events[number * PDUS : (number + 1) * PDUS]:
                wait_until_sticky(plain, event_id)
        accepting_s = (cpu_s(plain) - before_s) / args.transactions

        requester = refusing.as_seen_by(a)
        assert requester.send("use-up", part(0)).status_code == 200
        wait_until_taken_in(refusing, room_id, set(events[:PDUS]))
        idle_s = idle_cpu_s(refusing, 5) / 5
        before_s, start_s = cpu_s(refusing), time.monotonic()
        for number in range(REFUSALS):
            answer = requester.send(f"past-{number}", part(1 + number % (args.transactions - 1)))
            assert answer.status_code == 429, answer.text
        used_s = cpu_s(refusing) - before_s
        refusing_s = (used_s - idle_s * (time.monotonic() - start_s)) / REFUSALS

    transaction = {"pdus": [{k: v for k, v in p.items() if k != "msc4354_sticky"} for p in part(0)]}
    rounds = 20_000
    plain_us = min(timeit.repeat(lambda: sticky_pdus(transaction), number=rounds)) / rounds * 1e6
    ratio = refusing_s / accepting_s
    say(f"plain Synapse, accepting a transaction of {PDUS}: {accepting_s * 1000:8.2f} ms of CPU")
    say(f"the module, refusing one:                     {refusing_s * 1000:8.2f} ms of CPU")
    say(f"ratio:                                        1 / {1 / ratio:.0f}")
    say(f"a transaction of {PDUS} plain PDUs costs more:  {plain_us:8.2f} us")
    if ratio > MOST_RATIO or plain_us > MOST_PLAIN_US:
        sys.exit("That is more than it should be.")


if __name__ == "__main__":
    main()
