"""What a process serves to the outside."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from synapse.server import HomeServer


def serves(hs: "HomeServer", resource: str) -> bool:
    """Does this process listen for the resource, ``client`` or ``federation``?"""
    is_worker = hs.config.worker.worker_app is not None
    listeners = hs.config.worker.worker_listeners if is_worker else hs.config.server.listeners
    return any(
        resource in served.names
        for listener in listeners
        if (options := getattr(listener, "http_options", None)) is not None
        for served in options.resources
    )
