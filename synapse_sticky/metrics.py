"""What the module did, counted for Prometheus. Synapse's metrics listener shows it.

In mode ``observe`` the counters of limits say what the module would have done (H6).
"""

from collections.abc import Mapping

from prometheus_client import Counter, Gauge

REFUSED = Counter(
    "synapse_sticky_refused",
    "Sticky events that were refused with 429: of other servers in /send, of local users in"
    " PUT /send",
    ["limit"],
)
DEFERRED = Counter(
    "synapse_sticky_deferred",
    "Sticky events of other servers that were persisted to be delivered later",
    ["limit"],
)
RELEASED = Counter("synapse_sticky_released", "Deferred sticky events that were delivered")
EXPIRED = Counter(
    "synapse_sticky_deferred_expired", "Deferred sticky events that expired before their turn"
)
DEFERRED_NOW = Gauge(
    "synapse_sticky_deferred_waiting", "Sticky events that this process defers at the moment"
)
PANICS = Counter(
    "synapse_sticky_panics",
    "Panics of the Rust core, each a bug; what has panicked is made anew",
    ["duty"],
)
DUTY = Gauge(
    "synapse_sticky_duty",
    "1 for the state of each duty in this process: on, off, unfit (this Synapse does not fit, or"
    " what has panicked is being made anew) or native (Synapse does it itself)",
    ["duty", "state"],
)

_states: dict[str, str] = {}
_broken: set[str] = set()


def set_duty(duty: str, state: str) -> None:
    """Says what state the duty is in; it was in none or another before."""
    _states[duty] = state
    _show(duty)


def set_broken(duty: str, is_broken: bool) -> None:
    """Says whether the duty is unfit for now, whatever state it is in otherwise."""
    if is_broken:
        _broken.add(duty)
    else:
        _broken.discard(duty)
    _show(duty)


def _show(duty: str) -> None:
    state = "unfit" if duty in _broken else _states.get(duty)
    for other in ("on", "off", "unfit", "native"):
        DUTY.labels(duty, other).set(other == state)


def set_duties(states: Mapping[str, str]) -> None:
    """Says the same of several, by name."""
    for duty, state in states.items():
        set_duty(duty, state)
