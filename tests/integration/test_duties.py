"""Each duty can be switched off by itself: what plain Synapse does is seen, and the others go on.

docs/duties.md has the same table in words.
"""

import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import attr
import pytest

from synapse_sticky.config import DUTIES as OPTIONS
from synapse_sticky.duties import DUTIES
from tests.conftest import Servers
from tests.integration.rooms import (
    deferred,
    entered,
    has_event,
    limits,
    wait_until_expired,
    wait_until_taken_in,
)
from tests.integration.test_extremities import THRESHOLD, extremities, flood_with_forks
from tests.lab import Homeserver, Lab, Peer, wait_until
from tests.lab.client import TTL, WITHOUT_TIMELINE, ApiError, sliding_sticky_events, sticky_events
from tests.lab.scene import Scene, enter
from tests.lab.starter import PROJECT

pytestmark = pytest.mark.one_process

PAGE = PROJECT / "docs" / "duties.md"

BURST = 3
NEVER_MORE = {"per_second": 0.001, "burst_count": BURST}
DEFERRING = limits("defer", per_server=NEVER_MORE)
REFUSING = limits("reject", per_server=NEVER_MORE)
STAGED = 150
"""More than Synapse leaves unpruned."""
MERGED_WITHIN_MS = 7_000
"""The duty looks every five seconds."""


@attr.s(auto_attribs=True)
class Stage:
    """A room of the server's ``alice`` that the peer's ``eve`` has joined, and a peer that has not
    joined anything."""

    scene: Scene[Homeserver]
    newcomer: Peer

    @property
    def server(self) -> Homeserver:
        return self.scene.server


# What plain Synapse does


def new_events_are_asked_of_the_database(stage: Stage) -> None:
    alice = stage.scene.alice
    since = alice.sync()["next_batch"]
    asked = database_was_asked(stage.server)
    event_id = alice.send_sticky(stage.scene.room_id)
    answer = alice.sync(since, filter_=WITHOUT_TIMELINE)
    assert sticky_events(answer, stage.scene.room_id) == [event_id]
    assert database_was_asked(stage.server) > asked


def database_was_asked(server: Homeserver) -> int:
    """How often sticky events were asked of the database for a sync."""
    name = 'synapse_storage_transaction_time_count_total{desc="get_sticky_events_in_rooms"'
    lines = "".join(server.metrics()).splitlines()
    return sum(round(float(line.split()[-1])) for line in lines if line.startswith(name))


def sliding_sync_lacks_what_was_before_the_join(stage: Stage) -> None:
    old, new, seen = join_with_sliding_sync(stage.scene)
    assert new in seen
    assert old not in seen


def join_with_sliding_sync(scene: Scene[Homeserver]) -> tuple[str, str, list[str]]:
    """A user whose connection is past a room's event joins that room, where another is sent then.

    Gives the IDs of both, and what there was of the room in sliding sync up to the latter.
    """
    bob = scene.server.user("bob")
    old = scene.alice.send_sticky(scene.room_id)
    bob.send_sticky(bob.create_room())
    answer = bob.sliding_sync()
    bob.join(scene.room_id)
    new = scene.alice.send_sticky(scene.room_id)
    seen: list[str] = []

    def synced() -> bool:
        nonlocal answer
        answer = bob.sliding_sync(answer)
        seen.extend(sliding_sticky_events(answer, scene.room_id))
        return new in seen

    wait_until(synced, "the newer one")
    return old, new, seen


def history_visibility_hides_them(stage: Stage) -> None:
    hidden, newcomer = stage.server.user("alice"), stage.newcomer
    room_id = hidden.create_room("joined")
    old = hidden.send_sticky(room_id)
    bob = stage.server.user("bob")
    bob.join(room_id)
    with pytest.raises(ApiError) as error:
        bob.event(room_id, old)
    assert error.value.status == 404
    # Nor are servers that join later sent it.
    newcomer.join(stage.server, room_id, newcomer.user("carol"))
    new = hidden.send_sticky(room_id)
    wait_until(lambda: new in newcomer.events, "the newcomer to be sent the newer one")
    assert old not in newcomer.events


