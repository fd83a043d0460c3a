"""The module's configuration: what can be set, within which bounds, and the errors that say so.

The classes below are the only description of the options: their fields carry the checks, and the
field's name is the option's name (durations are called ``..._ms`` here and go without it in
homeserver.yaml).
"""

import difflib
import re
import reprlib
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import attr
from matrix_common.regex import glob_to_regex
from synapse.module_api.errors import ConfigError

DUTIES = (
    *("index", "delivery", "sliding", "visibility", "joins", "pruning", "parking", "receipt"),
    *("deferral", "sending", "extremities"),
)
"""What the module does, by the names that folders, log lines and tables of the docs share."""

_UNITS_MS = {
    "": 1,
    "s": 1_000,
    "m": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
}
_DURATION = re.compile(r"([0-9]{1,15})([smhd]?)", re.ASCII)
_HOUR_MS = 3_600_000

Check = Callable[[object], Any]
"""Takes the value as it is in the file; gives the value to use or raises ValueError with what is
allowed."""


def _option(default: Any, check: Check) -> Any:
    return attr.ib(default=default, metadata={"check": check})


def _section(default: Any, *, nullable: bool = False) -> Any:
    return attr.ib(default=default, metadata={"section": default, "nullable": nullable})


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _integer(at_least: int, at_most: int) -> Check:
    def check(value: object) -> int:
        # A bool is an int in Python, but not in a configuration.
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"a whole number from {at_least} to {at_most}")
        if not at_least <= value <= at_most:
            raise ValueError(f"a whole number from {at_least} to {at_most}")
        return value

    return check


def _number(at_least: float, at_most: float) -> Check:
    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"a number from {at_least:g} to {at_most:g}")
        if not at_least <= value <= at_most:
            raise ValueError(f"a number from {at_least:g} to {at_most:g}")
        return float(value)

    return check


def _server_globs(value: object) -> tuple[str, ...]:
    allowed = "a list of server names, in which * and ? stand for any characters or one"
    if not isinstance(value, list | tuple):
        raise ValueError(allowed)
    for glob in value:
        if not isinstance(glob, str) or not glob:
            raise ValueError(allowed)
    return tuple(value)


def _duration(at_least_ms: int, at_most_ms: int) -> Check:
    allowed = (
        f"a duration from {at_least_ms} to {at_most_ms} ms, as a whole number of milliseconds "
        "or a string such as '30s', '5m' or '1h'"
    )

    def check(value: object) -> int:
        duration_ms: int | None = None
        if isinstance(value, int) and not isinstance(value, bool):
            duration_ms = value
        elif isinstance(value, str) and (match := _DURATION.fullmatch(value)):
            duration_ms = int(match[1]) * _UNITS_MS[match[2]]
        if duration_ms is None or not at_least_ms <= duration_ms <= at_most_ms:
            raise ValueError(allowed)
        return duration_ms

    return check


@attr.s(auto_attribs=True, frozen=True, slots=True)
class JoinsConfig:
    """Pushing own sticky events to servers that newly join a room (P3, P7, F3).

    enabled: whether this is done at all.
    window: how many events all servers of a room together may leave unprocessed at a newcomer,
        1 to 99; a plain Synapse prunes what it has staged at 100 a room (L3).
    retry_min_ms: the delay before an event is first sent again, 10 ms to an hour. It doubles.
    retry_max_ms: the longest such delay, at least retry_min_ms, at most an hour.
    confirm: whether to ask the newcomer if it has what it acknowledged.
    """

    enabled: bool = _option(True, _boolean)
    window: int = _option(48, _integer(1, 99))
    retry_min_ms: int = _option(500, _duration(10, _HOUR_MS))
    retry_max_ms: int = _option(300_000, _duration(10, _HOUR_MS))
    confirm: bool = _option(True, _boolean)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class StagingConfig:
    """The staging area of inbound PDUs (L3).

    keep_sticky: whether acknowledged sticky events are kept when Synapse prunes it.
    """

    keep_sticky: bool = _option(True, _boolean)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class VisibilityConfig:
    """Who may see sticky events whatever the history visibility (C1).

    servers: whether servers that are joined to the room may.
    users: whether local users who are joined to the room may, also those from before their join.
    """

    servers: bool = _option(True, _boolean)
    users: bool = _option(True, _boolean)


class Mode(Enum):
    """What becomes of sticky events of other servers that are past a limit (L2, L4)."""

    DEFER = "defer"
    REJECT = "reject"
    OFF = "off"


def _mode(value: object) -> Mode:
    # YAML reads a bare `off` as false.
    if value is False:
        return Mode.OFF
    for mode in Mode:
        if value == mode.value:
            return mode
    raise ValueError("'defer', 'reject' or 'off'")


