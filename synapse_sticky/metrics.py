"""What the module does, for Prometheus (E3). Synapse's metrics listener shows it.

``Metrics`` is what one homeserver of the process counts with, in this project's words. It is the
only thing that knows Prometheus. docs/metrics.md says what each metric means and what to do.

As a stranger could make up any number of them, no room, user or remote server is a label.
"""

import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import product
from time import perf_counter
from typing import Any, Final, TypeVar

from prometheus_client import Counter, Gauge, Histogram

_SERVER = "server_name"
"""The label by which Synapse tells the homeservers of a process apart."""

_OF_SERVERS = ("per_server", "per_server_in_room", "per_sender")
REFUSING = (
    *(*_OF_SERVERS, "per_user"),
    *("max_deferred_per_server", "max_staged_per_server_in_room"),
)
DEFERRING = (*_OF_SERVERS, "per_room", "hold")
NOT_RECORDED: Final = "not_recorded"
"""The limit of deferred events that a version of this module deferred which has not noted it."""

CORE = ("index", "deferral", "receipt", "sending")
"""The duties that use the Rust core."""

STATES = ("on", "off", "unfit", "native")
ANSWERED_BY = ("index", "database")
OUTCOMES = ("deferred", "refused", "released", "expired")
STEPS = ("sent", "resent", "acknowledged", "confirmed", "believed", "refused", "given_up")
ANSWERS = (
    *("says", "lacks", "silent", "too_large"),
    *("refuses", "limited", "busy", "unreachable"),
)
REASONS = ("prev_events", "auth_events", "database", "unknown", "state", "joining", "not_joined")
DROPS = ("refused", "tried_often", "full", "evicted", "unwritable", "redacted", "purged")


_FROM_0: dict[Counter, Sequence[tuple[str, ...]]] = {}  # with the values of their labels


def _counter(name: str, text: str, **labels: Sequence[str]) -> Counter:
    """One that begins at 0: else Prometheus would not see the first increment."""
    counter = Counter(name, text, [_SERVER, *labels])
    _FROM_0[counter] = [*product(*labels.values())]
    return counter


DUTY = Gauge(
    "synapse_sticky_duty",
    "1 for the state of each duty in this process: on, off, unfit (this Synapse does not fit, or"
    " what has panicked is being made anew) or native (Synapse does it itself)",
    [_SERVER, "duty", "state"],
)
PANICS = _counter(
    "synapse_sticky_panics",
    "Panics of the Rust core, each a bug; what has panicked is made anew",
    duty=CORE,
)
SECONDS = Histogram(
    "synapse_sticky_duty_seconds",
    "How long a duty took for one call on one of its paths, with what it waited for",
    [_SERVER, "duty", "path"],
    buckets=(0.001, 0.01, 0.1, 1.0, 10.0),
)
QUESTIONS = _counter(
    "synapse_sticky_sync_questions",
    "Questions of /sync and sliding sync for sticky events, by who answered them",
    by=ANSWERED_BY,
)
REFUSED = _counter(
    "synapse_sticky_refused",
    "Sticky events that were refused with 429: of other servers in /send, of local users in"
    " PUT /send",
    limit=REFUSING,
)
DEFERRED = _counter(
    "synapse_sticky_deferred",
    "Sticky events of other servers that were persisted to be delivered later",
    limit=DEFERRING,
)
RELEASED = _counter(
    "synapse_sticky_released",
    "Deferred sticky events that were delivered, by the limit that deferred them",
    limit=(*DEFERRING, NOT_RECORDED),
)
EXPIRED = _counter(
    "synapse_sticky_deferred_expired",
    "Deferred sticky events that expired before their turn, by the limit that deferred them",
    limit=(*DEFERRING, NOT_RECORDED),
)
OBSERVED = Counter(
    "synapse_sticky_observed",
    "What limits would have done to sticky events in mode observe (H6)",
    [_SERVER, "outcome", "limit"],
)
PUSHED = _counter(
    "synapse_sticky_pushed_events",
    "Own sticky events on their way to newcomers, by step",
    step=STEPS,
)
ASKED = _counter(
    "synapse_sticky_newcomer_questions",
    "Questions to newcomers whether they have what they acknowledged, by answer",
    answer=ANSWERS,
)
PARKED = _counter(
    "synapse_sticky_parked",
    "Acknowledged sticky PDUs that were parked, by why they could not be persisted",
    reason=REASONS,
)
PARKED_NOW = Gauge(
    "synapse_sticky_parked_now",
    "Parked PDUs of all processes, when this one looked last, by why they could not be persisted",
    [_SERVER, "reason"],
)
PARKED_PERSISTED = _counter(
    "synapse_sticky_parked_persisted", "Parked PDUs that were persisted after all"
)
PARKED_EXPIRED = _counter(
    "synapse_sticky_parked_expired", "Parked PDUs that expired before they could be"
)
PARKED_DROPPED = _counter(
    "synapse_sticky_parked_dropped",
    "Acknowledged sticky PDUs that were dropped, by why they were not parked, or not any longer",
    reason=DROPS,
)
STAGED_KEPT = _counter(
    "synapse_sticky_staged_kept", "Staged sticky PDUs that plain Synapse would have pruned"
)
DUMMY_EVENTS = _counter("synapse_sticky_dummy_events", "Dummy events that were sent")
LEFT_OUT = _counter(
    "synapse_sticky_rooms_left_out",
    "Rooms that were left out for an hour, as no local user could send a dummy event",
)

