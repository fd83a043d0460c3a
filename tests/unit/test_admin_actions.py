"""What administrators order, in the database: bounded, kept, over by itself (E3, H3)."""

from collections.abc import Callable, Sequence
from typing import Any

import attr
import pytest
from synapse.module_api.errors import SynapseError

from synapse_sticky.admin import tables
from synapse_sticky.admin.actions import Actions
from synapse_sticky.admin.following import Following
from synapse_sticky.admin.requests import Request
from synapse_sticky.admin.tables import (
    KEPT_FOR_MS,
    PUSHES_APART_MS,
    Action,
    ActionTable,
    TooSoonError,
)
from synapse_sticky.config import parse
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.homeserver.rooms import Rooms
from synapse_sticky.orders import Orders, PushAgain, Release
from tests.unit.members import Member, ThisProcess, World

ADMIN = "@admin:here"
HOUR_MS = 3_600_000


@attr.s(auto_attribs=True)
class Table:
    """The table of a homeserver in this process."""

    world: World
    process: ThisProcess
    it: ActionTable

    def add(self, action_id: str, kind: str = "hold", **fields: Any) -> bool:
        now_ms = self.process.now_ms()
        made = {"made_ms": now_ms, "until_ms": now_ms + HOUR_MS, **fields}
        of_what = {name: made.pop(name, None) for name in ("server", "room_id", "sender")}
        action = Action(action_id, kind, **of_what, reason="", made_by=ADMIN, **made)
        added: bool = self.world.drive(self.it.add(action))
        return added

    def pass_s(self, seconds: int) -> None:
        for _ in range(seconds):
            self.world.reactor.advance(1)
            self.world.take_turns()

    def actions(
        self,
        mode: str = "defer",
        on_change: Callable[[], None] = lambda: None,
        duties: Sequence[str] = ("deferral", "joins"),
    ) -> Actions:
        config = parse({"federation": {"mode": mode}}).federation
        rooms = Rooms(self.process)
        return Actions(self.process, rooms, self.it, config, on_change, duties=duties)

    def in_force(self) -> list[str]:
        return [action.action_id for action in self.world.drive(self.it.in_force())]

    def all(self) -> list[str]:
        return [action.action_id for action in self.world.drive(self.it.page(None, 100))]


@pytest.fixture
def table(world: World, process: ThisProcess) -> Table:
    found = Table(world, process, ActionTable(process))
    world.drive(migrate(process, found.it))
    world.execute("DELETE FROM synapse_sticky_actions")
    return found


@pytest.mark.requirement("E3")
def test_an_action_is_in_force_until_it_is_over_or_ended(table: Table) -> None:
    now_ms = table.process.now_ms()
    assert table.add("a", server="there", made_ms=now_ms - 2)
    assert table.add("b", server="there", made_ms=now_ms - 1, until_ms=now_ms)
    assert table.add("c", server="other", made_ms=now_ms)
    assert table.in_force() == ["a", "c"]
    ended, was_in_force = table.world.drive(table.it.end("a", "@other:here"))
    assert was_in_force
    assert (ended.ended_by, ended.ended_ms) == ("@other:here", table.process.now_ms())
    assert table.world.drive(table.it.end("a", ADMIN)) == (ended, False)
    over, was_in_force = table.world.drive(table.it.end("b", ADMIN))
    assert (over.ended_by, was_in_force) == (None, False)
    assert table.world.drive(table.it.end("x", ADMIN)) is None
    assert table.in_force() == ["c"]
    # Those that are over are shown, those made last in front.
    assert table.all() == ["c", "b", "a"]
    first, second = table.world.drive(table.it.page(None, 2))
    before = second.made_ms, second.action_id
    assert [a.action_id for a in table.world.drive(table.it.page(before, 2))] == ["a"]
    assert first.action_id == "c"

    def held_until_ms(txn: Any) -> int | None:
        return table.it.held_until_txn(txn, "other")

    found = table.world.drive(table.process.transact("test", held_until_ms))
    assert found == now_ms + HOUR_MS


