"""Lists for administrators: every entry once, in order, whatever the size of a page (E3, H3)."""

from collections import Counter
from typing import Any

import pytest

from synapse_sticky.admin.actions import Actions
from synapse_sticky.admin.api import LISTS_AT_ONCE, LISTS_WAITING, Api
from synapse_sticky.admin.installing import make_api
from synapse_sticky.admin.requests import Request
from synapse_sticky.admin.tables import Action, ActionTable
from synapse_sticky.config import parse
from synapse_sticky.handlers.deferral.reading import DeferredReader
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.joins.reading import NewcomerReader
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.handlers.staging.parking.reading import ParkedReader
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.homeserver.rooms import Rooms
from synapse_sticky.lately import Lately
from tests.lab.admin_api import check
from tests.unit.members import ThisProcess, World
from tests.unit.test_limits_in_synapse import begin

HOUR_MS = 3_600_000
TABLES = (
    *("synapse_sticky_deferred", "synapse_sticky_incomplete", "synapse_sticky_newcomers"),
    *("sticky_events", "rooms", "synapse_sticky_actions"),
)


class Asked:
    """The API of a homeserver in this process, with things in seven rooms of five servers."""

    def __init__(self, world: World, process: ThisProcess) -> None:
        self._world = world
        config = parse({}).federation
        for table in (DeferredTable, NewcomerTable, ParkedTable, ActionTable):
            world.drive(migrate(process, table(process)))
        for name in TABLES:
            world.execute(f"DELETE FROM {name}")
        orders = ActionTable(process)
        self.lately = Lately(process.now_ms)
        self._api: Api = make_api(
            *(
                process,
                parse({"federation": {"max_deferred_per_server": 60}}),
                rooms := Rooms(process),
                DeferredReader(process, config),
            ),
            *(ParkedReader(), NewcomerReader(process)),
            *(Actions(process, rooms, orders, config, lambda: None), orders),
            self.lately,
        )
        self._now_ms = process.now_ms()
        for number in range(7):
            self._insert("rooms", room_id=f"!{number}", is_public=False)
        self.kinds = {"active": range(60), "deferred": range(45), "parked": range(20)}
        for n in self.kinds["active"]:
            # The last of all has expired.
            self._active(n, -1 if n == 59 else HOUR_MS)
        for n in self.kinds["deferred"]:
            self.defer(n, self.server(n))
        for n in self.kinds["parked"]:
            self._insert(
                "synapse_sticky_incomplete",
                origin=self.server(n),
                event_id=f"$p{n:03}",
                room_id=self.room(n),
                event_json='{"sender": "@a:b", "type": 5}',
                internal_metadata="{}",
                prev_event_ids="[]",
                received_ts_ms=n,
                until_ms=self._now_ms + HOUR_MS,
                due_ms=1,
            )
        self.kinds["active"] = range(59)

    def defer(self, number: int, server: str) -> None:
        self._insert(
            "synapse_sticky_deferred",
            event_id=f"$d{number:03}",
            room_id=self.room(number),
            sender=f"@a:{server}",
            server=server,
            expires_at_ms=self._now_ms + HOUR_MS,
            event_stream_ordering=number,
            past_limit="per_room",
        )

    @staticmethod
    def room(number: int) -> str:
        return f"!{number * number % 7}"

    @staticmethod
    def server(number: int) -> str:
        return f"server{number * number % 5}:8448"

    def _active(self, number: int, for_ms: int) -> None:
        self._insert(
            "sticky_events",
            stream_id=number + 1,
            instance_name="master",
            event_id=f"$a{number:03}",
            room_id=self.room(number),
            sender=f"@a:{self.server(number)}",
            expires_at=self._now_ms + for_ms,
            event_stream_ordering=number - 30,
        )

    def _insert(self, table: str, **row: Any) -> None:
        marks = ", ".join("?" * len(row))
        sql = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})"
        self._world.execute(sql, *row.values())

    def answer(self, request: Request) -> Any:
        _, answer = self._world.drive(self._api.answer(request))
        return answer

    def begin(self, path: str) -> list[Any]:
        """Asks; gives where the answer will be, or the failure."""
        request = Request("GET", path.split("/"), {}, {}, "@admin:here")
        return begin(self._api.answer(request))

    def answered(self, path: str) -> list[Any]:
        """The answer, or the failure; nothing if there is none."""
        results = self.begin(path)
        self.take_turns()
        return results

    def take_turns(self) -> None:
        """Lets happen what can."""
        for _ in range(100):
            self._world.reactor.advance(0)

    def overview(self) -> Any:
        answer = self.answer(Request("GET", ["overview"], {}, {}, "@admin:here"))
        check("overview", answer)
        return answer

    def pages(self, path: str, what: str, **query: object) -> list[Any]:
        """The whole list. Each page is as it is described."""
        found: list[Any] = []
        after: dict[str, Any] = {}
        while True:
            asked = {name: [str(value)] for name, value in {**query, **after}.items()}
            request = Request("GET", path.split("/"), asked, {}, "@admin:here")
            status, answer = self._world.drive(self._api.answer(request))
            assert status == 200
            check(path, answer)
            assert len(answer[what]) <= int(str(query.get("limit", 100)))
            found += answer[what]
            if "next" not in answer:
                return found
            after = {"from": answer["next"]}


