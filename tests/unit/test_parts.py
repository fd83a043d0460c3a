"""What a change in Synapse takes away is what needs the changed part, and the log says so (H5)."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synapse.federation.federation_client import FederationClient
from synapse.module_api import ModuleApi
from synapse.rest.client import room as servlets
from synapse.types import MultiWriterStreamToken

from synapse_sticky.cli.check import look
from synapse_sticky.config import StickyConfig, Strict, parse
from synapse_sticky.duties import DUTIES, State
from synapse_sticky.handlers.joins.handler import JoinsHandler
from synapse_sticky.handlers.staging.first_joins.synapse import FirstJoins
from synapse_sticky.homeserver.seams import Attribute, Import, SeamMismatchError
from synapse_sticky.metrics import DUTY
from synapse_sticky.wiring import Wiring
from tests.mutations import with_member
from tests.unit.configuration import Files
from tests.unit.test_in_one_process import make_homeserver
from tests.unit.test_limits_in_synapse import done

pytestmark = [pytest.mark.usefixtures("restored"), pytest.mark.requirement("H5")]

STREAM = Import("synapse.replication.tcp.streams._base", "StickyEventsStream")
FOLLOWING = {"index": "unfit", "joins": "off", "deferral": "unfit", "extremities": "off"}
"""What follows the stream, and what becomes of it without."""


@pytest.fixture
def api(tmp_path: Path) -> ModuleApi:
    return make_homeserver(tmp_path, "parts").get_module_api()


@pytest.fixture
def started(api: ModuleApi) -> Iterator[list[Wiring]]:
    """What was started; it is ended with the test."""
    found: list[Wiring] = []
    yield found
    for wiring in found:
        wiring._homeserver.close()


def start(api: ModuleApi, started: list[Wiring], **config: Any) -> dict[str, str]:
    started.append(Wiring(parse(config), api))
    return {name: state.value for name, state in started[-1].states.items()}


def not_on(states: dict[str, str]) -> dict[str, str]:
    return {name: state for name, state in states.items() if state != "on"}


# The name of the stream


def test_without_the_name_of_the_stream_only_what_follows_it_is_off() -> None:
    """In a process of its own: the files that could read it are loaded anew, without that name."""
    script = f"""
import pathlib, sys, tempfile
from tests.unit.test_in_one_process import make_homeserver
from synapse.replication.tcp.streams import _base
del _base.{STREAM.name}
for file in ("homeserver.stream", "homeserver.tokens", "index.synapse"):
    sys.modules.pop("synapse_sticky." + file, None)
from synapse_sticky.config import parse
from synapse_sticky.wiring import Wiring
with tempfile.TemporaryDirectory() as folder:
    hs = make_homeserver(pathlib.Path(folder), "without")
    states = Wiring(parse({{}}), hs.get_module_api()).states
print({{name: state.value for name, state in states.items() if state.value != "on"}})
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == str(FOLLOWING)