@pytest.mark.requirement("H3")
def test_there_are_not_too_many(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MOST_IN_FORCE", 3)
    monkeypatch.setattr(tables, "MOST_KEPT", 5)
    now_ms = table.process.now_ms()
    for number in range(8):
        assert table.add(f"over{number}", made_ms=now_ms - 100 + number, until_ms=now_ms - 1)
    assert table.all() == [f"over{number}" for number in (7, 6, 5, 4, 3)]
    assert all(table.add(f"new{number}") for number in range(3))
    assert not table.add("one too many")
    table.world.drive(table.it.end("new0", ADMIN))
    assert table.add("another")
    assert set(table.in_force()) == {"new1", "new2", "another"}


@pytest.mark.requirement("H3")
def test_what_is_long_over_is_deleted(table: Table) -> None:
    long_ago_ms = table.process.now_ms() - KEPT_FOR_MS - 1
    assert table.add("old", made_ms=long_ago_ms, until_ms=long_ago_ms)
    assert table.add("kept", made_ms=long_ago_ms + 1_000, until_ms=long_ago_ms + 1_000)
    table.add("new")
    assert table.all() == ["new", "kept"]


@pytest.mark.requirement("E3")
def test_who_discarded_what_waited(table: Table) -> None:
    table.add("a", "discard", sender="@eve:there", made_ms=100)
    table.add("b", "discard", server="there", room_id="!room", made_ms=200)
    table.add("c", "release", server="there", made_ms=50)

    def by(room_id: str, sender: str, since_ms: int) -> Any:
        def read_txn(txn: Any) -> Any:
            return table.it.discarded_txn(txn, room_id, sender, since_ms)

        found = table.world.drive(table.process.transact("test", read_txn))
        return found and found[1]

    assert by("!room", "@eve:there", 0) == 100
    assert by("!room", "@eve:there", 101) == 200
    assert by("!room", "@mallory:there", 0) == 200
    assert by("!elsewhere", "@mallory:there", 0) is None
    assert by("!elsewhere", "@eve:there", 101) is None
    assert by("!room", "@eve:other", 0) is None


@pytest.mark.requirement("E3")
def test_a_process_learns_of_all_orders(table: Table) -> None:
    table.add("a", "hold", server="held")
    table.add("b", "exempt", server="free")
    table.add("c", "exempt", sender="@free:there")
    table.add("d", "release", server="there", made_ms=1)
    table.add("e", "discard", room_id="!room", made_ms=2)
    table.add("f", "push", server="there", room_id="!room", made_ms=3)
    orders = Orders()
    reads: list[None] = []
    orders.on_read(lambda: reads.append(None))
    table.world.drive(Following(table.process, table.it, orders).begin())
    assert reads == [None]
    assert orders.held_servers == {"held"}
    assert orders.exempt_servers == {"free"}
    assert orders.exempt_users == {"@free:there"}
    assert orders.releases == (
        Release("d", "there", None, None, made_ms=1),
        Release("e", None, "!room", None, is_discard=True, made_ms=2),
    )
    assert orders.pushes == (PushAgain("f", "there", "!room"),)


@pytest.mark.requirement("E3")
def test_what_cannot_be_read_any_more_is_over_in_time(table: Table) -> None:
    now_ms = table.process.now_ms()
    table.add("a", "hold", server="short", until_ms=now_ms + 60_000)
    table.add("b", "hold", server="long")
    orders = Orders()
    table.world.drive(Following(table.process, table.it, orders).begin())
    table.process.failing = "read_actions"
    table.pass_s(10)
    assert orders.held_servers == {"short", "long"}
    table.pass_s(130)
    assert orders.held_servers == {"long"}


@pytest.mark.requirement("E3")
@pytest.mark.parametrize(
    "of",
    [
        {"server": "@eve:there"},
        {"server": "https://there"},
        {"server": "there "},
        {"room_id": "#alias:there"},
        {"room_id": "!"},
        {"sender": "eve"},
        {"sender": "@eve"},
        {"sender": "@eve:"},
    ],
)
def test_an_order_of_nobody_is_refused(table: Table, of: dict[str, str]) -> None:
    actions = table.actions()
    request = Request("POST", ["actions"], {}, {"kind": "discard", **of}, ADMIN)
    with pytest.raises(SynapseError) as raised:
        table.world.drive(actions.post(request))
    assert raised.value.code == 400
    assert table.all() == []


@pytest.mark.requirement("H1")
def test_nothing_is_held_without_the_duty(table: Table) -> None:
    """Else the limits would be lifted for nothing."""
    actions = table.actions("reject", duties=[])
    request = Request("POST", ["actions"], {}, {"kind": "hold", "server": "there"}, ADMIN)
    with pytest.raises(SynapseError, match="'deferral' is off"):
        table.world.drive(actions.post(request))
    assert table.all() == []


@pytest.mark.requirement("E3")
def test_orders_are_taken_and_listed(table: Table, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    changes: list[None] = []
    actions = table.actions(on_change=lambda: changes.append(None))

    def request(method: str, *path: str, body: Any = None, **query: str) -> Request:
        return Request(method, path, {k: [v] for k, v in query.items()}, body or {}, ADMIN)

    made = [
        table.world.drive(actions.post(request("POST", "actions", body=body)))
        for body in (
            {"kind": "hold", "server": "there", "for_ms": 60_000, "reason": "a flood"},
            {"kind": "release", "sender": "@eve:there"},
        )
    ]
    assert all(action["in_force"] and action["made_by"] == ADMIN for action in made)
    page = table.world.drive(actions.get(request("GET", "actions", limit="1")))
    rest = table.world.drive(actions.get(request("GET", "actions", **{"from": page["next"]})))
    found = [action["action_id"] for action in (*page["actions"], *rest["actions"])]
    assert {*found} == {action["action_id"] for action in made}
    action_id = made[0]["action_id"]
    ended = table.world.drive(actions.delete(request("DELETE", "actions", action_id)))
    assert (ended["in_force"], ended["ended_by"]) == (False, ADMIN)
    # Whoever comes later has ended nothing.
    late = attr.evolve(request("DELETE", "actions", action_id), admin="@late:here")
    assert table.world.drive(actions.delete(late)) == ended
    assert "@late:here" not in caplog.text
    assert len(changes) == 3
    assert f"{ADMIN} has ordered hold of there until" in caplog.text
    assert "'a flood'" in caplog.text
    assert f"{ADMIN} has ended hold of there until" in caplog.text
    with pytest.raises(SynapseError) as raised:
        table.world.drive(actions.delete(request("DELETE", "actions", "none")))
    assert raised.value.code == 404


@pytest.mark.requirement("E3", "H3")
def test_a_room_is_pushed_again_once_a_minute_at_most(table: Table) -> None:
    now_ms = table.process.now_ms()

    def push(action_id: str, server: str = "there", room_id: str = "!room", **fields: Any) -> bool:
        return table.add(action_id, "push", server=server, room_id=room_id, **fields)

    assert push("a")
    # One that nobody has begun.
    with pytest.raises(TooSoonError) as raised:
        push("b")
    assert raised.value.retry_after_ms == PUSHES_APART_MS
    # Other servers and rooms are not concerned.
    assert push("c", server="other")
    assert push("d", room_id="!other")
    table.world.drive(table.it.done("a"))
    (done,) = [a for a in table.world.drive(table.it.page(None, 9)) if a.action_id == "a"]
    assert (done.ended_by, done.ended_ms) == (None, now_ms)
    table.world.reactor.advance(20)
    with pytest.raises(TooSoonError) as raised:
        push("b")
    assert raised.value.retry_after_ms == PUSHES_APART_MS - 20_000
    table.world.reactor.advance(40)
    assert push("b")
    assert set(table.in_force()) == {"b", "c", "d"}
    # What an hour ago nobody has begun, nobody begins any more.
    table.world.reactor.advance(HOUR_MS / 1000)
    assert table.in_force() == []
    assert push("e")


@pytest.mark.requirement("E3")
def test_only_where_both_servers_are_a_room_is_pushed(table: Table) -> None:
    table.world.put([], [Member("!room", "@a:here", 1), Member("!room", "@b:there", 2)])
    table.world.put([], [Member("!theirs", "@b:there", 3)])

    def push(duties: Any = ("joins",), **of: str) -> Any:
        actions = table.actions("off", duties=duties)
        request = Request("POST", ["actions"], {}, {"kind": "push", **of}, ADMIN)
        return table.world.drive(actions.post(request))

    for duties, of, said in (
        ([], {"server": "there", "room_id": "!room"}, "'joins' is off"),
        (["joins"], {"server": "here", "room_id": "!room"}, "to itself"),
        (["joins"], {"server": "there", "room_id": "!theirs"}, "This server is not in the room"),
        (["joins"], {"server": "other", "room_id": "!room"}, "'other' is not in the room"),
        (["joins"], {"server": "%", "room_id": "!room"}, "'%' is not in the room"),
        (["joins"], {"server": "there"}, "needs 'server' and 'room_id'"),
    ):
        with pytest.raises(SynapseError, match=said) as raised:
            push(duties, **of)
        assert raised.value.code == 400
    action = push(server="there", room_id="!room")
    assert (action["in_force"], action["until_ms"] - action["made_ms"]) == (True, HOUR_MS)
    with pytest.raises(SynapseError, match="a moment ago") as raised:
        push(server="there", room_id="!room")
    assert (raised.value.code, raised.value.headers) == (429, {"Retry-After": "60"})


@pytest.mark.requirement("E3")
@pytest.mark.parametrize("mode", ["off", "observe"])
@pytest.mark.parametrize("of", [{"server": "there"}, {"sender": "@eve:there"}])
def test_without_limits_nobody_is_exempt(table: Table, mode: str, of: dict[str, str]) -> None:
    actions = table.actions(mode)
    request = Request("POST", ["actions"], {}, {"kind": "exempt", **of}, ADMIN)
    with pytest.raises(SynapseError, match=f"as federation.mode is '{mode}'") as raised:
        table.world.drive(actions.post(request))
    assert raised.value.code == 400
    assert table.all() == []


@pytest.mark.requirement("E3")
@pytest.mark.parametrize("of", [{"server": "here"}, {"sender": "@alice:here"}])
def test_own_users_have_no_limit_of_other_servers(table: Table, of: dict[str, str]) -> None:
    actions = table.actions()
    request = Request("POST", ["actions"], {}, {"kind": "exempt", **of}, ADMIN)
    with pytest.raises(SynapseError, match="This server's own users"):
        table.world.drive(actions.post(request))
