"""``python -m tests.soak [--minutes 10] [--seed 1] [--keep FOLDER]``.

Four federating homeservers with the module, in three rooms. Floods, joins, leaves, redactions,
restarts, crashes and stand-stills come in the order that the seed gives. Then everybody comes to
rest, and what was promised is checked:

- every sticky event that a client was told was sent is delivered to each user who is joined, or it
  has expired, or was redacted;
- nobody is given what their server knows to be redacted;
- nobody is told twice, and nothing is twice in a server's stream;
- nothing that was refused is persisted;
- nothing is left to be released or to be sent.
"""

import argparse
import itertools
import random
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import attr
import requests

from tests.lab import Client, Homeserver, Lab, wait_until
from tests.lab.client import (
    HOUR_MS,
    STICKY_PARAMETER,
    WITHOUT_TIMELINE,
    ApiError,
    sliding_sticky_events,
    sticky_events,
)
from tests.lab.say import say

T = TypeVar("T")

_SERVERS = 4
_ROOMS = 3
_REST_S = 600
_LIMITS = {
    "per_server": {"per_second": 20, "burst_count": 60},
    "per_server_in_room": {"per_second": 15, "burst_count": 50},
    "per_sender": {"per_second": 10, "burst_count": 40},
    "per_room": {"per_second": 40, "burst_count": 100},
}
_LOCAL = {"per_user": {"per_second": 5, "burst_count": 40}}


class BrokenError(AssertionError):
    """An invariant does not hold."""


@attr.s(auto_attribs=True)
class Sent:
    """A sticky event that a client was told was sent."""

    event_id: str
    room: int
    member: "Member"
    lasts: bool
    """Long enough for the whole soak."""
    redacted: bool = False


@attr.s(auto_attribs=True)
class Member:
    """A user, and the rooms it is joined to. Only those who stay hear of everything once."""

    server: int
    client: Client
    stays: bool
    rooms: set[int] = attr.Factory(set)


