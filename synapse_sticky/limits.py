"""What the duties with limits share: limiters made from the configuration, refusals, and the
report of what the limits did."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import attr
from synapse.module_api.errors import Codes, SynapseError

from synapse_sticky._core import Limiter
from synapse_sticky.config import FederationConfig, LimitConfig, LocalConfig, Mode
from synapse_sticky.lately import Lately
from synapse_sticky.logs import bounded
from synapse_sticky.metrics import LimitMetrics
from synapse_sticky.orders import HELD

logger = bounded(__name__)

_CAPACITY = 65_536
"""How many buckets that are not full a limiter keeps apart; about 15 MB at worst."""

HELD_FACTOR = 10
"""While an administrator holds a server, so many times as many of its events may wait."""

_REPORT_EVERY_MS = 10_000
_MAX_SUBJECTS = 1_000


OnPanic = Callable[[str], object]


def federation_limiter(config: FederationConfig, on_panic: OnPanic | None = None) -> Limiter:
    """A new limiter for the events of other servers; without limits in mode ``off``."""
    if config.mode is Mode.OFF:
        return _limiter(on_panic)
    return _limiter(
        on_panic,
        per_server=config.per_server,
        per_server_in_room=config.per_server_in_room,
        per_sender=config.per_sender,
        per_room=config.per_room,
    )


def local_limiter(config: LocalConfig, on_panic: OnPanic | None = None) -> Limiter:
    """A new limiter for the events of local users."""
    return _limiter(on_panic, per_user=config.per_user)


def _limiter(on_panic: OnPanic | None, **limits: LimitConfig | None) -> Limiter:
    return Limiter(
        {
            name: (limit.per_second, limit.burst_count)
            for name, limit in limits.items()
            if limit is not None
        },
        _CAPACITY,
        on_panic=on_panic,
    )


def per_second(config: FederationConfig, limit: str) -> float:
    """How many events a second the option of this name lets through; 1 if it is not set."""
    limit_config: LimitConfig | None = getattr(config, limit)
    return 1.0 if limit_config is None else limit_config.per_second


def most_deferred(config: FederationConfig, *, is_held: bool) -> int:
    """How many events of one server may wait before its transactions are refused (H3).

    Args:
        is_held: whether an administrator holds the server.
    """
    return config.max_deferred_per_server * (HELD_FACTOR if is_held else 1)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Refusal:
    """Why a request is refused for now, and for how long (L2, E1).

    limit: the name of the option whose limit the request is past.
    retry_after_ms: how long the requester is asked to wait.
    """

    limit: str
    retry_after_ms: int

    def error(self, section: str | None = None) -> SynapseError:
        """The answer to the request: 429 ``M_LIMIT_EXCEEDED``.

        Args:
            section: of the limit's option, to have the answer name it; None for other servers,
                which need not know.
        """
        return _LimitExceededError(self, section)


class _LimitExceededError(SynapseError):
    def __init__(self, refusal: Refusal, section: str | None) -> None:
        named = f": too many sticky events ({section}.{refusal.limit})" if section else ""
        super().__init__(
            429,
            f"Too Many Requests{named}",
            Codes.LIMIT_EXCEEDED,
            additional_fields={"retry_after_ms": refusal.retry_after_ms},
            headers={"Retry-After": str(math.ceil(refusal.retry_after_ms / 1000))},
        )
        self._limit = refusal.limit

    @property
    def debug_context(self) -> str:
        """What Synapse's log line of the request says, and its answer does not."""
        return f"synapse_sticky_{self._limit}"


@attr.s(auto_attribs=True, slots=True)
class _Subject:
    reported_ms: int
    unreported: int = 0


class LimitReport:
    """Counts what limits do, and reports it in the log (E3).

    For one server or user, limit and kind of answer there is at most one line in ten seconds. It
    gives the number of events since the last one.

    Args:
        now_ms: gives the time in ms.
        metrics: counts the same. If it observes, the limits are not applied, and the lines say what
            would be done (H6).
        lately: counts it for each server.
    """

    def __init__(
        self, now_ms: Callable[[], int], metrics: LimitMetrics, lately: Lately | None = None
    ) -> None:
        self._now_ms = now_ms
        self._metrics = metrics
        self._lately = lately
        self.observes = metrics.observes
        self._subjects: OrderedDict[tuple[str, str, str], _Subject] = OrderedDict()

    def refused(
        self, limit: str, who: str, where: str, retry_after_ms: int | None, count: int
    ) -> None:
        """A transaction of another server with ``count`` sticky events was refused, or a local
        user's event.

        Args:
            who: the server or the user.
            where: the rooms; may be empty.
            retry_after_ms: how long they were asked to wait; None if that cannot be told.
        """
        self._metrics.count("refused", limit, count)
        if self._lately is not None and not who.startswith("@"):
            self._lately.count("refused", limit, who, count)
        answer = ""
        if retry_after_ms is not None:
            would_be = "would be " if self.observes else ""
            answer = f"{would_be}asked to retry in {retry_after_ms} ms"
        self._report("refused", limit, who, where, answer, count)

    def deferred(
        self,
        limit: str,
        server: str,
        room_id: str,
        server_count: int,
        delay_ms: int,
        sender: str,
    ) -> None:
        """An event of another server was deferred.

        Args:
            server_count: how many events of this server are deferred now.
            delay_ms: how long the last of them will be, at the limit's rate.
            sender: is named if the limit is the sender's. The line is still one for all senders of
                the server, which may make up any number of them.
        """
        self._metrics.count("deferred", limit)
        if self._lately is not None:
            self._lately.count("deferred", limit, server, 1)
        are = "would be" if self.observes else "are"
        outlook = f"{server_count} of its events {are} deferred, the last for about {delay_ms} ms"
        whose = f", this one by {sender!r}" if limit == "per_sender" else ""
        self._report("deferred", limit, server, f"in {room_id}{whose}", outlook, 1)

    def held(self) -> None:
        """An event waits whose server an administrator holds: no limit, and no line in the log."""
        self._metrics.count("deferred", HELD)

    def released(self, limits: Iterable[str]) -> None:
        """Deferred events were delivered; gets the limit of each. That has no line in the log."""
        self._metrics.count_each("released", limits)

    def expired(self, event_ids: Sequence[str], limits: Iterable[str]) -> None:
        """Deferred events expired before their turn; gets the limit of each."""
        self._metrics.count_each("expired", limits)
        example = f"before their turn, such as {event_ids[0]}"
        self._report("expired", "deferred", "other servers", example, "", len(event_ids))

    def _report(
        self, what: str, limit: str, who: str, where: str, outlook: str, count: int
    ) -> None:
        now_ms = self._now_ms()
        key = (what, limit, who)
        subject = self._subjects.get(key)
        # A clock that was set back must not silence the log.
        if subject is not None and 0 <= now_ms - subject.reported_ms < _REPORT_EVERY_MS:
            subject.unreported += count
            return
        count += subject.unreported if subject is not None else 0
        self._subjects[key] = _Subject(now_ms)
        self._subjects.move_to_end(key)
        while len(self._subjects) > _MAX_SUBJECTS:
            self._subjects.popitem(last=False)
        where = f" {where}" if where else ""
        outlook = f"; {outlook}" if outlook else ""
        if self.observes:
            done = "expire" if what == "expired" else f"be {what}"
            text = "%s: %d sticky events of %s would %s%s%s"
            logger.info(text, limit, count, who, done, where, outlook)
        else:
            text = "%s: %s %d sticky events of %s%s%s"
            logger.info(text, limit, what, count, who, where, outlook)
