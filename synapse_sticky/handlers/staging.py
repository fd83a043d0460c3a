"""What was acknowledged is not pruned: sticky events stay in the inbound staging area (L3).

Fails open: if the pruning cannot be decided, nothing is pruned this time.
"""

from synapse_sticky._core import sticky_duration_ms, sticky_until_ms
from synapse_sticky.homeserver import Homeserver, StagedEvent


class StagingHandler:
    """Keeps unexpired sticky PDUs out of Synapse's pruning of staged PDUs."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._hs = homeserver

    def start(self) -> None:
        """Takes effect from the next pruning on."""
        self._hs.staging.keep_from_pruning(self.keep)

    def keep(self, staged: StagedEvent) -> bool:
        """Is the staged PDU sticky (S1), and unexpired (S2) by when it was received?"""
        duration_ms = sticky_duration_ms(staged.sticky_field)
        origin_server_ts_ms = staged.origin_server_ts
        if duration_ms is None or not isinstance(origin_server_ts_ms, int):
            return False
        until_ms = sticky_until_ms(duration_ms, origin_server_ts_ms, staged.received_ts_ms)
        return until_ms > self._hs.now_ms()