GAUGES: Mapping[str, Gauge] = {
    name: Gauge(f"synapse_sticky_{name}", text, [_SERVER])
    for name, text in {
        "active_events": "Unexpired sticky events, as of the last 10 seconds",
        "index_rows": "Rows of the index, with expired ones that it has not dropped yet",
        "index_lag": "By how many rows of the stream of sticky events the index is behind",
        "deferred_waiting": "Sticky events that this process defers at the moment",
        "observed_waiting": "Sticky events that would be deferred at the moment (mode observe)",
        "newcomers_open": "Newcomers, one for each room, that may lack sticky events",
        "newcomer_oldest_seconds": "For how long this process has had the oldest open newcomer",
    }.items()
}
"""What is shown of each process, by its name without the prefix."""

T = TypeVar("T")


class LimitMetrics:
    """Counts what limits do to sticky events, or would do in mode ``observe`` (H6)."""

    def __init__(self, server_name: str, *, observes: bool = False) -> None:
        self._name = server_name
        self.observes = observes
        self._counters = {
            "refused": REFUSED,
            "deferred": DEFERRED,
            "released": RELEASED,
            "expired": EXPIRED,
        }

    def count(self, outcome: str, limit: str, count: int = 1) -> None:
        """So many events were ``deferred``, ``refused``, ``released``, or have ``expired`` before
        their turn.

        Args:
            limit: the name of the option.
        """
        if self.observes:
            OBSERVED.labels(self._name, outcome, limit).inc(count)
        else:
            self._counters[outcome].labels(self._name, limit).inc(count)

    def count_each(self, outcome: str, limits: Iterable[str | None]) -> None:
        """The same of one event for each of these; None if it is not known which limit it was."""
        for limit in limits:
            self.count(outcome, limit or NOT_RECORDED)


