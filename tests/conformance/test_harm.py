"""What it must not cost others (H1 to H7). The module's own times are in ``make bench``."""

import threading
import time
from collections import Counter
from contextlib import nullcontext

import pytest

from tests.conformance.conftest import TargetWith
from tests.conformance.target import EXTENDED, Options, Target
from tests.conformance.test_push import Outage, is_sticky, wait_for
from tests.lab import Peer, wait_until
from tests.lab.client import ApiError, sliding_sticky_events
from tests.lab.peer import Answer
from tests.lab.scene import Scene, enter
from tests.lab.unfit import unfit_for
from tests.lab.variants import InSynapseWithItsOwn

_NONE = dict.fromkeys(("per_server", "per_server_in_room", "per_sender", "per_room"))
_BURST = 5
_NEVER_MORE = {"per_second": 0.001, "burst_count": _BURST}


def withhold(scene: Scene[Target]) -> list[str]:
    """The peer sends a sticky event on top of another one that nobody has. Gives both IDs."""
    before = scene.room.extremities, scene.room.depth
    withheld_id, _ = scene.peer.sticky(scene.room, scene.eve)
    scene.peer.advance(scene.room, withheld_id)
    event_id = scene.sticky()
    scene.room.extremities, scene.room.depth = before
    return [withheld_id, event_id]


class Asked:
    """Notes when the peer is asked a question whose path has this, and answers it with an error
    while there is one."""

    def __init__(self, peer: Peer, *parts: str, error: int | None = None) -> None:
        self._parts = parts
        self.error = error
        self.at_s: list[float] = []
        peer.override = self._answer

    def _answer(self, method: str, path: str) -> Answer | None:
        if not any(part in path for part in self._parts):
            return None
        self.at_s.append(time.monotonic())
        return None if self.error is None else (self.error, {"errcode": "M_UNKNOWN"})


def duties(target: Target, state: str) -> set[str]:
    """Those that the metric says to be in this state, in whatever process."""
    end = f'",state="{state}"}}'
    found = {
        name.removeprefix('synapse_sticky_duty{duty="').removesuffix(end)
        for name, value in target.metrics().items()
        if name.startswith("synapse_sticky_duty{") and name.endswith(end) and value
    }
    return found - {"access"}  # a guard, which nothing switches off


@pytest.mark.requirement("H1", "L3")
def test_an_event_that_cannot_be_taken_in_holds_nobody_up(
    scene: Scene[Target], other_peer: Peer
) -> None:
    dora = other_peer.user("dora")
    room = other_peer.join(scene.server, scene.room_id, dora)
    wait_until(lambda: dora in scene.alice.members(scene.room_id), "dora to be joined")
    asked = Asked(scene.peer, "/get_missing_events/", error=502)
    waiting = withhold(scene)
    wait_until(lambda: asked.at_s, "what is before it to be asked for")
    of_dora, pdu = other_peer.sticky(room, dora)
    assert other_peer.to(scene.server).send("dora", [pdu]).json()["pdus"] == {of_dora: {}}
    others = [of_dora, scene.sticky(), scene.alice.send_sticky(scene.room_id)]
    scene.wait_for_sections(*others)
    asked.error = None
    scene.wait_for_sections(*others, *waiting)


@pytest.mark.requirement("H1", "P3")
def test_a_server_that_takes_nothing_holds_nobody_up(
    target: Target, peer: Peer, other_peer: Peer
) -> None:
    """One answers no transaction, and another one refuses some events."""
    alice = target.user()
    room_id = alice.create_room()
    old = [alice.send_sticky(room_id) for _ in range(10)]
    outage = Outage(peer)
    other_peer.refuses = {*old[:5]}.__contains__
    for one in (peer, other_peer):
        one.join(target, room_id, one.user("eve"))
    new = alice.send_sticky(room_id)
    wait_for(other_peer, *old[5:], new)
    outage.over()
    wait_for(peer, *old, new)


@pytest.mark.requirement("H2")
def test_what_wakes_it_does_not_have_it_tried_more_often(target: Target, peer: Peer) -> None:
    """The peer never acknowledges one event, and takes others meanwhile."""
    alice = target.user()
    room_id = alice.create_room()
    peer.join(target, room_id, peer.user("eve"))
    peer.ignores = is_sticky
    alice.send_sticky(room_id)

    def tries() -> int:
        return sum(map(is_sticky, list(peer.received)))

    wait_until(tries, "it to be sent")
    for _ in range(40):
        wait_for(peer, alice.send(room_id))
    assert tries() <= 10


