"""What was promised, and has to hold when everybody in the soak has come to rest."""

from collections import Counter

from tests.lab import Client, Homeserver, wait_until
from tests.lab.client import WITHOUT_TIMELINE, sliding_sticky_events, sticky_events
from tests.lab.say import say
from tests.soak.listeners import Listener, Member
from tests.soak.story import Sent, Soak
from tests.soak.strangers import Newcomer

_REST_S = 600

_MOST_TOLD = 5
_PLACES = (
    *("events", "sticky_events", "federation_inbound_events_staging"),
    *("synapse_sticky_deferred", "synapse_sticky_incomplete", "event_forward_extremities"),
)
_AS_IT_IS = """
    SELECT e.outlier, e.rejection_reason, ej.internal_metadata, e.received_ts, e.origin_server_ts
    FROM events AS e INNER JOIN event_json AS ej ON ej.event_id = e.event_id WHERE e.event_id = ?
"""
_NAMES = ("outlier", "rejected", "metadata", "received", "sent")


class BrokenError(AssertionError):
    """An invariant does not hold."""


class Promises:
    """Checks what was promised in one soak."""

    def __init__(self, soak: Soak) -> None:
        self._soak = soak

    def check(self) -> None:
        """Waits for everybody to come to rest, and checks.

        Raises:
            BrokenError: an invariant does not hold.
        """
        soak = self._soak
        say(f"{len(soak.sent)} sticky events, {len(soak.refused)} refused; {soak.told()}")
        for server in soak.servers:
            soak.revive(server)
        soak.moderation.allow_all()
        # What is sent now has servers look whether others' back-off is over.
        for member, room in soak.joined():
            soak.send(member, room)
        self._wait_until_all_rest()
        for listener in soak.listeners:
            listener.end()
            self._check_listener(listener)
        for member in soak.members:
            self._check_client(member)
        for server in soak.servers:
            self._check_server(server)
        # Whoever was killed in the middle of a transaction sends it again.
        at_most = 2 + soak.done["crash"] + soak.done["restart"]
        if too_often := soak.strangers.sent_too_often(at_most):
            raise BrokenError(f"newcomers were sent PDUs more than {at_most} times: {too_often}")
        if soak.failed_deletions:
            raise BrokenError(f"not deleted: {soak.failed_deletions}")
        say("all is as promised")

    def _wait_until_all_rest(self) -> None:
        soak = self._soak
        wait_until(soak.strangers.flush, "the peer's PDUs to be taken", _REST_S)
        for member, room in soak.joined():
            self._wait_until_complete(member, room)
        for newcomer in soak.strangers.newcomers:
            self._wait_until_told(newcomer)
        names = [server.name for server in soak.servers]
        for server in soak.servers:
            wait_until(lambda s=server: at_rest(s, names), f"{server.name} to be at rest", _REST_S)  # type: ignore[misc]

    def _check_listener(self, listener: Listener) -> None:
        member = listener.member
        too_often = [e for e, n in listener.told.items() if n > 1 + (e in listener.first)]
        if too_often:
            raise BrokenError(f"{member.client.user_id} was told too often of {too_often}")
        missing = {e for room in member.rooms for e in self._owed(member, room)}
        missing -= listener.told.keys()
        if missing:
            raise BrokenError(f"{member.client.user_id} never heard of {missing}")

    def _expected(self, room: int) -> list[Sent]:
        return [
            s
            for s in self._soak.sent
            if s.room == room and s.lasts and not s.redacted and room in s.member.rooms
        ]

    def _owed(self, member: Member, room: int) -> set[str]:
        """The event IDs that the member is to be given."""
        of_strangers = {
            event_id
            for event_id, (number, servers) in self._soak.strangers.accepted.items()
            if number == room and member.server in servers
        }
        return of_strangers | {sent.event_id for sent in self._expected(room)}

    def _wait_until_told(self, newcomer: Newcomer) -> None:
        owed = {sent.body for sent in self._expected(newcomer.room)}
        try:
            wait_until(lambda: owed <= newcomer.bodies(), "it", _REST_S)
        except AssertionError:
            lacks = owed - newcomer.bodies()
            raise BrokenError(
                f"the newcomer {newcomer.peer.name} lacks {len(lacks)} of {len(owed)}: {lacks}"
            ) from None
        if wrong := newcomer.forbidden & newcomer.bodies():
            raise BrokenError(f"the newcomer {newcomer.peer.name} was sent the banned {wrong}")

    def _wait_until_complete(self, member: Member, room: int) -> None:
        server = self._soak.servers[member.server]
        sql = "SELECT event_id FROM sticky_events WHERE room_id = ?"

        def missing() -> set[str]:
            there = {event_id for (event_id,) in server.query(sql, self._soak.rooms[room])}
            return self._owed(member, room) - there

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
            where = {event_id: self._places_of(event_id) for event_id in sorted(last)[:_MOST_TOLD]}
            raise BrokenError(
                f"{server.name} lacks {len(last)} events of {self._soak.rooms[room]}: {by}, {where}"
            ) from None

    def _places_of(self, event_id: str) -> dict[str, list[str]]:
        """In which tables each server has the event."""
        return {
            server.name: [
                table
                for table in _PLACES
                if server.query(f"SELECT 1 FROM {table} WHERE event_id = ?", event_id)
            ]
            + [
                f"{name}={value}"
                for row in server.query(_AS_IT_IS, event_id)
                for name, value in zip(_NAMES, row, strict=True)
            ]
            for server in self._soak.servers
        }

    def _check_client(self, member: Member) -> None:
        client = member.client
        for number, room_id in enumerate(self._soak.rooms):
            expected = self._owed(member, number)
            redacted = {s.event_id for s in self._soak.sent if s.room == number and s.redacted}
            for seen in (all_of_sync(client, room_id), all_of_sliding_sync(client, room_id)):
                if len(seen) != len(set(seen)):
                    raise BrokenError(f"{client.user_id} is given an event twice in {room_id}")
                if number not in member.rooms and seen:
                    raise BrokenError(f"{client.user_id} is given {seen} and not joined")
                if number in member.rooms and not expected <= set(seen):
                    raise BrokenError(f"{client.user_id} is not given {expected - set(seen)}")
                # Redactions are ordinary events, which a server that was away may never get.
                known = self._soak.servers[member.server].query("SELECT redacts FROM redactions")
                wrong = redacted & set(seen) & {event_id for (event_id,) in known}
                if wrong:
                    raise BrokenError(f"{client.user_id} is given the redacted {wrong}")
                server = self._soak.servers[member.server]
                for banned in self._soak.moderation.known_to(server, number):
                    if wrong := banned.event_ids & set(seen):
                        raise BrokenError(f"{client.user_id} is given the banned {wrong}")

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
        if stored := self._soak.strangers.stored(server):
            raise BrokenError(f"{server.name} has what cannot be stored: {stored}")
        if self._soak.refused & bodies:
            raise BrokenError(f"{server.name} has what was refused: {self._soak.refused & bodies}")
        if "Traceback" in server.output():
            tracebacks = server.output().count("Traceback")
            say(f"{server.name} logged {tracebacks} tracebacks (killed servers are among them)")


def at_rest(server: Homeserver, destinations: list[str]) -> bool:
    """Is nothing left to be released, processed, or pushed to these destinations?"""
    tables = ["synapse_sticky_deferred", "federation_inbound_events_staging"]
    # What is of a room that the server has left waits for its coming back.
    left = (
        "SELECT 1 FROM destination_rooms_sticky_events_backlog AS b WHERE EXISTS (SELECT 1 FROM"
        " current_state_events AS c WHERE c.room_id = b.room_id AND c.type = 'm.room.create')"
        f" AND b.destination IN ({', '.join('?' * len(destinations))})"
    )
    if server.query(left, *destinations):
        return False
    return not any(server.query(f"SELECT 1 FROM {table} LIMIT 1") for table in tables)


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
