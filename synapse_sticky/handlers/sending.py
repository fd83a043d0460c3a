"""How fast local users may send sticky events (E1).

Fails open: an event that cannot be checked is sent.
"""

from synapse_sticky.config import LocalConfig
from synapse_sticky.homeserver import Homeserver, LocalSend, Refusal
from synapse_sticky.limits import LimitReport, local_limiter


class SendingHandler:
    """Limits what each local user sends. Plain events are not touched."""

    def __init__(self, homeserver: Homeserver, config: LocalConfig, report: LimitReport) -> None:
        self._hs = homeserver
        self._limiter = local_limiter(config)
        self._report = report

    def start(self) -> None:
        """Takes effect from the next event on."""
        self._hs.sending.limit_sticky(self.check)

    async def check(self, request: LocalSend) -> Refusal | None:
        """Is the user past the limit? If not, the event is charged."""
        refused = self._limiter.admit_user(request.user_id, self._hs.now_ms())
        # Asked last, as these cost a look into the database.
        if refused is None or await request.is_exempt() or await request.is_repeated():
            return None
        refusal = Refusal(*refused)
        self._report.refused_user(refusal.limit, request.user_id, refusal.retry_after_ms)
        return refusal
