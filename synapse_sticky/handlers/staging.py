"""What was acknowledged is not dropped: sticky events stay in the inbound staging area (L3), until
they are processed.

Fails open: if the pruning cannot be decided, nothing is pruned this time.
"""

from synapse_sticky._core import sticky_duration_ms, sticky_until_ms
from synapse_sticky.homeserver import Homeserver, StagedEvent

_RETRY_MIN_MS = 1_000
_RETRY_MAX_MS = 60_000
_ATTEMPTS = 12
"""About seven minutes. The room's other PDUs wait meanwhile, so it is not to be for ever."""


class StagingHandler:
    """Keeps unexpired sticky PDUs out of Synapse's pruning of staged PDUs, and has those processed
    again that a failing database got in the way of."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._hs = homeserver

    def start(self) -> None:
        """Takes effect from the next PDU on."""
        self._hs.staging.keep_from_pruning(self.keep)
        self._hs.staging.retry_processing(self.try_again_ms)

    async def begin(self) -> None:
        """What was acknowledged before a restart is processed without waiting for others."""
        self._hs.staging.process_what_is_left()

    def keep(self, staged: StagedEvent) -> bool:
        """Is the staged PDU sticky (S1), and unexpired (S2) by when it was received?"""
        duration_ms = sticky_duration_ms(staged.sticky_field)
        origin_server_ts_ms = staged.origin_server_ts
        if duration_ms is None or not isinstance(origin_server_ts_ms, int):
            return False
        until_ms = sticky_until_ms(duration_ms, origin_server_ts_ms, staged.received_ts_ms)
        return until_ms > self._hs.now_ms()

    def try_again_ms(self, staged: StagedEvent, failures: int) -> int | None:
        """How long to wait before the PDU is processed again; None for not any more."""
        if failures >= _ATTEMPTS or not self.keep(staged):
            return None
        return int(min(_RETRY_MIN_MS * 2 ** (failures - 1), _RETRY_MAX_MS))