class Listener:
    """A client that syncs all the time, and notes what its sections of sticky events have."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.told: Counter[str] = Counter()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        # Its own connection: sessions are not for several threads.
        client = self.member.client.again()
        since = None
        while not self._ends.is_set():
            try:
                answer = client.sync(since, 1_000 if since else 0, WITHOUT_TIMELINE)
            except (requests.RequestException, ApiError):
                continue  # its server is down: the same again
            since = answer["next_batch"]
            for room in answer.get("rooms", {}).get("join", {}).values():
                events = room.get("msc4354_sticky", {}).get("events", [])
                self.told.update(event["event_id"] for event in events)

    def end(self) -> None:
        self._ends.set()
        self._thread.join(60)


class Soak:
    """One soak with one seed."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self._random = random.Random(seed)
        modes = [self._random.choice(["defer", "defer", "reject"]) for _ in range(_SERVERS)]
        say(f"seed {seed}: starting {_SERVERS} servers, modes {', '.join(modes)}")
        self.servers: list[Homeserver] = lab.servers(
            *({"config": {"federation": {"mode": m, **_LIMITS}, "local": _LOCAL}} for m in modes)
        )
        self.members = [
            Member(number, server.user("stays" if stays else "comes"), stays)
            for number, server in enumerate(self.servers)
            for stays in (True, False)
        ]
        self.sent: list[Sent] = []
        self.refused: set[str] = set()
        self._numbers = itertools.count()
        self._transactions = itertools.count()
        self._run = secrets.token_hex(4)
        self.rooms: list[str] = []
        self.done: Counter[str] = Counter()
        for number in range(_ROOMS):
            # Two servers stay, the others come and go.
            first, second = self._random.sample([m for m in self.members if m.stays], 2)
            room_id = first.client.create_room(self._random.choice(["shared", "joined"]))
            self.rooms.append(room_id)
            second.client.join(room_id, self.servers[first.server].name)
            for member in (first, second):
                member.rooms.add(number)
        self.listeners = [Listener(member) for member in self.members if member.stays]

    # What happens

    def go_on_for(self, minutes: float) -> None:
        """Does whatever the seed says."""
        end_s = time.monotonic() + minutes * 60
        told_s = time.monotonic()
        actions: dict[Callable[[], None], int] = {
            self.send_one: 30,
            self.flood: 6,
            self.come: 8,
            self.go: 4,
            self.redact: 8,
            self.crash: 2,
            self.restart: 1,
            self.stand_still: 2,
        }
        while time.monotonic() < end_s:
            (action,) = self._random.choices(list(actions), list(actions.values()))
            action()
            self.done[action.__name__] += 1
            if time.monotonic() - told_s > 30:
                told_s = time.monotonic()
                say(f"{len(self.sent)} sticky events; " + self._done())

    def _done(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(self.done.items()))

    def _joined(self) -> list[tuple[Member, int]]:
        return [(member, room) for member in self.members for room in sorted(member.rooms)]

    def send_one(self) -> None:
        self._send(*self._random.choice(self._joined()))

    def flood(self) -> None:
        member, room = self._random.choice(self._joined())
        for _ in range(self._random.randint(20, 80)):
            self._send(member, room)

    def _send(self, member: Member, room: int) -> None:
        lasts = self._random.random() < 0.8
        duration_ms = HOUR_MS if lasts else self._random.randint(1_000, 20_000)
        body = f"soak-{self._run}-{next(self._numbers)}"
        path = f"rooms/{quote(self.rooms[room])}/send/org.example.call/{body}"
        try:
            answer = self._patiently(
                member.server,
                lambda: member.client.request(
                    "PUT", path, {"body": body}, **{STICKY_PARAMETER: duration_ms}
                ),
            )
        except ApiError as e:
            if e.status != 429:
                raise
            self.refused.add(body)
        else:
            self.sent.append(Sent(answer["event_id"], room, member, lasts))

    def come(self) -> None:
        away = [
            (member, room)
            for member in self.members
            for room in range(_ROOMS)
            if room not in member.rooms and not member.stays
        ]
        if not away:
            return
        member, room = self._random.choice(away)
        via = self.servers[next(m.server for m in self.members if m.stays and room in m.rooms)]
        join = lambda: member.client.join(self.rooms[room], via.name)  # noqa: E731
        try:
            self._patiently(member.server, join)
        except ApiError:
            return  # who was to help with it is down
        member.rooms.add(room)

    def go(self) -> None:
        guests = [(m, room) for m, room in self._joined() if not m.stays]
        if not guests:
            return
        member, room = self._random.choice(guests)
        try:
            self._patiently(member.server, lambda: member.client.leave(self.rooms[room]))
        except ApiError as e:
            if e.status != 403:  # it has left already, and was not told
                raise
        member.rooms.discard(room)

    def redact(self) -> None:
        theirs = [s for s in self.sent[-200:] if not s.redacted and s.room in s.member.rooms]
        if not theirs:
            return
        sent = self._random.choice(theirs)
        room_id, event_id = quote(self.rooms[sent.room]), quote(sent.event_id)
        path = f"rooms/{room_id}/redact/{event_id}/{sent.event_id[1:]}"
        self._patiently(sent.member.server, lambda: sent.member.client.request("PUT", path))
        sent.redacted = True

    def crash(self) -> None:
        server = self._random.choice(self.servers)
        server.kill()
        server.start()

    def restart(self) -> None:
        server = self._random.choice(self.servers)
        self._revive(server)
        server.stop()
        server.start()

    def stand_still(self) -> None:
        """One server does nothing for a while, and the others go on."""
        server = self._random.choice(self.servers)
        self._revive(server)
        others = [(m, r) for m, r in self._joined() if self.servers[m.server] is not server]
        server.pause()
        try:
            for _ in range(self._random.randint(1, 20)):
                self._send(*self._random.choice(others))
        finally:
            server.resume()

    def _patiently(self, number: int, do: Callable[[], T]) -> T:
        """As a client does: tries again if its server is down."""
        for _ in range(20):
            try:
                return do()
            except requests.RequestException:
                pass
            except ApiError as e:
                if e.status < 500:
                    raise
            self._revive(self.servers[number])
        return do()

    @staticmethod
    def _revive(server: Homeserver) -> None:
        server.wait_until_ready()

    # What was promised

    def check(self) -> None:
        """Waits for everybody to come to rest, and checks.

        Raises:
            BrokenError: an invariant does not hold.
        """
        say(f"{len(self.sent)} sticky events, {len(self.refused)} refused; " + self._done())
        for server in self.servers:
            self._revive(server)
        # What is sent now has servers look whether others' back-off is over.
        for member, room in self._joined():
            self._send(member, room)
        for member in self.members:
            for room in member.rooms:
                self._wait_until_complete(member, room)
        for server in self.servers:
            wait_until(lambda s=server: at_rest(s), f"{server.name} to be at rest", _REST_S)  # type: ignore[misc]
        for listener in self.listeners:
            listener.end()
        for member in self.members:
            self._check_client(member)
        for listener in self.listeners:
            twice = [e for e, count in listener.told.items() if count > 1]
            if twice:
                raise BrokenError(f"{listener.member.client.user_id} was told twice of {twice}")
            missing = {
                sent.event_id for room in listener.member.rooms for sent in self._expected(room)
            } - listener.told.keys()
            if missing:
                raise BrokenError(f"{listener.member.client.user_id} never heard of {missing}")
        for server in self.servers:
            self._check_server(server)
        say("all is as promised")

    def _expected(self, room: int) -> list[Sent]:
        return [
            s
            for s in self.sent
            if s.room == room and s.lasts and not s.redacted and room in s.member.rooms
        ]

    def _wait_until_complete(self, member: Member, room: int) -> None:
        server = self.servers[member.server]
        sql = "SELECT event_id FROM sticky_events WHERE room_id = ?"

        def missing() -> set[str]:
            there = {event_id for (event_id,) in server.query(sql, self.rooms[room])}
            return {sent.event_id for sent in self._expected(room)} - there

        last: set[str] = set()

        def complete() -> bool:
            nonlocal last
            last = missing()
            return not last

        try:
            wait_until(complete, "it", _REST_S)
        except AssertionError:
            by = Counter(
                s.member.client.user_id for s in self._expected(room) if s.event_id in last
            )
            raise BrokenError(
                f"{server.name} lacks {len(last)} events of {self.rooms[room]}: {by}, {last}"
            ) from None

    def _check_client(self, member: Member) -> None:
        client = member.client
        for number, room_id in enumerate(self.rooms):
            expected = {s.event_id for s in self._expected(number)}
            redacted = {s.event_id for s in self.sent if s.room == number and s.redacted}
            for seen in (all_of_sync(client, room_id), all_of_sliding_sync(client, room_id)):
                if len(seen) != len(set(seen)):
                    raise BrokenError(f"{client.user_id} is given an event twice in {room_id}")
                if number not in member.rooms and seen:
                    raise BrokenError(f"{client.user_id} is given {seen} and not joined")
                if number in member.rooms and not expected <= set(seen):
                    raise BrokenError(f"{client.user_id} is not given {expected - set(seen)}")
                # Redactions are ordinary events, which a server that was away may never get.
                known = self.servers[member.server].query("SELECT redacts FROM redactions")
                wrong = redacted & set(seen) & {event_id for (event_id,) in known}
                if wrong:
                    raise BrokenError(f"{client.user_id} is given the redacted {wrong}")

    def _check_server(self, server: Homeserver) -> None:
        twice = server.query(
            "SELECT event_id FROM sticky_events GROUP BY event_id HAVING count(*) > 1"
        )
        if twice:
            raise BrokenError(f"{server.name} has twice in its stream: {twice}")
        bodies = {
            body
            for (body,) in server.query(
                "SELECT json_extract(json, '$.content.body') FROM event_json"
                " WHERE json LIKE '%\"soak-%'"
            )
        }
        if self.refused & bodies:
            raise BrokenError(f"{server.name} has what was refused: {self.refused & bodies}")
        if "Traceback" in server.output():
            tracebacks = server.output().count("Traceback")
            say(f"{server.name} logged {tracebacks} tracebacks (killed servers are among them)")


