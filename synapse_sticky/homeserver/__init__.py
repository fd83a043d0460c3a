"""What all duties share of the running homeserver, in this project's words."""

from synapse_sticky.homeserver.process import Cancellable, Cursor, Homeserver
from synapse_sticky.homeserver.signal import Signal

__all__ = ["Cancellable", "Cursor", "Homeserver", "Signal"]