@pytest.fixture
def asked(world: World, process: ThisProcess) -> Asked:
    return Asked(world, process)


@pytest.mark.requirement("E3")
@pytest.mark.parametrize("limit", [1, 3, 100])
@pytest.mark.parametrize("path", ["rooms", "servers"])
def test_rooms_and_servers(asked: Asked, path: str, limit: int) -> None:
    key, of = ("room_id", asked.room) if path == "rooms" else ("server", asked.server)
    counts = {kind: Counter(map(of, numbers)) for kind, numbers in asked.kinds.items()}
    names = sorted({name for count in counts.values() for name in count})
    for kind, count in counts.items():
        found = asked.pages(path, path, order_by=kind, limit=limit)
        expected = sorted(names, key=lambda name: (-count[name], name))
        assert [entry[key] for entry in found] == expected
        assert [entry[kind] for entry in found] == [count[name] for name in expected]
        upwards = asked.pages(path, path, order_by=kind, dir="f", limit=limit)
        assert [entry[key] for entry in upwards] == sorted(
            names, key=lambda name: (count[name], name)
        )
    by_name = asked.pages(path, path, order_by="name", limit=limit)
    assert [entry[key] for entry in by_name] == names
    assert asked.pages(path, path, order_by="name", dir="b", limit=limit) == by_name[::-1]


@pytest.mark.requirement("E3")
@pytest.mark.parametrize("limit", [1, 4, 7, 500])
def test_events_of_a_room(asked: Asked, limit: int) -> None:
    for number in range(7):
        found = asked.pages(f"rooms/!{number}/events", "events", limit=limit)
        assert [event["event_id"] for event in found] == [
            f"${kind[0]}{n:03}"
            for kind, numbers in asked.kinds.items()
            for n in numbers
            if asked.room(n) == f"!{number}"
        ]
        states = {event["event_id"][1]: event["state"] for event in found}
        assert states.items() <= {"a": "active", "d": "deferred", "p": "parked"}.items()
        # What a PDU says of itself may be anything.
        assert {event["type"] for event in found} <= {None}


@pytest.mark.requirement("E3", "H3")
def test_ids_that_strangers_have_chosen_do_not_end_a_list(asked: Asked, world: World) -> None:
    """As long as an ID may be, and with characters that nobody sees."""
    long = ["$" + f"\u200b{n}".ljust(252, "a") for n in range(3)]
    for n, event_id in enumerate(long):
        sql = "UPDATE synapse_sticky_deferred SET event_id = ?, room_id = '!0' WHERE event_id = ?"
        world.execute(sql, event_id, f"$d{n:03}")
    found = asked.pages("rooms/!0/events", "events", limit=1)
    assert {*long} <= {event["event_id"] for event in found}
    room_ids = ["!" + f"\u200b{n}".ljust(252, "a") for n in range(3)]
    for event_id, room_id in zip(long, room_ids, strict=True):
        sql = "UPDATE synapse_sticky_deferred SET room_id = ? WHERE event_id = ?"
        world.execute(sql, room_id, event_id)
    for order_by in ("deferred", "name"):
        rooms = asked.pages("rooms", "rooms", limit=1, order_by=order_by)
        assert {*room_ids} <= {room["room_id"] for room in rooms}


@pytest.mark.requirement("E3", "L7")
def test_a_held_server_is_not_refused(asked: Asked, world: World, process: ThisProcess) -> None:
    full = asked.server(1)
    for number in range(60):
        asked.defer(number + 100, full)

    def refused() -> set[str]:
        return {s["server"] for s in asked.pages("servers", "servers") if s["is_refused"]}

    def reasons() -> set[str]:
        query = {"server": [full]}
        request = Request("GET", ["events", "$gone"], query, {}, "@admin:here")
        return {reason["code"] for reason in asked.answer(request)["reasons"]}

    assert refused() == {full}
    assert "refused" in reasons()
    now_ms = process.now_ms()
    action = Action("a", "hold", full, None, None, "", "@admin:here", now_ms, now_ms + HOUR_MS)
    world.drive(ActionTable(process).add(action))
    assert refused() == set()
    assert "refused" not in reasons()


