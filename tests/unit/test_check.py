"""``synapse-sticky check``: what it says of a Synapse and a configuration, and its exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from synapse.config.homeserver import HomeServerConfig
from synapse.module_api.errors import ConfigError

from synapse_sticky import plan
from synapse_sticky.cli import main
from synapse_sticky.cli.check import look
from synapse_sticky.cli.report import Report
from synapse_sticky.config import DUTIES
from synapse_sticky.duties import State
from synapse_sticky.homeserver import access, process
from synapse_sticky.homeserver.fitting import resolve
from synapse_sticky.homeserver.seams import STORE, Method
from tests.mutations import put, stand_in
from tests.unit.configuration import Files
from tests.unit.test_in_one_process import set_up

pytestmark = pytest.mark.requirement("H5")


def listener(*resources: str) -> dict[str, Any]:
    return {"port": 8008, "type": "http", "tls": False, "resources": [{"names": [*resources]}]}


def states(report: Report) -> dict[str, State]:
    return {name: decision.state for name, decision in report.decisions().items()}


def gone(monkeypatch: pytest.MonkeyPatch, *seams: Method) -> None:
    for seam in seams:
        put(monkeypatch, seam.owner, stand_in(resolve(seam.owner), seam.name))


def start(path: str) -> list[Any]:
    """Loads the modules of the configuration into a homeserver, as Synapse does at its start."""
    hs = set_up(HomeServerConfig.load_config("start", ["-c", path]))
    api = hs.get_module_api()
    return [module(config, api) for module, config in hs.config.modules.loaded_modules]


def replaced_in(layer: str) -> Method:
    return next(s for s in access.SEAMS[layer] if isinstance(s, Method) and s.is_replaced)


JOINS = Method("synapse.federation.sender.FederationSender", "_get_per_destination_queue")
EMPTY = (
    "Synapse has not made or migrated its tables in this database yet. What is said of the duties"
    " goes by the tables that this Synapse makes in a new SQLite database."
)
WITH_WORKERS = {
    "instance_map": {name: {"host": "127.0.0.1", "port": 1} for name in ("main", "writer")},
    "redis": {"enabled": True},
    "worker_replication_secret": "secret",
}


def test_all_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    said = capsys.readouterr().out
    assert "joins        on" in said
    assert "private parts of Synapse" in said
    assert "All is well" in said.splitlines()[-1]


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


def test_what_no_part_can_be_loaded_without(tmp_path: Path) -> None:
    """Nothing of the module runs then, and so nobody guards the sections."""
    changed = tmp_path / "changed.py"
    changed.write_text(
        "import sys\n"
        "from synapse.app import homeserver\n"
        "from synapse.logging import context\n"
        "del context.PreserveLoggingContext\n"
        "from synapse_sticky.cli import main\n"
        "sys.exit(main())\n"
    )
    command = [sys.executable, str(changed), "check", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    (problem,) = json.loads(run.stdout)["problems"]
    assert "cannot import name 'PreserveLoggingContext'" in problem
    assert run.returncode == 2


def test_a_reader_that_has_seen_enough() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "synapse_sticky", "check"]
        run = subprocess.run(
            command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writing)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_duty_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    gone(monkeypatch, JOINS)
    report = look([])
    assert report.exit_code() == 1
    assert {n for n, state in states(report).items() if state is not State.ON} == {"joins"}
    lines = list(report.lines())
    assert "joins        unfit, as this Synapse lacks what it needs:" in lines
    assert any(line.endswith("_get_per_destination_queue is not there") for line in lines)


@pytest.mark.requirement("D7")
def test_a_part_of_a_duty_that_does_not_fit(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    gone(monkeypatch, Method(STORE, "get_next_staged_event_for_room"))
    report = look([])
    assert report.exit_code() == 1
    assert {n for n, state in states(report).items() if state is not State.ON} == {"pruning"}
    (problem,) = report.duties["pruning"].misfits
    assert problem.startswith("turns: ")
    assert problem.endswith("get_next_staged_event_for_room is not there")
    # With `strict` it stops the start, and the reason is said.
    (stop,) = look([files.with_module(strict=True)]).stops
    assert "get_next_staged_event_for_room is not there" in stop
    assert not look([files.with_module(strict="access")]).stops
    # With its duty it is off, and nothing is missing.
    report = look([files.with_module(strict=True, pruning={"enabled": False})])
    assert (report.exit_code(), report.stops) == (0, [])


@pytest.mark.requirement("D8")
def test_sections_that_nobody_guards(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    gone(monkeypatch, replaced_in("sync_section"))
    assert look([]).exit_code() == 0
    gone(monkeypatch, replaced_in("sync_response"))
    report = look([])
    assert states(report)[plan.ACCESS] is State.UNFIT
    assert report.exit_code() == 2
    nobody_asks = look([files.write(listeners=[])])
    assert (nobody_asks.idle.count(plan.ACCESS), nobody_asks.exit_code()) == (1, 0)


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


@pytest.mark.parametrize(
    ("senders", "code"), [(["master"], 2), ([], 0)], ids=["it would run", "it would not"]
)
@pytest.mark.usefixtures("restored")
def test_strict_and_a_duty_of_no_process(
    files: Files, monkeypatch: pytest.MonkeyPatch, senders: list[str], code: int
) -> None:
    """The start does not look at it either."""
    monkeypatch.delattr(JOINS.owner + "." + JOINS.name)
    modules = [{"module": "synapse_sticky.StickyEventsModule", "config": {"strict": True}}]
    path = files.write(
        modules=modules,
        federation_sender_instances=senders,
        **WITH_WORKERS,
    )
    report = look([path, files.write_worker("writer")])
    assert states(report)["joins"] is State.UNFIT
    assert (bool(report.stops), report.exit_code()) == (bool(code), code)
    assert report.remarks == [EMPTY]
    assert ("joins" in report.idle) is (code == 0)
    says_so = any("no process of this configuration does this" in s for s in report.lines())
    assert says_so is (code == 0)
    assert ("idle" in json.loads(report.as_json())["duties"]["joins"]) is (code == 0)
    if code:
        with pytest.raises(ConfigError, match="joins: "):
            start(path)
    else:
        start(path)


@pytest.mark.parametrize(
    ("options", "given", "not_given"),
    [
        # One process, which does whatever is done.
        ({}, [], None),
        (WITH_WORKERS, [], "writer"),
        (WITH_WORKERS, ["writer"], None),
        ({**WITH_WORKERS, "stream_writers": {"events": "writer"}}, ["other"], "writer"),
        ({"federation_sender_instances": ["a", "b", "master"]}, [], "a, b"),
        ({"pusher_instances": ["a"], "run_background_tasks_on": "b"}, [], "a, b"),
        ({"notify_appservices_from_worker": "a", "run_background_tasks_on": "main"}, [], "a"),
        # Workers that only serve requests are named nowhere.
        ({"redis": {"enabled": True}}, [], "all workers"),
        ({"redis": {"enabled": False}}, [], None),
        ({"instance_map": {"main": {"host": "127.0.0.1", "port": 1}}}, [], "all workers"),
    ],
    ids=str,
)
def test_workers_whose_files_were_not_given(
    files: Files, options: dict[str, Any], given: list[str], not_given: str | None
) -> None:
    """What may run there is judged as if it ran."""
    path = files.write(listeners=[], **options)
    report = look([path, *(files.write_worker(name) for name in given)])
    said = f"the files of these processes were not given: {not_given}. What may run there is"
    assert [r.startswith(said) for r in report.remarks if r != EMPTY] == [True] * bool(not_given)
    assert (plan.ACCESS in report.idle) is (not_given is None)
    assert (report.problems, report.exit_code()) == ([], 0)


@pytest.mark.requirement("D8")
@pytest.mark.parametrize("folder", [False, True])
def test_sections_that_nobody_guards_in_a_worker(
    files: Files, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    gone(monkeypatch, replaced_in("sliding_section"), replaced_in("sliding_response"))
    path = files.write(listeners=[listener("federation")], **WITH_WORKERS)
    report = look([str(files.folder) if folder else path])
    assert (states(report)[plan.ACCESS], report.exit_code()) == (State.UNFIT, 2)
    assert any("were not given: writer." in line for line in report.lines())
    serving = files.write_worker("writer", worker_listeners=[listener("client")])
    assert look([path, serving]).exit_code() == 2
    serving_nobody = look([path, files.write_worker("writer")])
    assert (serving_nobody.idle.count(plan.ACCESS), serving_nobody.exit_code()) == (1, 0)


def test_strict_and_a_worker_whose_file_was_not_given(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its start would stop."""
    gone(monkeypatch, JOINS)
    modules = [{"module": "synapse_sticky.StickyEventsModule", "config": {"strict": True}}]
    report = look([files.write(modules=modules, federation_sender_instances=["elsewhere"])])
    assert "joins: " in report.stops[0]
    assert report.exit_code() == 2