def newcomers_are_not_pushed_to(stage: Stage) -> None:
    scene, newcomer = stage.scene, stage.newcomer
    old = scene.alice.send_sticky(scene.room_id)
    newcomer.join(stage.server, scene.room_id, newcomer.user("carol"))
    new = scene.alice.send_sticky(scene.room_id)
    wait_until(lambda: new in newcomer.events, "the newcomer to be sent the newer one")
    assert old not in newcomer.events
    assert not stage.server.log_has("has newly joined")


def staged_ones_are_pruned(stage: Stage) -> None:
    """Until the first of a flood is processed all are staged, and acknowledged."""
    scene, peer = stage.scene, stage.scene.peer
    all_are_sent = threading.Event()

    def hold_up(method: str, path: str) -> None:
        if "/get_missing_events/" in path:
            all_are_sent.wait(60)

    peer.override = hold_up
    unknown_id, _ = peer.sticky(scene.room, scene.eve)
    peer.advance(scene.room, unknown_id)
    flood = scene.flood(STAGED)
    all_are_sent.set()
    wait_until(lambda: stage.server.log_has("Pruning"), "the pruning")
    wait_until_nothing_is_staged(stage.server)
    assert set(flood) - set(entered(stage.server, scene.room_id))


def wait_until_nothing_is_staged(server: Homeserver) -> None:
    wait_until(
        lambda: not server.query("SELECT 1 FROM federation_inbound_events_staging"),
        "nothing to be staged",
    )


def what_cannot_be_persisted_at_once_is_dropped(stage: Stage) -> None:
    scene, peer = stage.scene, stage.scene.peer
    peer.override = lambda method, path: (502, {}) if "/get_missing_events/" in path else None
    before = scene.room.extremities, scene.room.depth
    unknown_id, _ = peer.sticky(scene.room, scene.eve)
    peer.advance(scene.room, unknown_id)
    dropped = scene.sticky()
    wait_until_nothing_is_staged(stage.server)
    peer.override = lambda method, path: None
    scene.room.extremities, scene.room.depth = before
    scene.wait_until_there(scene.sticky())
    assert not has_event(stage.server, dropped)
    assert not stage.server.log_has("Parked the sticky PDU")


def nothing_is_refused(stage: Stage) -> None:
    for _ in range(3):
        stage.scene.flood(2 * BURST)


def a_flood_is_delivered_at_once(stage: Stage) -> None:
    flood = stage.scene.flood(4 * BURST)
    wait_until_taken_in(stage.server, stage.scene.room_id, set(flood))
    stage.scene.wait_for_sections(*flood)


def local_users_are_not_limited(stage: Stage) -> None:
    sent = {stage.scene.alice.send_sticky(stage.scene.room_id) for _ in range(4 * BURST)}
    assert set(stage.scene.alice.collect_sticky(stage.scene.room_id, sent)) == sent


def extremities_stay(stage: Stage) -> None:
    count = THRESHOLD + 5
    room_id = flood_with_forks(stage.server, stage.scene.peer, count)
    # The end of another room's event: a duty that merges would have done so by then.
    alice, elsewhere = stage.scene.alice, stage.scene.room_id
    wait_until_expired(stage.server, alice.send_sticky(elsewhere, MERGED_WITHIN_MS))
    assert extremities(stage.server, room_id) == count


# What another duty does


def newcomers_are_pushed_to(stage: Stage) -> None:
    scene, newcomer = stage.scene, stage.newcomer
    old = scene.alice.send_sticky(scene.room_id)
    newcomer.join(stage.server, scene.room_id, newcomer.user("dora"))
    wait_until(lambda: old in newcomer.events, "the newcomer to be sent what was before its join")


def sliding_sync_has_what_was_before_the_join(stage: Stage) -> None:
    old, new, seen = join_with_sliding_sync(stage.scene)
    assert old in seen
    assert new in seen


