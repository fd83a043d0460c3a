"""``synapse-sticky check``: what it says of a Synapse and a configuration, and its exit code."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from synapse_sticky import plan
from synapse_sticky.cli import main
from synapse_sticky.cli.check import look
from synapse_sticky.cli.report import Report
from synapse_sticky.config import DUTIES
from synapse_sticky.duties import State
from synapse_sticky.homeserver import access, process
from synapse_sticky.homeserver.fitting import resolve
from synapse_sticky.homeserver.seams import STORE, Method
from tests.unit.configuration import configuration
from tests.unit.test_mutations import put, stand_in

pytestmark = pytest.mark.requirement("H5")

OWN_TABLES = (
    "CREATE TABLE synapse_sticky_layouts (duty TEXT NOT NULL PRIMARY KEY, version BIGINT NOT NULL)"
)


class Files:
    """A homeserver's configuration, in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options = {
            **configuration(folder, "here", "client", "federation"),
            "modules": [{"module": "synapse_sticky.StickyEventsModule", "config": {}}],
        }
        self.database = Path(self.options["database"]["args"]["database"])

    def write(self, **options: Any) -> str:
        """Writes homeserver.yaml, with these options in place of others, and gives its path."""
        path = self.folder / "homeserver.yaml"
        path.write_text(yaml.safe_dump({**self.options, **options}))
        return str(path)

    def write_worker(self, name: str, **options: Any) -> str:
        path = self.folder / f"{name}.yaml"
        common = {"worker_app": "synapse.app.generic_worker", "worker_name": name}
        path.write_text(yaml.safe_dump({**common, **options}))
        return str(path)

    def with_module(self, **config: Any) -> str:
        modules = [{"module": "synapse_sticky.StickyEventsModule", "config": config}]
        return self.write(modules=modules)


def listener(*resources: str) -> dict[str, Any]:
    return {"port": 8008, "type": "http", "tls": False, "resources": [{"names": [*resources]}]}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def states(report: Report) -> dict[str, State]:
    return {name: decision.state for name, decision in report.duties.items()}


def gone(monkeypatch: pytest.MonkeyPatch, *seams: Method) -> None:
    for seam in seams:
        put(monkeypatch, seam.owner, stand_in(resolve(seam.owner), seam.name))


def replaced_in(layer: str) -> Method:
    return next(s for s in access.SEAMS[layer] if isinstance(s, Method) and s.is_replaced)


JOINS = Method("synapse.federation.sender.FederationSender", "_get_per_destination_queue")


def test_all_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    said = capsys.readouterr().out
    assert "joins        on" in said
    assert "private parts of Synapse" in said
    assert said.endswith("All is well.\n")


