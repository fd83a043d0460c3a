"""What happens in the soak: users of four servers and strangers do whatever the seed says."""

import itertools
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import quote

import attr
import requests

from tests.lab import Client, Homeserver, Lab, wait_until
from tests.lab.client import HOUR_MS, STICKY_PARAMETER, WITHOUT_TIMELINE, ApiError
from tests.lab.faults import set_clock
from tests.lab.pauses import MODULE as PAUSES_MODULE
from tests.lab.say import say
from tests.soak.strangers import Strangers

T = TypeVar("T")

_SERVERS = 4
_ROOMS = 3
_LIMITS = {
    "per_server": {"per_second": 20, "burst_count": 60},
    "per_server_in_room": {"per_second": 15, "burst_count": 50},
    "per_sender": {"per_second": 10, "burst_count": 40},
    "per_room": {"per_second": 40, "burst_count": 100},
}
_LOCAL = {"per_user": {"per_second": 5, "burst_count": 40}}
_CLOCK_STEP_S = 600
_DELETION_S = 300


@attr.s(auto_attribs=True)
class Sent:
    """A sticky event that a client was told was sent."""

    event_id: str
    body: str
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
    """One soak with one seed; ``plain`` is the same story without the module."""

    def __init__(self, lab: Lab, seed: int, *, plain: bool = False) -> None:
        self._random = random.Random(seed)
        modes = [self._random.choice(["defer", "defer", "reject"]) for _ in range(_SERVERS)]
        modules = "plain" if plain else f"modes {', '.join(modes)}"
        say(f"seed {seed}: starting {_SERVERS} servers, {modules}")
        self.servers: list[Homeserver] = lab.servers(
            *(
                {
                    "module": not plain,
                    "config": {"federation": {"mode": mode, **_LIMITS}, "local": _LOCAL},
                    "extra": {"modules": [{"module": PAUSES_MODULE, "config": {}}]},
                }
                for mode in modes
            )
        )
        self.members = [
            Member(number, server.user("stays" if stays else "comes"), stays)
            for number, server in enumerate(self.servers)
            for stays in (True, False)
        ]
        self.sent: list[Sent] = []
        self.refused: set[str] = set()
        self.failed_deletions: list[str] = []
        self._numbers = itertools.count()
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
        self.admins = [server.user("admin", admin=True) for server in self.servers]
        self.strangers = Strangers(
            lab, self.servers, self.rooms, self.residents, self.patiently, self._random
        )
        self.listeners = [Listener(member) for member in self.members if member.stays]

    def close(self) -> None:
        """Ends what does not belong to the lab."""
        for listener in self.listeners:
            listener.end()
        self.strangers.close()

    def residents(self, room: int) -> set[int]:
        """The servers that stay in the room of this number."""
        return {m.server for m in self.members if m.stays and room in m.rooms}

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
            self.strangers.send_unstorable: 4,
            self.strangers.come_unrouted: 2,
            self.strangers.come_and_say_nothing: 2,
            self.strangers.mass_join: 1,
            self.redaction_storm: 2,
            self.delete_room: 1,
            self.clock_step: 2,
        }
        while time.monotonic() < end_s:
            (action,) = self._random.choices(list(actions), list(actions.values()))
            action()
            self.done[action.__name__] += 1
            if time.monotonic() - told_s > 30:
                told_s = time.monotonic()
                say(f"{len(self.sent)} sticky events; " + self.told())

    def told(self) -> str:
        """What was done, and how often."""
        return ", ".join(f"{name} {count}" for name, count in sorted(self.done.items()))

    def joined(self) -> list[tuple[Member, int]]:
        """Who is in which room."""
        return [(member, room) for member in self.members for room in sorted(member.rooms)]

    def send_one(self) -> None:
        self.send(*self._random.choice(self.joined()))

    def flood(self) -> None:
        member, room = self._random.choice(self.joined())
        for _ in range(self._random.randint(20, 80)):
            self.send(member, room)

    def send(self, member: Member, room: int) -> None:
        lasts = self._random.random() < 0.8
        duration_ms = HOUR_MS if lasts else self._random.randint(1_000, 20_000)
        body = f"soak-{self._run}-{next(self._numbers)}"
        path = f"rooms/{quote(self.rooms[room])}/send/org.example.call/{body}"
        answer = self._unless_limited(
            member.server,
            lambda: member.client.request(
                "PUT", path, {"body": body}, **{STICKY_PARAMETER: duration_ms}
            ),
        )
        if answer is None:
            self.refused.add(body)
        else:
            self.sent.append(Sent(answer["event_id"], body, room, member, lasts))

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
            self.patiently(member.server, join)
        except ApiError:
            return  # who was to help with it is down
        member.rooms.add(room)

    def go(self) -> None:
        guests = [(m, room) for m, room in self.joined() if not m.stays]
        if not guests:
            return
        member, room = self._random.choice(guests)
        try:
            self.patiently(member.server, lambda: member.client.leave(self.rooms[room]))
        except ApiError as e:
            if e.status != 403:  # it has left already, and was not told
                raise
        member.rooms.discard(room)

    def redact(self) -> None:
        theirs = self._redactable()
        if theirs:
            self._redact(self._random.choice(theirs))

    def redaction_storm(self) -> None:
        """Many are redacted one after the other."""
        for sent in self._redactable()[-60:]:
            self._redact(sent)

    def _redactable(self) -> list[Sent]:
        return [s for s in self.sent[-200:] if not s.redacted and s.room in s.member.rooms]

    def _redact(self, sent: Sent) -> None:
        room_id, event_id = quote(self.rooms[sent.room]), quote(sent.event_id)
        path = f"rooms/{room_id}/redact/{event_id}/{sent.event_id[1:]}"
        redact = lambda: sent.member.client.request("PUT", path)  # noqa: E731
        sent.redacted = self._unless_limited(sent.member.server, redact) is not None

    def delete_room(self) -> None:
        """An administrator deletes a room of its own while its sticky events are sent."""
        first, second = self._random.sample([m for m in self.members if m.stays], 2)
        room_id = self.patiently(first.server, first.client.create_room)
        via = self.servers[first.server].name
        self.patiently(second.server, lambda: second.client.join(room_id, via))
        for member in (first, second) * 10:
            self._send_in(member, room_id)
        admin = self.admins[first.server]
        path = f"/_synapse/admin/v2/rooms/{quote(room_id)}"
        started = self.patiently(
            first.server, lambda: admin.request("DELETE", path, {"purge": True})
        )
        path = f"/_synapse/admin/v2/rooms/delete_status/{started['delete_id']}"

        def status() -> str:
            found: str = self.patiently(first.server, lambda: admin.request("GET", path))["status"]
            return found if found in {"complete", "failed"} else ""

        if wait_until(status, f"{room_id} to be deleted", _DELETION_S) == "failed":
            self.failed_deletions.append(room_id)

    def _send_in(self, member: Member, room_id: str) -> None:
        self._unless_limited(member.server, lambda: member.client.send_sticky(room_id))

    def clock_step(self) -> None:
        """The clock of a server jumps back, others go on, and somebody sets it right again."""
        server = self._random.choice(self.servers)
        self.revive(server)
        # Forwards and then back, Synapse's own rate limits would refuse its users for as long.
        set_clock(server, -_CLOCK_STEP_S)
        for _ in range(self._random.randint(1, 20)):
            self.send_one()
        self.revive(server)
        set_clock(server, 0)

    def crash(self) -> None:
        server = self._random.choice(self.servers)
        server.kill()
        server.start()

    def restart(self) -> None:
        server = self._random.choice(self.servers)
        self.revive(server)
        server.stop()
        server.start()

    def stand_still(self) -> None:
        """One server does nothing for a while, and the others go on."""
        server = self._random.choice(self.servers)
        self.revive(server)
        others = [(m, r) for m, r in self.joined() if self.servers[m.server] is not server]
        server.pause()
        try:
            for _ in range(self._random.randint(1, 20)):
                self.send(*self._random.choice(others))
        finally:
            server.resume()

    def _unless_limited(self, number: int, do: Callable[[], T]) -> T | None:
        """The same as ``patiently``; None if a rate limit refuses it."""
        try:
            return self.patiently(number, do)
        except ApiError as e:
            if e.status != requests.codes.too_many:
                raise
            return None

    def patiently(self, number: int, do: Callable[[], T]) -> T:
        """As a client does: tries again if its server is down."""
        for _ in range(20):
            try:
                return do()
            except requests.RequestException:
                pass
            except ApiError as e:
                if e.status < 500:
                    raise
            self.revive(self.servers[number])
        return do()

    @staticmethod
    def revive(server: Homeserver) -> None:
        server.wait_until_ready()