def hidden_history_shows_them(stage: Stage) -> None:
    hidden, bob = stage.server.user("alice"), stage.server.user("bob")
    room_id = hidden.create_room("joined")
    old = hidden.send_sticky(room_id)
    bob.join(room_id)
    assert TTL in bob.event(room_id, old)["unsigned"]


def a_flood_is_deferred(stage: Stage) -> None:
    flood = stage.scene.flood(4 * BURST)
    wait_until_taken_in(stage.server, stage.scene.room_id, set(flood))
    assert deferred(stage.server)
    # Not the sticky event of somebody else.
    own = stage.scene.alice.send_sticky(stage.scene.room_id)
    wait_until(lambda: own in stage.scene.sections()[0], "the other one")


def what_follows_is_refused(stage: Stage) -> None:
    scene = stage.scene
    _, pdu = scene.peer.sticky(scene.room, scene.eve)
    assert scene.peer.to(stage.server).send("past-the-limit", [pdu]).status_code == 429


@attr.s(auto_attribs=True, frozen=True)
class Row:
    """One duty that is off.

    requirements: what it does, by their IDs.
    plain: shows that Synapse does as it does without this duty.
    other: shows that another duty is done all the same.
    needs: the duties without which it is off as well.
    config: the module's other options.
    """

    duty: str
    requirements: tuple[str, ...]
    plain: Callable[[Stage], None]
    other: Callable[[Stage], None]
    needs: tuple[str, ...] = ()
    config: dict[str, Any] = attr.Factory(dict)


ROWS = (
    Row("index", ("D1", "D2"), new_events_are_asked_of_the_database, hidden_history_shows_them),
    Row(
        "delivery",
        ("D1", "D2", "D4", "D5", "S5"),
        new_events_are_asked_of_the_database,
        newcomers_are_pushed_to,
    ),
    Row("sliding", ("D5",), sliding_sync_lacks_what_was_before_the_join, newcomers_are_pushed_to),
    Row("visibility", ("C1",), history_visibility_hides_them, newcomers_are_pushed_to),
    Row(
        "joins",
        ("P3", "P7", "F3"),
        newcomers_are_not_pushed_to,
        sliding_sync_has_what_was_before_the_join,
        needs=("index",),
    ),
    Row("pruning", ("L3", "D7"), staged_ones_are_pruned, newcomers_are_pushed_to),
    Row(
        "parking",
        ("L3", "F3"),
        what_cannot_be_persisted_at_once_is_dropped,
        newcomers_are_pushed_to,
    ),
    Row(
        "receipt",
        ("L1", "L2", "L6"),
        nothing_is_refused,
        a_flood_is_deferred,
        config=REFUSING,
    ),
    Row(
        "deferral",
        ("L1", "L4", "L5", "L7", "D7"),
        a_flood_is_delivered_at_once,
        what_follows_is_refused,
        config=REFUSING,
    ),
    Row(
        "sending",
        ("E1", "S3"),
        local_users_are_not_limited,
        a_flood_is_deferred,
        config={**DEFERRING, "local": {"per_user": NEVER_MORE}},
    ),
    Row(
        "extremities",
        ("F2",),
        extremities_stay,
        newcomers_are_pushed_to,
        needs=("index",),
    ),
)


SLOW = {"sliding", "visibility", "parking", "extremities"}
"""Those whose other tests in make test show most of it."""


def each_row(requirement: str) -> pytest.MarkDecorator:
    def param(row: Row) -> Any:
        marks = [pytest.mark.requirement(requirement, *row.requirements)]
        if row.duty in SLOW:
            marks.append(pytest.mark.slow)
        return pytest.param(row, id=row.duty, marks=marks)

    return pytest.mark.parametrize("row", [param(row) for row in ROWS])


