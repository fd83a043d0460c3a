"""What administrators order, in the database: bounded, kept, over by itself (E3, H3)."""

from typing import Any

import attr
import pytest
from synapse.module_api.errors import SynapseError

from synapse_sticky.admin import tables
from synapse_sticky.admin.actions import Actions
from synapse_sticky.admin.following import Following
from synapse_sticky.admin.requests import Request
from synapse_sticky.admin.tables import KEPT_FOR_MS, Action, ActionTable
from synapse_sticky.config import parse
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.orders import Orders, Release
from tests.unit.members import ThisProcess, World

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
    actions = Actions(table.process, table.it, parse({}).federation, lambda: None)
    request = Request("POST", ["actions"], {}, {"kind": "discard", **of}, ADMIN)
    with pytest.raises(SynapseError) as raised:
        table.world.drive(actions.post(request))
    assert raised.value.code == 400
    assert table.all() == []


@pytest.mark.requirement("H1")
def test_nothing_is_held_without_the_duty(table: Table) -> None:
    """Else the limits would be lifted for nothing."""
    config = parse({"federation": {"mode": "reject"}}).federation
    actions = Actions(table.process, table.it, config, lambda: None, defers=False)
    request = Request("POST", ["actions"], {}, {"kind": "hold", "server": "there"}, ADMIN)
    with pytest.raises(SynapseError, match="'deferral' is off"):
        table.world.drive(actions.post(request))
    assert table.all() == []


@pytest.mark.requirement("E3")
def test_orders_are_taken_and_listed(table: Table, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    changes: list[None] = []
    config = parse({}).federation
    actions = Actions(table.process, table.it, config, lambda: changes.append(None))

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