def test_a_duty_that_is_left_to_synapse(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    gone(monkeypatch, JOINS)
    report = look([files.with_module(native=["joins"])])
    assert states(report)["joins"] is State.NATIVE
    assert report.exit_code() == 0


@pytest.mark.requirement("H6")
def test_a_duty_that_is_off_and_what_needs_it(files: Files) -> None:
    report = look([files.with_module(sending={"enabled": False})])
    assert (states(report)["sending"], report.exit_code()) == (State.OFF, 0)
    assert "sending      off, by the configuration" in list(report.lines())
    report = look([files.with_module(native=["delivery"], sliding={"enabled": False})])
    assert "delivery     native, left to Synapse" in list(report.lines())
    assert "access       on" in list(report.lines())
    report = look([files.with_module(native=["delivery", "sliding"])])
    assert "access       off, as delivery and sliding are left to Synapse" in list(report.lines())
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


@pytest.mark.parametrize("what", ["a folder without files", "the file of a worker alone"])
def test_a_configuration_that_is_not_whole(
    files: Files, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """Synapse ends with its usage where it is given no file at all."""
    if what == "a folder without files":
        path, said = str(files.folder), "Must supply a config file."
    else:
        path, said = files.write_worker("worker"), "Missing mandatory `server_name` config option."
    assert main(["check", "-c", path]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert f"Synapse would not start: the configuration ({path}) is wrong: {said}" in lines


class Exiting:
    """A module that ends the process where it should raise an error."""

    @staticmethod
    def parse_config(config: object) -> None:
        sys.exit("no such thing")


def test_another_module_ends_the_process(files: Files) -> None:
    report = look([files.write(modules=[{"module": f"{__name__}.Exiting"}])])
    assert report.stops[0].endswith("homeserver.yaml) is wrong: no such thing")
    assert report.exit_code() == 2


def test_a_worker_whose_file_has_everything(files: Files) -> None:
    path = files.write_worker(
        "worker",
        **files.options,
        worker_listeners=[listener("client")],
        **WITH_WORKERS,
    )
    report = look([path])
    assert report.stops == []
    assert "sliding" in report.processes["worker"]
    assert any("were not given: master, writer." in remark for remark in report.remarks)


def test_what_synapse_prints_is_not_mixed_in(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    (files.folder / "notes.txt").write_text("Synapse says that it ignores this file.")
    files.write()
    assert main(["check", "--json", "-c", str(files.folder)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["stops"] == []
    assert "notes.txt" in printed.err


@pytest.mark.requirement("H2")
@pytest.mark.usefixtures("restored")
def test_the_module_is_listed_twice(files: Files) -> None:
    path = files.write(modules=2 * files.options["modules"])
    report = look([path])
    (stop,) = report.stops
    assert "synapse_sticky.StickyEventsModule is listed twice in `modules:`" in stop
    assert report.exit_code() == 2
    with pytest.raises(ConfigError, match="listed twice"):
        start(path)


def test_a_configuration_without_the_module(files: Files) -> None:
    report = look([files.write(modules=[])])
    assert "not listed under `modules:`" in report.problems[0]
    assert (report.processes, report.exit_code()) == ({}, 1)
    report = look([files.write(modules=[], experimental_features={})])
    assert report.stops == [], "Synapse starts without the module"


def test_what_runs_in_which_process(files: Files) -> None:
    shared = files.write(
        listeners=[listener("client")],
        **WITH_WORKERS,
        stream_writers={"events": ["writer"]},
        federation_sender_instances=["sender"],
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


def test_a_synapse_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "synapse_version", lambda: "1.162.0")
    report = look([])
    assert "needs Synapse 1.163 or later" in report.stops[0]
    assert report.exit_code() == 2
