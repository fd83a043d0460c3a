"""Several homeservers in one process, and the end of one: nothing is stacked or stays (H1)."""

import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from synapse.app.homeserver import SynapseHomeServer
from synapse.config.homeserver import HomeServerConfig
from synapse.module_api.errors import ConfigError

from synapse_sticky import StickyEventsModule, plan, wiring
from synapse_sticky.duties import Duty, all_seams
from synapse_sticky.homeserver import Homeserver, process
from synapse_sticky.homeserver.fitting import resolve
from synapse_sticky.homeserver.process import require_sticky_events
from synapse_sticky.homeserver.seams import Method
from synapse_sticky.index.synapse import SynapseStickyStream
from synapse_sticky.metrics import DUTY
from tests.unit.configuration import configuration
from tests.unit.test_limits_in_synapse import Reactor, done, run_synchronously

pytestmark = pytest.mark.usefixtures("restored")

REPLACED = list(
    {
        str(seam): seam for seam in all_seams() if isinstance(seam, Method) and seam.is_replaced
    }.values()
)


class EndingReactor(Reactor):
    """One that a homeserver can take its triggers from."""

    def removeSystemEventTrigger(self, trigger_id: object) -> None:  # noqa: N802
        self.triggers.clear()


def make_homeserver(folder: Path, name: str) -> SynapseHomeServer:
    config = HomeServerConfig()
    options = configuration(folder, name, "client", "federation")
    # Some of it is replaced only then.
    config.parse_config_dict({**options, "retention": {"enabled": True}}, "", "")
    return set_up(config)


def set_up(config: HomeServerConfig) -> SynapseHomeServer:
    reactor: Any = EndingReactor()  # type: ignore[no-untyped-call]
    hs = SynapseHomeServer(config.server.server_name, config=config, reactor=reactor)
    hs.setup()
    run_synchronously(hs)
    return hs


def load_module(hs: SynapseHomeServer) -> None:
    StickyEventsModule(StickyEventsModule.parse_config({"state_events": True}), hs.get_module_api())


def replaced_on(hs: Any) -> dict[tuple[str, str], Any]:
    """What of this homeserver's own objects was replaced, by class and name."""
    owners = (
        *(hs.get_datastores().main, hs.get_federation_server(), hs.get_event_creation_handler()),
        *(hs.get_notifier(), hs.get_event_client_serializer()),
        *(
            hs.get_federation_event_handler(),
            hs.get_sync_handler(),
            hs.get_delayed_events_handler(),
        ),
        *(hs.get_sliding_sync_handler(), hs.get_sliding_sync_handler().extensions),
        *(
            hs.get_storage_controllers().persistence._event_persist_queue,
            hs.get_federation_transport_client(),
            hs.get_notifier(),
            hs.get_federation_client(),
            hs.get_event_client_serializer(),
        ),
        *(*hs.get_datastores().databases, hs.get_datastores().persist_events),
    )
    names = {seam.name for seam in REPLACED}
    return {
        (type(o).__name__, name): vars(o)[name] for o in owners for name in names & vars(o).keys()
    }


@pytest.mark.requirement("H1")
def test_each_has_its_own_and_none_is_stacked(tmp_path: Path) -> None:
    servers = [make_homeserver(tmp_path, name) for name in ("one", "two")]
    for hs in servers:
        load_module(hs)
    now = {seam: getattr_static(seam) for seam in REPLACED}
    shared = {seam: now[seam] for seam in REPLACED if id(now[seam]) != ORIGINALS[seam]}
    for function in shared.values():
        # One wrapper a process: what it wraps is Synapse's own.
        wrapper = getattr(function, "__func__", function)
        assert not hasattr(wrapper.__wrapped__, "__wrapped__")
    found = [replaced_on(hs) for hs in servers]
    assert found[0].keys() == found[1].keys()
    # One may be declared by several parts.
    assert len(found[0]) + len(shared) == len({(seam.owner, seam.name) for seam in REPLACED})
    for (owner, name), function in found[0].items():
        assert function is not found[1][owner, name]
        assert function.__name__ == name
        assert inspect.signature(function) == inspect.signature(function.__wrapped__)


