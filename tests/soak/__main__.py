"""``python -m tests.soak [--minutes 10] [--seed 1] [--plain] [--keep FOLDER]``.

Four federating homeservers with the module, in three rooms. Floods, joins, leaves, redactions,
restarts, crashes and stand-stills come in the order that the seed gives; so do strangers' PDUs that
the database refuses, newcomers that answer in the wrong way or not at all, mass joins, deleted
rooms and steps of the clock; users who are banned with all that they sent, ACLs that deny a server
and are put right, apps that are restarted and go on from their ``since``. Then everybody comes to
rest, and what was promised is checked:

- every sticky event that a client was told was sent is delivered to each user who is joined, or it
  has expired, or was redacted; so is what another server was told was taken;
- a newcomer is sent all of it, and nothing again and again;
- nobody is given what their server knows to be redacted, or of a user who was banned like this; a
  newcomer that joins later is not sent it;
- nobody is told twice, but for what is in a room as it is joined, and nothing is twice in a
  server's stream;
- nothing that was refused is persisted;
- nothing is left to be released or to be sent;
- every room that an administrator deletes is deleted.

At the end it prints how long each server's reactor was held. ``--plain`` plays the story of the
same seed without the module, and prints the same; it checks nothing.
"""

import argparse
import secrets
import shutil
from pathlib import Path

from tests.lab import Lab
from tests.lab.pauses import pauses_ms
from tests.lab.say import say
from tests.soak.promises import Promises
from tests.soak.story import Soak


def main() -> None:
    """Runs one soak, or several."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, action="append", help="may be given several times")
    parser.add_argument("--plain", action="store_true", help="without the module")
    parser.add_argument("--keep", type=Path, help="where to put the servers' folders if it fails")
    options = parser.parse_args()
    for seed in options.seed or [secrets.randbits(32)]:
        with Lab() as lab:
            soak = Soak(lab, seed, plain=options.plain)
            try:
                soak.go_on_for(options.minutes)
                if not options.plain:
                    Promises(soak).check()
            except BaseException:
                say(f"failed with seed {seed}")
                for server in lab.servers_started:
                    say(f"{server.name}: ...{server.output()[-2000:]}")
                if options.keep:
                    shutil.copytree(lab.folder, options.keep, dirs_exist_ok=True)
                raise
            finally:
                soak.close()
            for server in soak.servers:
                longest = ", ".join(f"{pause_ms:.0f}" for pause_ms in pauses_ms(server))
                say(f"{server.name}: the reactor was held for at most {longest} ms")


if __name__ == "__main__":
    main()
