"""What one process of a homeserver does, by its configuration."""

from typing import TYPE_CHECKING

from synapse_sticky.homeserver.seams import Attribute, attributes

if TYPE_CHECKING:
    from synapse.config.homeserver import HomeServerConfig

_WORKER = "synapse.config.workers.WorkerConfig"
_SERVER = "synapse.config.server.ServerConfig"

SEAMS = (
    *attributes("synapse.config.homeserver.HomeServerConfig", "worker", "server"),
    *attributes(_WORKER, "worker_app", "worker_listeners", "instance_name", "writers"),
    *attributes(_WORKER, "send_federation", "run_background_tasks"),
    Attribute("synapse.config.workers.WriterLocations", "events"),
    *attributes(_SERVER, "listeners", "cleanup_extremities_with_dummy_events"),
    Attribute("synapse.config.server.TCPListenerConfig", "http_options"),
    Attribute("synapse.config.server.UnixListenerConfig", "http_options"),
    Attribute("synapse.config.server.HttpListenerConfig", "resources"),
    Attribute("synapse.config.server.HttpResourceConfig", "names"),
)


class Place:
    """A process, as its configuration has it.

    name: the worker's name, or ``master``.
    sends: whether it sends transactions to other servers.
    writes: whether it persists events.
    is_main: whether it is the main process, which joins rooms and purges them.
    merges: whether it is where Synapse sends dummy events, if it does at all.
    """

    def __init__(self, config: "HomeServerConfig") -> None:
        worker, server = config.worker, config.server
        self.name: str = worker.instance_name
        self.sends: bool = worker.send_federation
        self.writes = self.name in worker.writers.events
        self.is_main = worker.worker_app is None
        self.merges: bool = (
            worker.run_background_tasks and server.cleanup_extremities_with_dummy_events
        )
        listeners = server.listeners if worker.worker_app is None else worker.worker_listeners
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