def getattr_static(seam: Method) -> Any:
    return inspect.getattr_static(resolve(seam.owner), seam.name)


# From before any test: what a process shares stays replaced. Not the functions themselves: one that
# somebody holds is not replaced.
ORIGINALS = {seam: id(getattr_static(seam)) for seam in REPLACED}


@pytest.mark.requirement("H1")
def test_after_its_shutdown_it_is_let_go_and_the_other_goes_on(tmp_path: Path) -> None:
    going, staying = (make_homeserver(tmp_path, name) for name in ("going", "staying"))
    for hs in (going, staying):
        load_module(hs)
    before = replaced_on(staying)
    assert replaced_on(going)
    assert is_shown("going")
    done(going.shutdown())
    assert not is_shown("going")
    assert is_shown("staying")
    assert replaced_on(going) == {}
    assert entries_on(going) == set()
    assert replaced_on(staying) == before
    assert entries_on(staying)
    # What the process shares knows neither of them.
    for seam in REPLACED:
        for cell in getattr(getattr_static(seam), "__closure__", None) or ():
            assert not isinstance(cell.cell_contents, Homeserver | SynapseHomeServer)
    # No timer of the module's is left either: Synapse cancels those that it knows of.
    reactor: Any = going.get_reactor()
    assert not reactor.getDelayedCalls()


def is_shown(server_name: str) -> bool:
    """Do the metrics say that it has duties?"""
    labels = {"server_name": server_name, "duty": "delivery", "state": "on"}
    return REGISTRY.get_sample_value("synapse_sticky_duty", labels) == 1


def entries_on(hs: Any) -> set[str]:
    """What functions that all homeservers share find on this one's objects."""
    owners = (
        *(hs.get_datastores().main, hs.get_storage_controllers()),
        *(hs.get_event_creation_handler(), hs.get_federation_event_handler()),
    )
    return {name for o in owners for name in vars(o) if name.startswith("_synapse_sticky_")}


@pytest.mark.requirement("E4", "L3")
def test_while_the_process_ends_the_duties_are_done(tmp_path: Path) -> None:
    """Synapse processes events until its own handlers of the phase before have ended."""
    hs = make_homeserver(tmp_path, "ending")
    load_module(hs)
    before = replaced_on(hs)
    reactor: Any = hs.get_reactor()
    for function, args, options in reactor.triggers["before"]["shutdown"]:
        function(*args, **options)
    assert replaced_on(hs) == before
    for function, args, options in reactor.triggers["after"]["shutdown"]:
        function(*args, **options)
    assert replaced_on(hs) == {}


@pytest.mark.requirement("H1")
def test_what_another_module_put_there_before_stays(tmp_path: Path) -> None:
    hs = make_homeserver(tmp_path, "shared")
    store: Any = hs.get_datastores().main
    original = store.prune_staged_events_in_room

    async def of_another(*args: Any, **options: Any) -> Any:
        return await original(*args, **options)

    store.prune_staged_events_in_room = of_another
    load_module(hs)
    assert store.prune_staged_events_in_room is not of_another
    done(hs.shutdown())
    assert store.prune_staged_events_in_room is of_another


@pytest.mark.requirement("H2")
def test_listed_twice_it_stops_the_start(tmp_path: Path) -> None:
    hs = make_homeserver(tmp_path, "twice")
    load_module(hs)
    with pytest.raises(ConfigError, match="listed twice"):
        load_module(hs)


@pytest.mark.requirement("H5")
def test_what_nobody_thought_of_does_not_stop_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hs = make_homeserver(tmp_path, "odd")

    def fails(duty: Duty, *args: Any) -> plan.Decision:
        if duty.name == "extremities":
            raise RuntimeError("nobody thought of this")
        return plan.decide(duty, *args)

    monkeypatch.setattr(wiring, "decide", fails)
    load_module(hs)
    assert replaced_on(hs) == {}
    assert entries_on(hs) == set()
    assert caplog.text.count("synapse-sticky is off: ") == 1
    assert DUTY.labels("odd", "extremities", "unfit")._value.get() == 1
    assert DUTY.labels("odd", "access", "unfit")._value.get() == 1
    with pytest.raises(ConfigError, match="nobody thought of this"):
        StickyEventsModule(StickyEventsModule.parse_config({"strict": True}), hs.get_module_api())
    assert replaced_on(hs) == {}