@pytest.mark.requirement("H2")
def test_what_is_missing_is_not_asked_for_more_often(scene: Scene[Target]) -> None:
    """Whoever has it answers with an error, and goes on sending other events."""
    asked = Asked(scene.peer, "/get_missing_events/", "/state_ids/", error=502)
    withhold(scene)
    wait_until(lambda: asked.at_s, "what is before it to be asked for")
    for _ in range(40):
        scene.wait_until_there(*scene.flood(1))
    assert len(asked.at_s) <= 20


@pytest.mark.requirement("H3")
def test_what_is_staged_of_a_server_in_a_room_is_bounded(
    target_with: TargetWith, peer: Peer
) -> None:
    """Other rooms are not concerned, and what is refused is taken later."""
    most = {"max_staged_per_server_in_room": 50}
    target = target_with(Options(module={"federation": {**_NONE, **most}}))
    scene, elsewhere = enter(target, peer), enter(target, peer)
    go_on = threading.Event()

    def hold_up(method: str, path: str) -> None:
        if "/get_missing_events/" in path:
            go_on.wait(50)

    peer.override = hold_up
    taken = [*withhold(scene), *scene.flood(50, chained=False)]
    more_id, more = peer.sticky(scene.room, scene.eve)
    send = peer.to(target).send
    beyond = 0
    while (said := send(f"past-{beyond}", [more])).status_code == 200:
        # Others that receive have counted just before. Each takes half of what was left.
        beyond += 1
        assert beyond < most["max_staged_per_server_in_room"]
        taken.append(more_id)
        more_id, more = peer.sticky(scene.room, scene.eve)
    assert said.status_code == 429
    taken.append(elsewhere.sticky())
    go_on.set()
    wait_until(lambda: send("more", [more]).status_code == 200, "there to be room again")
    for one, event_ids in ((scene, [*taken[:-1], more_id]), (elsewhere, taken[-1:])):
        one.wait_until_there(*event_ids)


@pytest.mark.requirement("H3", "P3")
def test_who_joins_again_and_again_is_not_sent_all_again(target: Target, peer: Peer) -> None:
    alice, eve = target.user(), peer.user("eve")
    room_id = alice.create_room()
    old = [alice.send_sticky(room_id) for _ in range(20)]
    for _ in range(5):
        peer.join(target, room_id, eve)
        wait_for(peer, *old)
        alice.kick(room_id, eve)
    peer.join(target, room_id, eve)
    wait_for(peer, *old, alice.send_sticky(room_id))
    sent = Counter(pdu["hashes"]["sha256"] for pdu in list(peer.received) if is_sticky(pdu))
    assert max(sent.values()) <= 2


_ROOMS = 30
_WINDOW_S, _QUESTIONS_A_WINDOW = 1.0, 10
"""What a plain Synapse answers at once, of what ``rc_federation`` counts."""


@pytest.mark.requirement("H4")
def test_questions_are_within_the_limits_of_others(target_with: TargetWith, peer: Peer) -> None:
    """A server joins many rooms at once, and is asked what it has of each."""
    target = target_with(EXTENDED)
    alice = target.user()
    rooms = [alice.create_room() for _ in range(_ROOMS)]
    sent = [alice.send_sticky(room_id) for room_id in rooms]
    Outage(peer)
    for room_id in rooms:
        peer.join(target, room_id, peer.user("eve"))
    # It ends, so that all of it comes at once.
    asked = Asked(peer, "/backfill/", "/event/", "/state_ids/", "/state/", "/event_auth/")
    sent += [alice.send_sticky(room_id) for room_id in rooms]
    wait_for(peer, *sent)
    wait_until(lambda: len(asked.at_s) >= _ROOMS, "the questions", look=lambda: len(asked.at_s))
    # The last of them may be under way: what is sent then comes after it.
    wait_for(peer, *(alice.send_sticky(room_id) for room_id in rooms))
    assert len(asked.at_s) <= 3 * _ROOMS
    for first_s in asked.at_s:
        within = [at_s for at_s in asked.at_s if first_s <= at_s < first_s + _WINDOW_S]
        assert len(within) <= _QUESTIONS_A_WINDOW


