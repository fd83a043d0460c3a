"""What happens on two homeservers and some peers, until each counter has moved."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attr

from tests.integration.rooms import limits, wait_until_seen
from tests.integration.test_sending import is_refused
from tests.integration.test_staging import parked, withhold
from tests.lab import Homeserver, Lab, Peer, wait_until
from tests.lab.faults import FAULTY_MODULE, arm_panics, panics_are_armed
from tests.lab.peer import Answer
from tests.lab.scene import Scene, enter

_LIMIT = {"per_second": 2, "burst_count": 5}
_HELD = {"per_second": 0.001, "burst_count": 1}
_SHORT_MS = 4_000
_SHORTLY_MS = 15_000
"""Enough for a newcomer to be sent to, or for a few events of a sender to be released."""
_FORKS = 15

DEFERS = {**limits("defer", per_sender=_LIMIT), "local": {"per_user": _HELD | {"burst_count": 40}}}
OBSERVES = {**limits("observe", per_sender=_HELD), "local": {"mode": "observe", "per_user": _HELD}}


def servers(lab: Lab) -> tuple[Homeserver, Homeserver]:
    """One that defers, and one that observes."""
    one, other = lab.servers(
        {"config": DEFERS, "metrics": True, "module_name": FAULTY_MODULE},
        {"config": OBSERVES, "metrics": True},
    )
    return one, other


def lines(server: Homeserver) -> list[str]:
    """What the module has logged there, without tracebacks, and as if no level was DEBUG."""
    found = [line for line in server.output().splitlines() if " synapse_sticky" in line[:80]]
    return [line for line in found if " DEBUG " not in line[:80]]


@attr.s(auto_attribs=True)
class Story:
    """``defers`` is where most of it happens."""

    lab: Lab
    defers: Homeserver
    observes: Homeserver
    peer: Peer

    def count(self, name: str, labels: str = "") -> float:
        """What both have counted of a metric."""
        total = 0.0
        for server in (self.defers, self.observes):
            for found, value in server.counters().items():
                base, _, rest = found.partition("{")
                if base == f"synapse_sticky_{name}" and labels in rest:
                    total += value
        return total

    def wait(self, name: str, labels: str = "") -> None:
        """Waits until it has counted something."""
        wait_until(lambda: self.count(name, labels) > 0, f"{name} {labels} to move", 90)

    @contextmanager
    def newcomer(self, scene: Scene[Homeserver], **does: Callable[..., Any]) -> Iterator[Peer]:
        """A peer that joins the room and does not as it should."""
        joining = self.lab.peer()
        for name, function in does.items():
            setattr(joining, name, function)
        try:
            joining.join(self.defers, scene.room_id, joining.user("new"))
            wait_until_seen(self.defers, joining, scene.room_id)
            yield joining
        finally:
            joining.close()

    def tell(self) -> None:
        """All of it."""
        scene = enter(self.defers, self.peer, "joined")
        self._newcomers(scene)
        self._flood(scene)
        self._parked()
        self._extremities()
        self._users(scene)
        self._panic(scene)

    def _newcomers(self, scene: Scene[Homeserver]) -> None:
        alice, room_id = scene.alice, scene.room_id
        for _ in range(8):
            alice.send_sticky(room_id)
        bob = self.observes.user("bob")
        bob.join(room_id, self.defers.name)
        for step in ("sent", "acknowledged", "confirmed", "believed"):
            self.wait("pushed_events_total", f'step="{step}"')
        self.wait("observed_total", 'outcome="deferred"')
        # The servers of two users have the same events: what is past a limit is refused, observed.
        for _ in range(3):
            bob.send_sticky(room_id)
        self.wait("observed_total", 'outcome="refused"')
        # One that acknowledges nothing.
        other = enter(self.defers, self.peer)
        other.alice.send_sticky(other.room_id, _SHORTLY_MS)
        with self.newcomer(other, override=_acknowledges_nothing):
            self.wait("pushed_events_total", 'step="resent"')
            self.wait("pushed_events_total", 'step="given_up"')
        # One that is asked too much.
        with self.newcomer(scene, override=_answers_no_question):
            self.wait("newcomer_questions_total", 'answer="limited"')
        # One that takes something, and then nothing more.
        with self.newcomer(scene) as refusing:
            wait_until(lambda: refusing.received, "it to have something")
            refusing.refuses = lambda event_id: True
            alice.send_sticky(room_id)
            self.wait("pushed_events_total", 'step="refused"')

    def _flood(self, scene: Scene[Homeserver]) -> None:
        # More than the limit lets through until they expire.
        for _ in range(50):
            scene.sticky(duration_ms=_SHORTLY_MS)
        scene.flood(300)
        for name in ("deferred", "released", "deferred_expired", "staged_kept"):
            self.wait(f"{name}_total")

    def _parked(self) -> None:
        scene = enter(self.defers, self.peer)
        self.peer.override = _withholds
        withhold(scene)
        sent = [scene.sticky(), scene.sticky(duration_ms=_SHORT_MS)]
        wait_until(lambda: {*sent} & parked(self.defers), "some to be parked")
        self.wait("parked_expired_total")
        self.peer.override = _does_all
        self.wait("parked_persisted_total")
        # One that cannot be written into the table.
        self.defers.change(
            "CREATE TRIGGER full BEFORE INSERT ON synapse_sticky_incomplete"
            " BEGIN SELECT RAISE(ABORT, 'for the test'); END"
        )
        self.peer.override = _withholds
        withhold(scene)
        scene.sticky()
        self.wait("parked_dropped_total")
        self.defers.change("DROP TRIGGER full")
        self.peer.override = _does_all

    def _extremities(self) -> None:
        enter(self.defers, self.peer).flood(_FORKS, chained=False)
        # Here nobody has the power, which a creator has for ever in later versions of rooms.
        alice, eve = self.defers.user("alice"), self.peer.user("eve")
        room_id = alice.create_room(room_version="11")
        room = self.peer.join(self.defers, room_id, eve)
        levels = {"users": {alice.user_id: 0}, "events": {"org.matrix.dummy_event": 50}}
        alice.send_state(room_id, "m.room.power_levels", levels)
        Scene(self.defers, self.peer, alice, eve, room).flood(_FORKS, chained=False)
        self.wait("dummy_events_total")
        self.wait("rooms_left_out_total")

    def _users(self, scene: Scene[Homeserver]) -> None:
        carol = self.defers.user("carol")
        carol.join(scene.room_id)
        carol.sync()
        carol.sliding_sync()
        carol.request("GET", f"rooms/{scene.room_id}/messages", dir="b", limit=100)
        wait_until(lambda: is_refused(scene.alice, scene.room_id), "a local user to be refused")

    def _panic(self, scene: Scene[Homeserver]) -> None:
        arm_panics(self.defers, "StickyIndex", 1)
        wait_until(lambda: panics_are_armed(self.defers), "the panic to be armed")
        scene.alice.sync()
        self.wait("panics_total")


def _acknowledges_nothing(method: str, path: str) -> Answer | None:
    return (200, {"pdus": {}}) if path.startswith("/_matrix/federation/v1/send/") else None


def _answers_no_question(method: str, path: str) -> Answer | None:
    return (429, {}) if "/backfill/" in path else None


def _withholds(method: str, path: str) -> Answer | None:
    return (502, {}) if "/get_missing_events/" in path else None


def _does_all(method: str, path: str) -> Answer | None:
    return None
