"""What the handlers of limits share: limiters made from the configuration, and what is told of
refusals and deferrals."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

import attr

from synapse_sticky import metrics
from synapse_sticky._core import Limiter
from synapse_sticky.config import FederationConfig, LimitConfig, LocalConfig, Mode

logger = logging.getLogger(__name__)

_KEYS = 65_536
"""How many buckets that are not full are kept apart from each other; about 15 MB at worst."""

_TELL_EVERY_MS = 10_000
_SUBJECTS = 1_000


def federation_limiter(config: FederationConfig) -> Limiter:
    """A limiter of its own for other servers' events; without limits in mode ``off``."""
    if config.mode is Mode.OFF:
        return _limiter()
    return _limiter(
        per_server=config.per_server,
        per_server_in_room=config.per_server_in_room,
        per_sender=config.per_sender,
        per_room=config.per_room,
    )


def local_limiter(config: LocalConfig) -> Limiter:
    """A limiter for local users' events."""
    return _limiter(per_user=config.per_user)


def _limiter(**limits: LimitConfig | None) -> Limiter:
    return Limiter(
        {
            name: (limit.per_second, limit.burst_count)
            for name, limit in limits.items()
            if limit is not None
        },
        _KEYS,
    )


def per_second(config: FederationConfig, limit: str) -> float:
    """How many events a second the option of that name lets through."""
    limit_config: LimitConfig | None = getattr(config, limit)
    return 1.0 if limit_config is None else limit_config.per_second


@attr.s(auto_attribs=True, slots=True)
class _Subject:
    told_ms: int
    untold: int = 0


class LimitReport:
    """Counts what limits do, and tells it in the log: for one server, limit and kind of answer at
    most once in ten seconds, with how much there was in between."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self._now_ms = now_ms
        self._subjects: OrderedDict[tuple[str, str, str], _Subject] = OrderedDict()

    def refused(self, limit: str, server: str, where: str, retry_after_ms: int, count: int) -> None:
        """A transaction of another server was refused."""
        metrics.REFUSED.labels(limit).inc(count)
        self._tell("refused", limit, server, where, f"asked to retry in {retry_after_ms} ms", count)

    def refused_user(self, limit: str, user_id: str, retry_after_ms: int) -> None:
        """A local user's event was refused."""
        metrics.REFUSED.labels(limit).inc()
        self._tell("refused", limit, user_id, "", f"asked to retry in {retry_after_ms} ms", 1)

    def deferred(self, limit: str, server: str, room_id: str, waiting: int, wait_ms: int) -> None:
        """An event of another server was deferred: the last of so many of that server's that
        wait, and as it looks now for so long."""
        metrics.DEFERRED.labels(limit).inc()
        until = f"{waiting} of it wait, the last for about {wait_ms} ms"
        self._tell("deferred", limit, server, f"in {room_id}", until, 1)

    def expired(self, event_ids: Sequence[str]) -> None:
        """Deferred events expired before their turn."""
        metrics.EXPIRED.inc(len(event_ids))
        example = f"before their turn, such as {event_ids[0]}"
        self._tell("expired", "deferred", "other servers", example, "", len(event_ids))

    def _tell(self, what: str, limit: str, who: str, where: str, until: str, count: int) -> None:
        now_ms = self._now_ms()
        key = (what, limit, who)
        subject = self._subjects.get(key)
        # A clock that went back must not silence the log.
        if subject is not None and 0 <= now_ms - subject.told_ms < _TELL_EVERY_MS:
            subject.untold += count
            return
        count += subject.untold if subject is not None else 0
        self._subjects[key] = _Subject(now_ms)
        self._subjects.move_to_end(key)
        while len(self._subjects) > _SUBJECTS:
            self._subjects.popitem(last=False)
        details = "".join([f" {where}" if where else "", f"; {until}" if until else ""])
        logger.info("%s: %s %d sticky events of %s%s", limit, what, count, who, details)