@pytest.mark.requirement("H5", "S5")
def test_an_index_that_is_half_installed_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hs = make_homeserver(tmp_path, "half")

    def fails(stream: Any, callback: Any) -> None:
        raise AttributeError("no such hook")

    monkeypatch.setattr(SynapseStickyStream, "on_persisted", fails)
    api = hs.get_module_api()
    module = StickyEventsModule(StickyEventsModule.parse_config({}), api)
    states = {name: state.value for name, state in module._wiring.states.items()}
    assert states["index"] == "unfit"
    assert states["joins"] == states["extremities"] == "off"
    assert states["delivery"] == states["visibility"] == states["deferral"] == "on"
    assert caplog.text.count("index is off, as this Synapse does not fit: ") == 1
    hs.get_notifier().notify_replication()
    assert not module._wiring._follower.in_step()


@pytest.mark.requirement("H5")
@pytest.mark.parametrize(
    ("owner", "name", "off"),
    [
        ("synapse.api.constants.StickyEvent", "EVENT_FIELD_NAME", "receipt"),
        ("synapse.http.client", "BodyExceededMaxSize", "joins"),
        ("synapse.types", "StreamKeyType", "deferral"),
    ],
)
def test_a_name_that_is_gone_is_one_dutys_misfit(owner: str, name: str, off: str) -> None:
    """In a process of its own: what is imported once stays imported."""
    script = f"""
import importlib
from synapse.app import homeserver
from synapse_sticky.index.synapse import SynapseStickyStream
from synapse_sticky.homeserver.fitting import resolve
delattr(resolve({owner!r}), {name!r})
from synapse_sticky.duties import DUTIES, shared_misfits
assert shared_misfits() == []
print(*(duty.name for duty in DUTIES.values() if duty.misfits()))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    unfit = run.stdout.split()
    assert off in unfit
    assert "index" not in unfit
    assert "delivery" not in unfit


@pytest.mark.requirement("H5")
def test_a_part_of_an_imported_name_that_is_gone() -> None:
    """A file reads it as it is loaded, and not later, in the dark."""
    gone = {
        "delivery": "synapse.api.constants.EventUnsignedContentFields.STICKY_TTL",
        "sliding": "synapse.types.handlers.sliding_sync.SlidingSyncResult.Extensions",
        "index": "synapse.replication.tcp.streams._base.StickyEventsStream.NAME",
    }
    script = f"""
from synapse.app import homeserver
from synapse_sticky.homeserver.fitting import resolve
for path in {list(gone.values())!r}:
    owner, _, name = path.rpartition(".")
    delattr(resolve(owner), name)
from synapse_sticky.duties import DUTIES, shared_misfits
assert shared_misfits() == []
print(*(duty.name for duty in DUTIES.values() if duty.misfits()))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    unfit = set(run.stdout.split())
    assert gone.keys() <= unfit
    assert "sending" not in unfit


@pytest.mark.requirement("H5")
@pytest.mark.parametrize("version", ["1.163.0rc1", "1.163.0", "1.170.2", "2.0", "our own build"])
def test_a_synapse_in_which_the_feature_is_stable_is_not_too_old(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no option for it any more."""
    monkeypatch.setattr(process, "synapse_version", lambda: version)
    config: Any = SimpleNamespace(experimental=SimpleNamespace())
    require_sticky_events(config)
    config.experimental.msc4354_enabled = False
    with pytest.raises(ConfigError, match="msc4354_enabled: true"):
        require_sticky_events(config)


@pytest.mark.parametrize("version", ["1.162.9", "1.99.0"])
def test_a_synapse_that_is_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "synapse_version", lambda: version)
    config: Any = SimpleNamespace(experimental=SimpleNamespace(msc4354_enabled=True))
    with pytest.raises(ConfigError, match=rf"needs Synapse 1\.163 or later, this is {version}"):
        require_sticky_events(config)