def join_late(scene: Scene[Target]) -> tuple[str, list[str]]:
    """A user whose connection is past a room's sticky event joins the room. Gives the event's ID,
    and what the user's next answer of sliding sync has of the room."""
    old, bob = scene.alice.send_sticky(scene.room_id), scene.server.user("bob")
    bob.send_sticky(bob.create_room())
    answer = bob.sliding_sync()
    bob.join(scene.room_id)
    return old, sliding_sticky_events(bob.sliding_sync(answer), scene.room_id)


@pytest.mark.requirement("H5")
def test_a_synapse_that_does_not_fit_one_duty(
    target_with: TargetWith, peer: Peer, other_peer: Peer
) -> None:
    """It starts, the metric says so, and the other duties do their work."""
    target = target_with(Options(module_name=unfit_for("sliding")))
    scene = enter(target, peer)
    assert duties(target, "unfit") == {"sliding"}
    event_id = scene.alice.send_sticky(scene.room_id)
    scene.wait_for_sections(event_id)
    other_peer.join(target, scene.room_id, other_peer.user("carol"))
    wait_for(other_peer, event_id)
    old, seen = join_late(scene)
    assert old not in seen


@pytest.mark.requirement("H5")
def test_what_synapse_does_itself_is_left_to_it(target_with: TargetWith, peer: Peer) -> None:
    name = f"{InSynapseWithItsOwn.__module__}.{InSynapseWithItsOwn.__name__}"
    target = target_with(Options(module_name=name))
    scene = enter(target, peer)
    assert duties(target, "native") == InSynapseWithItsOwn.MARKS.keys() - {"receipt"}
    scene.wait_for_sections(scene.sticky(), scene.alice.send_sticky(scene.room_id))


_HALVES = (
    ("index", "joins", "extremities", "receipt", "sending", "pruning"),
    ("delivery", "sliding", "visibility", "parking", "deferral"),
)
"""All duties. What one needs is in the same half."""


@pytest.mark.requirement("H6")
@pytest.mark.parametrize("off", _HALVES, ids=["one half", "the other half"])
def test_duties_are_switched_off(target_with: TargetWith, peer: Peer, off: tuple[str, ...]) -> None:
    """What they do is seen of one duty of each half."""
    switches = {duty: {"enabled": False} for duty in off}
    limited = {"per_user": _NEVER_MORE}
    target = target_with(Options(module={"local": limited, **switches}))
    scene = enter(target, peer)
    (on,) = ({*half} for half in _HALVES if half != off)
    wait_until(lambda: duties(target, "on") == on, "the others to be on")
    assert duties(target, "off") == {*off}
    old, seen = join_late(scene)
    assert (old in seen) == ("sliding" in on)
    flood = [old, scene.sticky()]
    with pytest.raises(ApiError) if "sending" in on else nullcontext():
        flood += [scene.alice.send_sticky(scene.room_id) for _ in range(2 * _BURST)]
    assert {*flood} <= {*scene.alice.collect_sticky(scene.room_id, {*flood})}


@pytest.mark.requirement("H6")
def test_limits_are_observed(target_with: TargetWith, peer: Peer) -> None:
    """Nobody is held up, and what the limits would do is counted."""
    observing = {
        "federation": {**_NONE, "mode": "observe", "per_server": _NEVER_MORE},
        "local": {"mode": "observe", "per_user": _NEVER_MORE},
    }
    target = target_with(Options(module=observing))
    scene = enter(target, peer)
    flood = scene.flood(4 * _BURST)
    own = [scene.alice.send_sticky(scene.room_id) for _ in range(4 * _BURST)]
    scene.wait_for_sections(*flood, *own)
    counted = target.metrics
    for limit, outcome in (("per_server", "deferred"), ("per_user", "refused")):
        name = f'synapse_sticky_observed_total{{limit="{limit}",outcome="{outcome}"}}'
        wait_until(
            lambda: counted().get(name) == 3 * _BURST,  # noqa: B023
            f"{name} to be counted",
        )
