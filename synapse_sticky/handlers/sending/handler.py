"""How fast local users may send sticky events (E1).

In mode ``observe`` what would be refused is counted and reported, and sent (H6).

Fails open: an event that cannot be checked is sent.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import attr

from synapse_sticky.config import LocalConfig, LocalMode
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.limits import LimitReport, Refusal, local_limiter
from synapse_sticky.renewal import Renewed


@attr.s(auto_attribs=True, frozen=True, slots=True)
class LocalSend:
    """A local user's request to send a sticky event, now or with a delay.

    is_exempt: whether Synapse's own limits do not apply to the user either: a server admin, an
        application service or user with an exemption.
    is_repeated: whether the very same request was carried out before. Then Synapse repeats its
        answer.
    """

    user_id: str
    is_exempt: Callable[[], Awaitable[bool]]
    is_repeated: Callable[[], Awaitable[bool]]


Check = Callable[[LocalSend], Awaitable[Refusal | None]]


class Sending(Protocol):
    """The events that this server's users send, in a process that serves clients."""

    def limit_sticky(self, check: Check) -> None:
        """From now on asks ``check`` before a sticky event is sent, or a delayed one scheduled; not
        again when that is due. If ``check`` fails, the event is sent."""


class SendingHandler:
    """Limits what each local user sends. Events that are not sticky stay as they are."""

    def __init__(
        self, homeserver: Homeserver, sending: Sending, config: LocalConfig, report: LimitReport
    ) -> None:
        self._homeserver = homeserver
        self._sending = sending
        self._observes = config.mode is LocalMode.OBSERVE
        self._is_exempt_user = config.exempts_user()
        self._limiter = Renewed(homeserver, "sending", partial(local_limiter, config))
        self._report = report

    def install(self) -> None:
        """Takes effect from the next event on."""
        timed = self._homeserver.metrics.timed
        self._sending.limit_sticky(timed("sending", "send", self.check))

    async def check(self, request: LocalSend) -> Refusal | None:
        """The refusal of the request; or None to accept it, which charges the user."""
        if not self._limiter.is_whole or self._is_exempt_user(request.user_id):
            return None
        refused = self._limiter.it.admit_user(request.user_id, self._homeserver.now_ms())
        # Asked last, as both may read the database.
        if refused is None or await request.is_exempt() or await request.is_repeated():
            return None
        refusal = Refusal(*refused)
        self._report.refused(refusal.limit, request.user_id, "", refusal.retry_after_ms, 1)
        return None if self._observes else refusal