@attr.s(auto_attribs=True, frozen=True, slots=True)
class LimitConfig:
    """A bucket that holds burst_count events and refills at per_second, as in the rest of
    homeserver.yaml."""

    per_second: float = _option(attr.NOTHING, _number(0.001, 1_000_000))
    burst_count: int = _option(attr.NOTHING, _integer(1, 1_000_000))


@attr.s(auto_attribs=True, frozen=True, slots=True)
class FederationConfig:
    """Limits on sticky events of other servers (L1 to L7). Each limit can be None: there is none.

    mode: what becomes of events past a limit.
    per_server: one server, all rooms.
    per_server_in_room: one server in one room.
    per_sender: one user in one room.
    per_room: all remote servers in one room.
    max_deferred_per_server: how many events of one server may wait; past it, transactions of it
        with sticky events are refused until there is room.
    exempt_servers: servers that nothing of this applies to, as globs.
    """

    mode: Mode = _option(Mode.DEFER, _mode)
    per_server: LimitConfig | None = _section(LimitConfig(50.0, 2_000), nullable=True)
    per_server_in_room: LimitConfig | None = _section(LimitConfig(20.0, 1_000), nullable=True)
    per_sender: LimitConfig | None = _section(LimitConfig(2.0, 60), nullable=True)
    per_room: LimitConfig | None = _section(LimitConfig(50.0, 2_000), nullable=True)
    max_deferred_per_server: int = _option(5_000, _integer(1, 1_000_000))
    exempt_servers: tuple[str, ...] = _option((), _server_globs)

    def exempts(self) -> Callable[[str], bool]:
        """A function that tells whether a server is exempt."""
        patterns = [glob_to_regex(glob) for glob in self.exempt_servers]
        return lambda server: any(pattern.match(server) for pattern in patterns)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class LocalConfig:
    """Limits on sticky events of this server's users (E1).

    per_user: one user, all rooms; None for no limit.
    """

    per_user: LimitConfig | None = _section(LimitConfig(2.0, 60), nullable=True)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class DummyEventsConfig:
    """Bringing down forward extremities that old sticky events leave (F2).

    enabled: whether this is done faster than Synapse does it.
    per_minute: how many dummy events may be sent at most, to all rooms together, 12 to 6000.
    """

    enabled: bool = _option(True, _boolean)
    per_minute: int = _option(60, _integer(12, 6_000))


@attr.s(auto_attribs=True, frozen=True, slots=True)
class StickyConfig:
    """The whole configuration. See the classes of the sections.

    state_events: whether state events can be sent as sticky as well (S3). MSC4354 has dropped that.
    """

    joins: JoinsConfig = _section(JoinsConfig())
    staging: StagingConfig = _section(StagingConfig())
    visibility: VisibilityConfig = _section(VisibilityConfig())
    federation: FederationConfig = _section(FederationConfig())
    local: LocalConfig = _section(LocalConfig())
    dummy_events: DummyEventsConfig = _section(DummyEventsConfig())
    state_events: bool = _option(False, _boolean)


def parse(config: object) -> StickyConfig:
    """Checks what stands under ``config:`` in homeserver.yaml; None or nothing gives the defaults.

    Raises:
        ConfigError: an option is unknown or has a wrong value; names it and says what is allowed.
    """
    parsed: StickyConfig = _parse_section(StickyConfig(), {} if config is None else config, ())
    joins = parsed.joins
    if joins.retry_max_ms < joins.retry_min_ms:
        raise _error(
            ("joins", "retry_max"),
            f"must not be less than joins.retry_min: {joins.retry_max_ms} ms is less than "
            f"{joins.retry_min_ms} ms",
        )
    return parsed


def _parse_section(default: Any, values: object, path: tuple[str, ...]) -> Any:
    """The section with what is set in ``values``; what is not stays as it is by default."""
    if not isinstance(values, Mapping):
        raise _error(path, f"must be a mapping of options, not {_shown(values)}")
    fields = {field.name.removesuffix("_ms"): field for field in attr.fields(type(default))}
    parsed: dict[str, Any] = {}
    for key, value in values.items():
        field = fields.get(key) if isinstance(key, str) else None
        if field is None:
            raise _error((*path, str(key)), _unknown(str(key), list(fields)))
        if section := field.metadata.get("section"):
            if value is None and field.metadata["nullable"]:
                parsed[field.name] = None
            else:
                parsed[field.name] = _parse_section(section, value, (*path, key))
            continue
        try:
            parsed[field.name] = field.metadata["check"](value)
        except ValueError as e:
            raise _error((*path, key), f"must be {e}, not {_shown(value)}") from None
    return attr.evolve(default, **parsed)


def _unknown(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"is no option; {hint}there are: {', '.join(known)}"


def _shown(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not print numbers of thousands of digits
        return "a number of very many digits"


def _error(path: tuple[str, ...], problem: str) -> ConfigError:
    name = ".".join(path) or "config"
    # Synapse puts the module's own path in front.
    return ConfigError(f"{name} {problem}", path=path)