class Metrics:
    """Counts what one homeserver does in this process. It may be used in any thread.

    limits, observed: of what limits do, or would do.
    """

    def __init__(self, server_name: str) -> None:
        self._name = server_name
        self.limits = LimitMetrics(server_name)
        self.observed = LimitMetrics(server_name, observes=True)
        self._states: dict[str, str] = {}
        self._broken: set[str] = set()
        self._answered = {by: QUESTIONS.labels(server_name, by) for by in ANSWERED_BY}
        for counter, all_values in _FROM_0.items():
            for values in all_values:
                counter.labels(server_name, *values)

    def close(self) -> None:
        """The homeserver has ended: shows nothing of the present any more."""
        for gauge in GAUGES.values():
            _remove(gauge, self._name)
        for reason in REASONS:
            _remove(PARKED_NOW, self._name, reason)
        for duty in self._states:
            for state in STATES:
                _remove(DUTY, self._name, duty, state)

    # The state of duties

    def set_duty(self, duty: str, state: str) -> None:
        """Says what state the duty is in; it was in none or another before."""
        self._states[duty] = state
        self._show_duty(duty)

    def set_duties(self, states: Mapping[str, str]) -> None:
        """Says the same of several, by name."""
        for duty, state in states.items():
            self.set_duty(duty, state)

    def set_broken(self, duty: str, is_broken: bool) -> None:
        """Says whether the duty is unfit for now, whatever state it is in otherwise."""
        if is_broken:
            self._broken.add(duty)
        else:
            self._broken.discard(duty)
        self._show_duty(duty)

    def _show_duty(self, duty: str) -> None:
        state = "unfit" if duty in self._broken else self._states.get(duty)
        for other in STATES:
            DUTY.labels(self._name, duty, other).set(other == state)

    def panicked(self, duty: str) -> None:
        """The Rust core has panicked."""
        PANICS.labels(self._name, duty).inc()

    # What is there at a moment

    def show(self, name: str, owner: T, read: Callable[[T], float]) -> None:
        """From now on shows what is read of the owner whenever Prometheus asks.

        Args:
            name: a key of ``GAUGES``.
            owner: is let go whenever nobody else holds it.
            read: is called in the listener's thread. It waits for nothing and takes no time.
        """
        reference = weakref.ref(owner)

        def value() -> float:
            # What is being made anew has panicked. All other metrics are shown all the same.
            with suppress(Exception):
                if (there := reference()) is not None:
                    return float(read(there))
            return float("nan")

        GAUGES[name].labels(self._name).set_function(value)

    def set(self, name: str, value: float) -> None:
        """Shows this from now on."""
        GAUGES[name].labels(self._name).set(value)

    # How long it takes

    def timed(
        self, duty: str, path: str, function: Callable[..., Awaitable[T]]
    ) -> Callable[..., Awaitable[T]]:
        """The coroutine function, with the time of each call taken."""
        observe = SECONDS.labels(self._name, duty, path).observe

        async def call(*args: Any) -> T:
            began = perf_counter()
            try:
                return await function(*args)
            finally:
                observe(perf_counter() - began)

        return call

    def timed_call(self, duty: str, path: str, function: Callable[..., T]) -> Callable[..., T]:
        """The same of a plain function."""
        observe = SECONDS.labels(self._name, duty, path).observe

        def call(*args: Any) -> T:
            began = perf_counter()
            try:
                return function(*args)
            finally:
                observe(perf_counter() - began)

        return call

    # What happens

    def answered(self, by: str) -> None:
        """A question of a sync was answered by the ``index``, or left to the ``database``."""
        self._answered[by].inc()

    def pushed(self, step: str, count: int = 1) -> None:
        """So many own events have come to this step (``STEPS``) on their way to a newcomer."""
        PUSHED.labels(self._name, step).inc(count)

    def asked(self, answer: str) -> None:
        """A newcomer was asked what it has, and this came of it (``ANSWERS``)."""
        ASKED.labels(self._name, answer).inc()

    def parked(self, reason: str) -> None:
        """A PDU was parked for this reason (``REASONS``)."""
        PARKED.labels(self._name, reason).inc()

    def parked_now(self, counts: Mapping[str, int]) -> None:
        """So many PDUs are parked for each reason (``REASONS``), of all processes."""
        for reason in REASONS:
            PARKED_NOW.labels(self._name, reason).set(counts.get(reason, 0))

    def unparked(self, persisted: int, expired: int) -> None:
        """So many parked PDUs were persisted, and so many have expired."""
        PARKED_PERSISTED.labels(self._name).inc(persisted)
        PARKED_EXPIRED.labels(self._name).inc(expired)

    def dropped(self, reason: str, count: int = 1) -> None:
        """So many acknowledged sticky PDUs were dropped for this reason (``DROPS``)."""
        PARKED_DROPPED.labels(self._name, reason).inc(count)

    def kept_staged(self, count: int) -> None:
        """So many staged PDUs were not pruned, as they are sticky."""
        STAGED_KEPT.labels(self._name).inc(count)

    def merged(self) -> None:
        """A dummy event was sent."""
        DUMMY_EVENTS.labels(self._name).inc()

    def left_out(self) -> None:
        """A room was left out for an hour, as no dummy event can be sent there."""
        LEFT_OUT.labels(self._name).inc()


def _remove(gauge: Gauge, *labels: str) -> None:
    with suppress(KeyError):  # it was never shown
        gauge.remove(*labels)
