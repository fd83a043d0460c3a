"""A server that is newly in the federation whitelist gets what it was not sent before (H7)."""

from collections.abc import Iterator, Sequence

import pytest

from synapse_sticky.handlers.joins.synapse import SynapseFederation
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.handlers.joins.whitelist.synapse import SynapseWhitelist
from synapse_sticky.handlers.joins.whitelist.whitelist import Whitelist
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.homeserver.rooms import Rooms
from tests.unit.members import HERE, Change, Member, ThisProcess, World, counts

HOUR_MS = 3_600_000


class Federation(SynapseFederation):
    """The real one; it says whom it would send to."""

    woken: list[str]

    def wake(self, destination: str) -> None:
        self.woken.append(destination)


@pytest.fixture
def rooms(world: World, process: ThisProcess) -> Iterator[World]:
    """``!own`` has a sticky event of this server, the others have none or an expired one."""
    world.drive(migrate(process, NewcomerTable(process)))
    joined = [
        ("!own", f"@alice:{HERE}"),
        ("!own", "@bob:one"),
        ("!own", "@carol:two:8448"),
        ("!own", "@dora:two:8448"),
        ("!theirs", "@bob:one"),
        ("!theirs", "@carol:two:8448"),
        ("!old", "@carol:two:8448"),
    ]
    world.put(
        [Change(100 + n, room, None, "", 100 + n) for n, room in enumerate(("!own", "!old"))],
        [Member(room_id, user_id, n) for n, (room_id, user_id) in enumerate(joined, 1)],
    )
    now_ms = world.now_ms()
    sticky = [
        ("!own", f"@alice:{HERE}", now_ms + HOUR_MS),
        ("!theirs", "@bob:one", now_ms + HOUR_MS),
        ("!old", f"@alice:{HERE}", now_ms - 1),
    ]
    for number, row in enumerate(sticky, 1):
        world.execute(
            "INSERT INTO sticky_events (stream_id, instance_name, event_id, event_stream_ordering,"
            " room_id, sender, expires_at) VALUES (?, 'master', ?, ?, ?, ?, ?)",
            *(number, f"${number}", number, *row),
        )
    yield world
    for table in ("sticky_events", "synapse_sticky_whitelists"):
        world.execute(f"DELETE FROM {table}")
    world.hs.config.federation.federation_domain_whitelist = None


def start(world: World, process: ThisProcess, allowed: Sequence[str] | None) -> list[str]:
    """A start with this whitelist. Gives who is woken."""
    config = world.hs.config.federation
    config.federation_domain_whitelist = None if allowed is None else dict.fromkeys(allowed, True)
    federation = Federation(process, Rooms(process))
    federation.woken = []
    table = NewcomerTable(process)
    Whitelist(process, SynapseWhitelist(process), federation, table).begin()
    world.take_turns()
    return federation.woken


def rename(process: ThisProcess, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A process of this name sends to all servers."""
    monkeypatch.setattr(process, "instance_name", name)
    shards = process.hs.config.worker.federation_shard_config
    monkeypatch.setattr(shards, "instances", [name])


def backlog(world: World) -> set[tuple[str, str, int]]:
    select = "SELECT destination, room_id, sticky_events_stream_position"
    return {*world.execute(f"{select} FROM destination_rooms_sticky_events_backlog")}


@pytest.mark.requirement("H7", "P3")
@pytest.mark.parametrize("now", [[HERE, "one", "two:8448"], None])
def test_who_is_newly_allowed_is_sent_what_is_sticky(
    rooms: World, process: ThisProcess, now: list[str] | None
) -> None:
    assert start(rooms, process, [HERE, "one"]) == [], "nothing is known of before"
    assert start(rooms, process, [HERE, "one"]) == []
    assert backlog(rooms) == set()
    assert start(rooms, process, now) == ["two:8448"]
    assert backlog(rooms) == {("two:8448", "!own", 0)}
    # That was once.
    process.forget()
    assert start(rooms, process, now) == []
    assert counts(process).keys() == {"whitelist"}


@pytest.mark.requirement("H7")
@pytest.mark.parametrize("before", [None, [HERE, "one", "two:8448"]])
def test_who_was_allowed_before_is_not_sent_it_again(
    rooms: World, process: ThisProcess, before: list[str] | None
) -> None:
    for allowed in (before, [HERE, "one"], [HERE, "one", "three"]):
        assert start(rooms, process, allowed) == []
    assert backlog(rooms) == set()


@pytest.mark.requirement("H7", "E4")
def test_what_could_not_be_looked_up_is_looked_up_again(rooms: World, process: ThisProcess) -> None:
    start(rooms, process, [HERE])
    process.failing = "servers_in"
    assert start(rooms, process, [HERE, "one"]) == []
    process.failing = None
    # Another run, as this one was killed.
    assert start(rooms, process, [HERE, "one"]) == ["one"]
    assert backlog(rooms) == {("one", "!own", 0)}


@pytest.mark.requirement("H7")
@pytest.mark.parametrize("now", [[HERE, "one"], None])
def test_a_new_or_renamed_process_goes_by_what_the_others_know(
    rooms: World, process: ThisProcess, monkeypatch: pytest.MonkeyPatch, now: list[str] | None
) -> None:
    assert start(rooms, process, [HERE, "two:8448"]) == []
    rename(process, monkeypatch, "renamed")
    assert start(rooms, process, now) == ["one"]
    assert backlog(rooms) == {("one", "!own", 0)}
    # That was once.
    assert start(rooms, process, now) == []


@pytest.mark.requirement("H7")
@pytest.mark.parametrize("now", [[HERE, "one"], None])
def test_a_new_process_may_look_after_the_others(
    rooms: World, process: ThisProcess, monkeypatch: pytest.MonkeyPatch, now: list[str] | None
) -> None:
    start(rooms, process, [HERE, "two:8448"])
    assert start(rooms, process, now) == ["one"]
    rename(process, monkeypatch, "second")
    assert start(rooms, process, now) == ["one"]


@pytest.mark.requirement("H7")
@pytest.mark.parametrize("always", [None, [HERE, "one"]])
def test_a_new_process_beside_a_list_that_stays_sends_nothing(
    rooms: World,
    process: ThisProcess,
    monkeypatch: pytest.MonkeyPatch,
    always: list[str] | None,
) -> None:
    assert start(rooms, process, always) == []
    rename(process, monkeypatch, "second")
    assert start(rooms, process, always) == []
    # It has stored its own: the first process has another one meanwhile.
    monkeypatch.undo()
    start(rooms, process, [HERE])
    rename(process, monkeypatch, "second")
    assert start(rooms, process, always) == []
    assert backlog(rooms) == set()
