"""What one process of a homeserver does, by its configuration."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attr
from synapse.module_api import ModuleApi

from synapse_sticky.homeserver.seams import Attribute, attributes

if TYPE_CHECKING:
    from synapse.config.homeserver import HomeServerConfig

_WORKER = "synapse.config.workers.WorkerConfig"
_SERVER = "synapse.config.server.ServerConfig"

SEAMS = (
    *attributes("synapse.config.homeserver.HomeServerConfig", "worker", "server"),
    *attributes(_WORKER, "worker_listeners", "writers", "send_federation"),
    Attribute("synapse.config.workers.WriterLocations", "events"),
    *attributes(_SERVER, "listeners", "cleanup_extremities_with_dummy_events"),
    Attribute("synapse.config.server.TCPListenerConfig", "http_options"),
    Attribute("synapse.config.server.UnixListenerConfig", "http_options"),
    Attribute("synapse.config.server.HttpListenerConfig", "resources"),
    Attribute("synapse.config.server.HttpResourceConfig", "names"),
)


_MAIN = "master"
_MAIN_APP = "synapse.app.homeserver"
"""The main process, where an option names it."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Process:
    """Which process it is.

    name: the worker's name, or ``master``.
    is_main: whether it is the main process.
    has_background_tasks: whether Synapse does there what one process does for all.
    """

    name: str
    is_main: bool
    has_background_tasks: bool

    @classmethod
    def running(cls, api: ModuleApi) -> "Process":
        """This one."""
        has_background_tasks = api.should_run_background_tasks()
        return cls(api.worker_name or _MAIN, api.worker_app is None, has_background_tasks)

    @classmethod
    def with_options(cls, options: Mapping[str, Any]) -> "Process":
        """One that has these options of homeserver.yaml, and of the worker's own file."""
        app = options.get("worker_app")
        app = None if app == _MAIN_APP else app
        name = options.get("worker_name", app) or _MAIN
        return cls(name, app is None, name == (options.get("run_background_tasks_on") or _MAIN))


class Place:
    """A process, as its configuration has it.

    name: the worker's name, or ``master``.
    sends: whether it sends transactions to other servers.
    writes: whether it persists events.
    is_main: whether it is the main process, which joins rooms and purges them.
    merges: whether it is where Synapse sends dummy events, if it does at all.
    """

    def __init__(self, config: "HomeServerConfig", process: Process) -> None:
        worker, server = config.worker, config.server
        self.name = process.name
        self.sends: bool = worker.send_federation
        self.writes = self.name in worker.writers.events
        self.is_main = process.is_main
        self.merges: bool = (
            process.has_background_tasks and server.cleanup_extremities_with_dummy_events
        )
        listeners = server.listeners if self.is_main else worker.worker_listeners
        self._resources = {
            name
            for listener in listeners
            if listener.http_options is not None
            for served in listener.http_options.resources
            for name in served.names
        }

    def serves(self, resource: str) -> bool:
        """Does it listen for the resource, ``client`` or ``federation``?"""
        return resource in self._resources