def test_as_json(capsys: pytest.CaptureFixture[str], files: Files) -> None:
    assert main(["check", "--json", "-c", files.write()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: duty["state"] for name, duty in found["duties"].items()} == dict.fromkeys(
        DUTIES, "on"
    )
    assert found["access"] == {"state": "on", "misfits": []}
    assert found["seams"] > 100
    assert found["processes"] == {"master": [*DUTIES]}
    assert (found["problems"], found["stops"], found["exit_code"]) == ([], [], 0)


def test_it_starts_and_changes_nothing(files: Files) -> None:
    (files.folder / "media").mkdir()  # Synapse makes it when it reads its configuration
    before = sorted(files.folder.iterdir())
    path = files.write()
    assert look([path]).exit_code() == 0
    assert sorted(files.folder.iterdir()) == sorted([*before, Path(path)])


def test_as_a_program(tmp_path: Path) -> None:
    """Also where Synapse has changed: it is what an upgrade would bring."""
    changed = tmp_path / "changed.py"
    changed.write_text(
        "import sys\n"
        "from synapse.federation.sender import FederationSender\n"
        "del FederationSender._get_per_destination_queue\n"
        "from synapse_sticky.cli import main\n"
        "sys.exit(main())\n"
    )
    for program, code in (["-m", "synapse_sticky"], 0), ([str(changed)], 1):
        run = subprocess.run(
            [sys.executable, *program, "check"], capture_output=True, text=True, check=False
        )
        assert run.returncode == code, run.stderr
        assert ("joins        on" in run.stdout) is (code == 0)


def test_a_duty_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    gone(monkeypatch, JOINS)
    report = look([])
    assert report.exit_code() == 1
    assert {n for n, state in states(report).items() if state is not State.ON} == {"joins"}
    lines = list(report.lines())
    assert "joins        unfit, as this Synapse does not fit:" in lines
    assert any(line.endswith("_get_per_destination_queue is not there") for line in lines)


@pytest.mark.requirement("D7")
def test_a_part_of_a_duty_that_does_not_fit(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    gone(monkeypatch, Method(STORE, "get_next_staged_event_for_room"))
    report = look([])
    assert report.exit_code() == 1
    assert set(states(report).values()) == {State.ON}
    lines = list(report.lines())
    at = lines.index(f"{'':12} but its part turns is off, as this Synapse does not fit:")
    assert lines[at - 1].split() == ["pruning", "on"]
    assert lines[at + 1].endswith("get_next_staged_event_for_room is not there")
    found = json.loads(report.as_json())["duties"]
    assert list(found["pruning"]["parts_off"]) == ["turns"]
    # With `strict` it stops the start, and the reason is said.
    (stop,) = look([files.with_module(strict=True)]).stops
    assert "get_next_staged_event_for_room is not there" in stop
    assert not look([files.with_module(strict="access")]).stops
    # With its duty it is off, and nothing is missing.
    report = look([files.with_module(strict=True, pruning={"enabled": False})])
    assert (report.exit_code(), report.stops) == (0, [])


@pytest.mark.requirement("D8")
def test_sections_that_nobody_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    gone(monkeypatch, replaced_in("sync_section"))
    assert look([]).exit_code() == 0
    gone(monkeypatch, replaced_in("sync_response"))
    report = look([])
    assert states(report)[plan.ACCESS] is State.UNFIT
    assert report.exit_code() == 2


@pytest.mark.requirement("D8")
def test_what_every_duty_needs_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    gone(monkeypatch, Method("synapse.server.HomeServer", "register_sync_shutdown_handler"))
    report = look([])
    assert set(states(report).values()) == {State.UNFIT}
    assert report.exit_code() == 2, "nobody guards the sections"


def test_strict(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    gone(monkeypatch, JOINS)
    for strict, code in ((False, 1), ("access", 1), (True, 2)):
        report = look([files.with_module(strict=strict)])
        assert report.exit_code() == code
        assert bool(report.stops) is (code == 2)


def test_a_duty_that_is_left_to_synapse(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    gone(monkeypatch, JOINS)
    report = look([files.with_module(native=["joins"])])
    assert states(report)["joins"] is State.NATIVE
    assert report.exit_code() == 0


@pytest.mark.requirement("H6")
def test_a_duty_that_is_off_and_what_needs_it(files: Files) -> None:
    report = look([files.with_module(sending={"enabled": False})])
    assert (states(report)["sending"], report.exit_code()) == (State.OFF, 0)
    report = look([files.with_module(index={"enabled": False})])
    assert {n for n, s in states(report).items() if s is State.OFF} == {
        "index",
        "joins",
        "extremities",
    }
    assert "joins        off, as it needs index" in list(report.lines())
    assert report.exit_code() == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"experimental_features": {}}, "msc4354_enabled: true"),
        ({"server_name": None}, "Invalid server name"),
        (
            {
                "modules": [
                    {
                        "module": "synapse_sticky.StickyEventsModule",
                        "config": {"joins": {"windwo": 3}},
                    }
                ]
            },
            "config.joins.windwo): joins.windwo is no option; did you mean 'window'?",
        ),
    ],
)
def test_a_configuration_that_synapse_or_the_module_refuses(
    files: Files, options: dict[str, Any], said: str
) -> None:
    report = look([files.write(**options)])
    (stop,) = report.stops
    assert said in stop
    assert report.exit_code() == 2


def test_a_file_that_is_not_there(files: Files) -> None:
    report = look([str(files.folder / "gone.yaml")])
    assert "gone.yaml" in report.stops[0]
    assert report.exit_code() == 2


def test_a_configuration_without_the_module(files: Files) -> None:
    report = look([files.write(modules=[])])
    assert "not listed under `modules:`" in report.problems[0]
    assert (report.processes, report.exit_code()) == ({}, 1)


def test_what_runs_in_which_process(files: Files) -> None:
    shared = files.write(
        listeners=[listener("client")],
        instance_map={
            "main": {"host": "127.0.0.1", "port": 1},
            "writer": {"host": "127.0.0.1", "port": 2},
        },
        stream_writers={"events": ["writer"]},
        federation_sender_instances=["sender"],
        redis={"enabled": True},
        worker_replication_secret="secret",
    )
    workers = [
        files.write_worker("writer", worker_listeners=[listener("replication")]),
        files.write_worker("sender", worker_listeners=[]),
        files.write_worker("receiver", worker_listeners=[listener("federation")]),
    ]
    found = look([shared, *workers]).processes
    everywhere = {"index", "delivery", "visibility", "pruning", "parking"}
    assert {name: {*duties} - everywhere for name, duties in found.items()} == {
        "master": {"sliding", "sending", "extremities"},
        "writer": {"deferral"},
        "sender": {"joins"},
        "receiver": {"receipt"},
    }
    assert all(everywhere <= {*duties} for duties in found.values())


def test_the_database(files: Files) -> None:
    path = files.write()
    connection = sqlite3.connect(files.database)
    connection.execute(OWN_TABLES)
    connection.execute("INSERT INTO synapse_sticky_layouts VALUES ('parking', 1), ('joins', 99)")
    connection.commit()
    report = look([path])
    (problem,) = report.problems
    assert problem.startswith("the tables of joins have layout 99")
    # It has no table of Synapse's either.
    assert states(report)["extremities"] is State.OFF
    assert "table sticky_events is not there" in report.duties["index"].misfits
    assert states(report)["sending"] is State.ON
    assert report.exit_code() == 1


def test_a_database_that_cannot_be_read(files: Files) -> None:
    path = files.write()
    files.database.write_bytes(b"no database at all, but long enough to be taken for one" * 20)
    report = look([path])
    assert "its database cannot be read" in report.stops[0]
    assert report.exit_code() == 2


def test_a_synapse_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "synapse_version", lambda: "1.162.0")
    report = look([])
    assert "needs Synapse 1.163 or later" in report.stops[0]
    assert report.exit_code() == 2