def at_rest(server: Homeserver) -> bool:
    """Is nothing left to be released, processed or pushed?"""
    tables = ["synapse_sticky_deferred", "federation_inbound_events_staging"]
    # What is of a room that the server has left waits for its coming back.
    left = (
        "SELECT 1 FROM destination_rooms_sticky_events_backlog AS b WHERE EXISTS (SELECT 1 FROM"
        " current_state_events AS c WHERE c.room_id = b.room_id AND c.type = 'm.room.create')"
    )
    return not any(
        server.query(sql) for sql in (left, *(f"SELECT 1 FROM {t} LIMIT 1" for t in tables))
    )


def all_of_sync(client: Client, room_id: str) -> list[str]:
    """All that /sync gives of the room, page by page."""
    seen: list[str] = []
    since = None
    while True:
        answer = client.sync(since, filter_=WITHOUT_TIMELINE)
        since = answer["next_batch"]
        page = sticky_events(answer, room_id)
        if not page and not answer.get("rooms", {}).get("join"):
            return seen
        seen += page


def all_of_sliding_sync(client: Client, room_id: str) -> list[str]:
    """The same of sliding sync."""
    seen: list[str] = []
    answer = None
    while True:
        answer = client.sliding_sync(answer, conn_id="check")
        if not answer["extensions"]["org.matrix.msc4354.sticky_events"]["rooms"]:
            return seen
        seen += sliding_sticky_events(answer, room_id)


def main() -> None:
    """Runs one soak, or several."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, action="append", help="may be given several times")
    parser.add_argument("--keep", type=Path, help="where to put the servers' folders if it fails")
    options = parser.parse_args()
    for seed in options.seed or [secrets.randbits(32)]:
        with Lab() as lab:
            soak = Soak(lab, seed)
            try:
                soak.go_on_for(options.minutes)
                soak.check()
            except BaseException:
                say(f"failed with seed {seed}")
                for server in lab.servers_started:
                    say(f"{server.name}: ...{server.output()[-2000:]}")
                if options.keep:
                    shutil.copytree(lab.folder, options.keep, dirs_exist_ok=True)
                raise


if __name__ == "__main__":
    main()