@each_row("H6")
def test_off(lab: Lab, servers: Servers, peer: Peer, newcomer: Peer, row: Row) -> None:
    """Plain Synapse is what is left of this duty, and only of this one."""
    config = {**row.config, row.duty: {**row.config.get(row.duty, {}), "enabled": False}}
    (server,) = servers({"config": config, "metrics": True})
    is_told(server, dict.fromkeys((row.duty, *those_that_need(row)), "off"))
    is_as_without(row, Stage(enter(server, peer), newcomer), row.plain)


LOADED = ("sliding", "joins", "parking", "deferral")
"""What has tables is not on before these are there."""


def those_that_need(row: Row) -> list[str]:
    return [other.duty for other in ROWS if row.duty in other.needs]


def is_as_without(row: Row, stage: Stage, plain: Callable[[Stage], None]) -> None:
    plain(stage)
    row.other(stage)
    # However little is left of the module: what is sticky reaches who is there.
    event_id = stage.scene.alice.send_sticky(stage.scene.room_id)
    seen = stage.scene.alice.collect_sticky(
        stage.scene.room_id, {event_id}, filter_=WITHOUT_TIMELINE
    )
    assert event_id in seen


def is_told(server: Homeserver, states: dict[str, str]) -> None:
    """The start line and the metric say which duties are not on, and the log why."""
    on = [duty for duty in DUTIES if duty not in states]
    parts = [", ".join(duty for duty in on if duty not in LOADED)]
    if loaded := [duty for duty in on if duty in LOADED]:
        parts.append(f"loading: {', '.join(loaded)}")
    for state in ("off", "unfit"):
        if duties := [duty for duty in DUTIES if states.get(duty) == state]:
            parts.append(f"{state}: {', '.join(duties)}")
    assert server.log_has(f"synapse-sticky runs in master: {'; '.join(parts)}\n")
    for row in ROWS:
        because = row.duty in states and [name for name in row.needs if name in states]
        assert server.log_has(f"{row.duty} is off, as it needs ") == bool(because)
        is_unfit = states.get(row.duty) == "unfit"
        assert bool(unfit_parts(server, row.duty)) == is_unfit
        wait_until(
            partial(in_state, server, row.duty, states.get(row.duty, "on")),
            f"the metric of {row.duty}",
        )


def unfit_parts(server: Homeserver, duty: str) -> list[str]:
    """What the log says of each part of the duty that this Synapse does not fit."""
    return re.findall(
        rf" {duty}(?: \(\w+\))? is off, as this Synapse does not fit: (.*)\. Without it ",
        server.log_path.read_text(),
    )


def in_state(server: Homeserver, duty: str, state: str) -> bool:
    """Does the metric say so, and nothing else?"""
    counters = server.counters()
    said = {
        other: counters.get(f'synapse_sticky_duty{{duty="{duty}",state="{other}"}}') == 1
        for other in ("on", "off", "unfit", "native")
    }
    return said.pop(state) and not any(said.values())


@pytest.fixture
def newcomer(lab: Lab) -> Iterator[Peer]:
    started = lab.peer()
    yield started
    started.close()


@pytest.mark.requirement("H6")
def test_page_says_the_same() -> None:
    """docs/duties.md, the rows above and what the module does are one table."""
    rows = table_of(PAGE)
    assert [cells[0] for cells in rows] == [row.duty for row in ROWS] == list(DUTIES)
    assert set(OPTIONS) == set(DUTIES)
    for row, (_, does, needs, without, process) in zip(ROWS, rows, strict=True):
        duty = DUTIES[row.duty]
        assert does.endswith(f" ({', '.join(row.requirements)})"), row.duty
        assert tuple(re.findall(r"\*\*(\w+)\*\*", needs)) == row.needs == duty.needs, row.duty
        # The log says it in the same words.
        assert without.lower().startswith(duty.parts[0].without.lower()), row.duty
        assert process, row.duty


def table_of(page: Path) -> list[list[str]]:
    """The cells of the page's first table, but for its head."""
    after = page.read_text().partition("\n| ")[2].splitlines()
    lines = [*takewhile(lambda line: line.startswith("|"), after[1:])]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