@pytest.mark.requirement("D1", "C1")
def test_without_the_index_delivery_and_visibility_ask_the_database(
    api: ModuleApi, started: list[Wiring], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_member(STREAM)(monkeypatch)
    store: Any = api._hs.get_datastores().main
    token = MultiWriterStreamToken(stream=5)
    asked: list[dict[str, Any]] = []

    async def by_sql(room_ids: Any, **question: Any) -> Any:
        asked.append(question)
        return token, {}

    monkeypatch.setattr(store, "get_sticky_events_in_rooms", by_sql)
    assert not_on(start(api, started)) == FOLLOWING
    question = {"from_token": MultiWriterStreamToken(stream=1), "to_token": token, "now": 5}
    done(store.get_sticky_events_in_rooms(["!room:here"], **question, limit=10))
    assert asked == [{**question, "limit": 10}]

    now_ms = started[0]._homeserver.now_ms()
    rows = {
        "sticky_events": (1, "master", "!room:here", "$event", "@me:here", now_ms + 60_000, 1),
        "event_json": ("$event", "!room:here", "{}", "{}", 1),
        "events": ("$event", "!room:here", "m.room.message", "@me:here", 1, 1, 1, True, False),
    }
    columns = {
        "sticky_events": "stream_id, instance_name, room_id, event_id, sender, expires_at,"
        " event_stream_ordering",
        "event_json": "event_id, room_id, json, internal_metadata, format_version",
        "events": "event_id, room_id, type, sender, stream_ordering, topological_ordering, depth,"
        " processed, outlier",
    }

    def enter(txn: Any) -> None:
        for table, row in rows.items():
            marks = ", ".join("?" * len(row))
            txn.execute(f"INSERT INTO {table} ({columns[table]}) VALUES ({marks})", row)

    done(api.run_db_interaction("enter", enter))
    found = done(started[0]._follower.rows_of(["$event"]))
    assert [row.event_id for row in found.values()] == ["$event"]


# Parts of a duty


def replaced(api: ModuleApi) -> bool:
    """Are local users limited?"""
    return "create_and_send_nonmember_event" in vars(api._hs.get_event_creation_handler())


@pytest.mark.requirement("E1")
def test_what_state_events_need_counts_only_with_them(
    api: ModuleApi,
    started: list[Wiring],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delattr(servlets.RoomStateEventRestServlet, "on_PUT")
    assert not_on(start(api, started)) == {}
    assert replaced(api)
    started.pop()._homeserver.close()
    assert not_on(start(api, started, state_events=True)) == {"sending": "unfit"}
    assert replaced(api)
    assert caplog.text.count("sending (state_events) is off, as this Synapse does not fit: ") == 1
    assert "RoomStateEventRestServlet.on_PUT is not there" in caplog.text
    assert "Without it `state_events` has no effect." in caplog.text


@pytest.mark.requirement("E1")
def test_local_users_are_limited_also_where_the_parameter_cannot_be_checked(
    api: ModuleApi,
    started: list[Wiring],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    files: Files,
) -> None:
    monkeypatch.delattr(servlets.RoomSendEventRestServlet, "_do")
    # What is missing is to be seen, though the rest is done.
    assert not_on(start(api, started)) == {"sending": "unfit"}
    assert DUTY.labels("parts", "sending", "unfit")._value.get() == 1
    assert replaced(api)
    assert caplog.text.count("sending (parameter) is off, as this Synapse does not fit: ") == 1
    started.pop()._homeserver.close()
    with pytest.raises(SeamMismatchError, match=r"sending: parameter: .*_do is not there"):
        Wiring(StickyConfig(strict=Strict.ALL), api)
    report = look([files.write()])
    assert report.exit_code() == 1
    (lack,) = report.duties["sending"].misfits
    assert lack.startswith("parameter: ")
    assert lack.endswith("RoomSendEventRestServlet._do is not there")


@pytest.mark.requirement("S3")
def test_what_the_limit_needs_counts_only_with_limits(
    api: ModuleApi, started: list[Wiring], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(api._hs.get_delayed_events_handler().__class__, "add")
    config: dict[str, Any] = {"local": {"mode": "off"}}
    assert not_on(start(api, started, **config)) == {}
    started.pop()._homeserver.close()
    assert not_on(start(api, started)) == {"sending": "unfit"}
    assert not replaced(api)
    events = api._hs.get_event_creation_handler()
    assert vars(events)["_synapse_sticky_checks_parameter"], "the parameter is checked all the same"


@pytest.mark.requirement("L3", "F3")
@pytest.mark.parametrize("moment", ["check", "install"])
def test_pdus_are_parked_also_where_no_room_can_be_entered_before_it_is_joined(
    api: ModuleApi, started: list[Wiring], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    if moment == "check":
        monkeypatch.delattr(FederationClient, "send_join")
    else:
        monkeypatch.setattr(FirstJoins, "install", property())
    assert not_on(start(api, started)) == {"parking": "unfit"}, "also once its table is there"
    assert "on_receive_pdu" in vars(api._hs.get_federation_event_handler())
    handler = started[0]._homeserver
    assert "synapse_sticky_incomplete" in done(handler.transact("tables", tables_txn))


def tables_txn(txn: Any) -> list[str]:
    txn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    return [name for (name,) in txn.fetchall()]


def test_parking_needs_no_acl(monkeypatch: pytest.MonkeyPatch) -> None:
    """It only asks whether this server is in the room."""
    of_state = "synapse.storage.controllers.state.StateStorageController"
    with_member(Attribute(of_state, "get_server_acl_for_room"))(monkeypatch)
    unfit = {duty.name for duty in DUTIES.values() if duty.misfits()}
    assert unfit == {"visibility", "joins"}


# The start line


@pytest.mark.requirement("H6")
def test_what_still_loads_is_told_as_such(
    api: ModuleApi,
    started: list[Wiring],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The start line, the metric and the lines that come later agree."""
    caplog.set_level(logging.INFO)

    async def cannot(handler: JoinsHandler) -> None:
        raise PermissionError("nobody may read this")

    monkeypatch.setattr(JoinsHandler, "load", cannot)
    states = start(api, started, receipt={"enabled": False})
    lines = [
        record.getMessage() for record in caplog.records if record.name.startswith("synapse_sticky")
    ]
    assert (
        "synapse-sticky runs in master: index, delivery, visibility, pruning, sending, extremities;"
        " loading: sliding, joins, parking, deferral; off: receipt"
    ) in lines
    for duty in ("sliding", "parking", "deferral"):
        assert lines.count(f"{duty} is on") == 1
        assert states[duty] == "on"
    assert "joins is on" not in lines
    assert states["joins"] == State.OFF.value
    assert DUTY.labels("parts", "joins", "off")._value.get() == 1
    assert caplog.text.count("Could not load joins, which is off until then") == 1