@pytest.mark.requirement("E3")
def test_the_overview_counts_all(asked: Asked, world: World) -> None:
    answer = asked.overview()
    assert answer["active"] == {"events": 59, "rooms": len({*map(asked.room, range(59))})}
    assert answer["deferred"]["by_limit"] == {"per_room": 45}
    assert answer["parked"] == {"pdus": 20, "by_reason": {"not recorded": 20}}
    assert answer["actions"] == {"in_force": 0}
    # A duty that never had a table.
    world.execute("DELETE FROM synapse_sticky_layouts WHERE duty = 'deferral'")
    assert asked.overview()["deferred"] is None


@pytest.mark.requirement("E3", "H3")
def test_a_held_server_is_refused_past_its_own_bound(
    asked: Asked, world: World, process: ThisProcess
) -> None:
    """Whatever else is ordered of it."""
    full, now_ms = asked.server(1), process.now_ms()
    for number, kind in enumerate(("exempt", "hold")):
        until = now_ms, now_ms + HOUR_MS
        action = Action(f"{number}", kind, full, None, None, "", "@admin:here", *until)
        world.drive(ActionTable(process).add(action))
    for number in range(600):
        asked.defer(number + 100, full)
    (found,) = [s for s in asked.pages("servers", "servers") if s["server"] == full]
    assert found["is_refused"]


@pytest.mark.requirement("E3")
def test_what_limits_did_lately(asked: Asked) -> None:
    def servers() -> Any:
        answer = asked.answer(Request("GET", ["servers"], {}, {}, "@admin:here"))
        check("servers", answer)
        return answer

    name, lately = asked.server(1), asked.lately
    lately.count("refused", "per_server", "elsewhere", 7)
    answer = servers()
    assert {s["refused_lately"] for s in answer["servers"]} == {"not recorded"}
    assert answer["lately"]["most_refused"] == "not recorded"
    lately.recorded |= {"refused", "deferred"}
    lately.count("refused", "per_server", name, 3)
    lately.count("refused", "max_deferred_per_server", name, 2)
    lately.count("deferred", "per_sender", name, 1)
    answer = servers()
    found = {s["server"]: (s["refused_lately"], s["deferred_lately"]) for s in answer["servers"]}
    counts = {"per_server": 3, "max_deferred_per_server": 2}
    assert found.pop(name) == (counts, {"per_sender": 1})
    assert [*found.values()] == [({}, {})] * len(found)
    # Also of a server of which nothing waits and nothing is sticky.
    most = [(one["server"], one["events"]) for one in answer["lately"]["most_refused"]]
    assert most == [("elsewhere", 7), (name, 5)]
    assert answer["lately"]["process"] == "master"


@pytest.mark.requirement("H3")
def test_few_lists_are_read_at_a_time(asked: Asked, process: ThisProcess) -> None:
    """A few more wait, the others are told to come again. Orders do not wait for lists."""
    paths = ["overview", "rooms", "servers", "rooms/!0/events"]
    process.held = "admin_rooms"
    results = [asked.begin("rooms")]
    process.held = "admin_rooms"
    results.append(asked.begin("rooms"))
    process.forget()
    results += [asked.begin(paths[n % 4]) for n in range(LISTS_WAITING)]
    asked.take_turns()
    assert process.transactions == []
    for path in paths:
        ((failure,),) = (asked.begin(path),)
        error = failure.value
        assert (error.code, error.errcode) == (429, "M_LIMIT_EXCEEDED")
        assert error.headers == {"Retry-After": "1"}
        assert error.error_dict(None)["retry_after_ms"] == 1_000
    assert asked.pages("actions", "actions") == []
    assert not any(results)
    process.release()
    asked.take_turns()
    assert all(result[0][0] == 200 for result in results)
    # And all have their turn again.
    assert asked.pages("rooms", "rooms")


@pytest.mark.requirement("H3")
def test_a_list_that_fails_leaves_its_place(asked: Asked, process: ThisProcess) -> None:
    process.failing = "admin_rooms"
    for _ in range(LISTS_AT_ONCE + LISTS_WAITING + 1):
        (failure,) = asked.answered("rooms")
        assert isinstance(failure.value, ValueError)
    process.failing = None
    ((status, _),) = asked.answered("rooms")
    assert status == 200
