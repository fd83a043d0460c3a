"""The module's configuration: what can be set, and within which bounds.

The classes below are the only description of the options: their fields carry the checks, and the
field's name is the option's name (durations are called ``..._ms`` here and go without it in
homeserver.yaml).
"""

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import attr
from matrix_common.regex import glob_to_regex
from synapse.module_api.errors import ConfigError

from synapse_sticky.options import (
    HOUR_MS,
    Check,
    boolean,
    duration,
    error,
    integer,
    number,
    option,
    parse_section,
    section,
    server_globs,
    url_path,
    user_globs,
    user_matcher,
)

DUTIES = (
    *("index", "delivery", "sliding", "visibility", "joins", "pruning", "parking", "receipt"),
    *("deferral", "sending", "extremities"),
)
"""What the module does, by the names that folders, log lines and tables of the docs share."""

LISTED_TWICE = "synapse_sticky.StickyEventsModule is listed twice in `modules:`"
"""Why a start, and ``check``, refuse that."""


class Strict(Enum):
    """Which misfits between this module and the running Synapse stop the start (H5)."""

    NO = "false"
    """None: the duty concerned is off."""
    ACCESS = "access"
    """Those that leave open who gets the sticky sections (D8)."""
    ALL = "true"


def _strict(value: object) -> Strict:
    if value is True:
        return Strict.ALL
    if value is False:
        return Strict.NO
    if value == "access":
        return Strict.ACCESS
    raise ValueError("true, false or 'access'")


def _duties(value: object) -> tuple[str, ...]:
    if isinstance(value, list | tuple) and all(name in DUTIES for name in value):
        return tuple(value)
    raise ValueError(f"a list of duties: {', '.join(DUTIES)}")


@attr.s(auto_attribs=True, frozen=True, slots=True)
class DutyConfig:
    """A duty without options of its own.

    enabled: whether it is done at all.
    """

    enabled: bool = option(True, boolean)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class JoinsConfig:
    """Pushing own sticky events to servers that newly join a room (P3, P7, F3).

    enabled: whether this is done at all.
    window: how many events all servers of a room together may leave unprocessed at a newcomer,
        1 to 99; a plain Synapse prunes what it has staged at 100 a room (L3).
    retry_min_ms: the delay before an event is first sent again, 10 ms to an hour. It doubles.
    retry_max_ms: the longest such delay, at least retry_min_ms, at most an hour.
    confirm: whether to ask the newcomer if it has what it acknowledged.
    watched: of how many newcomers of a room within an hour more is known than acknowledgements, 0
        to 100,000. Each of them is watched for an hour (H1).
    """

    enabled: bool = option(True, boolean)
    window: int = option(48, integer(1, 99))
    retry_min_ms: int = option(500, duration(10, HOUR_MS))
    retry_max_ms: int = option(300_000, duration(10, HOUR_MS))
    confirm: bool = option(True, boolean)
    watched: int = option(1_000, integer(0, 100_000))


@attr.s(auto_attribs=True, frozen=True, slots=True)
class StagingConfig:
    """The staging area of inbound PDUs (L3).

    keep_sticky: whether acknowledged sticky events are kept when Synapse prunes it.
    """

    keep_sticky: bool = option(True, boolean)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class VisibilityConfig:
    """Who may see sticky events whatever the history visibility (C1).

    enabled: whether anybody may.
    servers: whether servers that are joined to the room may.
    users: whether local users who are joined to the room may, also those from before their join.
    """

    enabled: bool = option(True, boolean)
    servers: bool = option(True, boolean)
    users: bool = option(True, boolean)


class Mode(Enum):
    """What becomes of sticky events of other servers that are past a limit (L2, L4, H6)."""

    DEFER = "defer"
    REJECT = "reject"
    OBSERVE = "observe"
    """Nothing. What ``DEFER`` would do with them is counted."""
    OFF = "off"


class LocalMode(Enum):
    """What becomes of sticky events of this server's users that are past a limit (E1, H6)."""

    REJECT = "reject"
    OBSERVE = "observe"
    """Nothing. What ``REJECT`` would do with them is counted."""
    OFF = "off"


def _mode_of(modes: type[Mode] | type[LocalMode]) -> Check:
    by_name = {mode.value: mode for mode in modes}
    *names, last = map(repr, by_name)

    def check(value: object) -> Mode | LocalMode:
        # YAML reads a bare `off` as false.
        name = "off" if value is False else value
        if not isinstance(name, str) or name not in by_name:
            raise ValueError(f"{', '.join(names)} or {last}")
        return by_name[name]

    return check


@attr.s(auto_attribs=True, frozen=True, slots=True)
class LimitConfig:
    """A bucket that holds burst_count events and refills at per_second, as in the rest of
    homeserver.yaml."""

    per_second: float = option(attr.NOTHING, number(0.001, 1_000_000))
    burst_count: int = option(attr.NOTHING, integer(1, 1_000_000))


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
    max_staged_per_server_in_room: how many acknowledged sticky events of one server may be
        unprocessed in one room, at least as many as fit into a transaction (50); past it,
        transactions of it with sticky events for that room are refused until there is room.
    exempt_servers: servers that nothing of this applies to, as globs.
    exempt_users: users whom per_sender does not apply to, as globs with a literal server. They
        still count for their server and for the room.
    """

    mode: Mode = option(Mode.DEFER, _mode_of(Mode))
    per_server: LimitConfig | None = section(LimitConfig(50.0, 2_000), nullable=True)
    per_server_in_room: LimitConfig | None = section(LimitConfig(20.0, 1_000), nullable=True)
    per_sender: LimitConfig | None = section(LimitConfig(2.0, 60), nullable=True)
    per_room: LimitConfig | None = section(LimitConfig(50.0, 2_000), nullable=True)
    max_deferred_per_server: int = option(5_000, integer(1, 1_000_000))
    max_staged_per_server_in_room: int = option(1_000, integer(50, 1_000_000))
    exempt_servers: tuple[str, ...] = option((), server_globs)
    exempt_users: tuple[str, ...] = option((), user_globs)

    def applied(self) -> "FederationConfig":
        """What of this holds events up: in mode ``observe`` as little as in ``off``."""
        return attr.evolve(self, mode=Mode.OFF) if self.mode is Mode.OBSERVE else self

    def exempts(self) -> Callable[[str], bool]:
        """A function that tells whether a server is exempt."""
        patterns = [glob_to_regex(glob) for glob in self.exempt_servers]
        return lambda server: any(pattern.match(server) for pattern in patterns)

    def exempts_user(self) -> Callable[[str], bool]:
        """A function that tells whether per_sender does not apply to a user."""
        return user_matcher(self.exempt_users)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class LocalConfig:
    """Limits on sticky events of this server's users (E1).

    mode: what becomes of events past a limit.
    per_user: one user, all rooms; None for no limit.
    exempt_users: users whom per_user does not apply to, as globs with a literal server.
    """

    mode: LocalMode = option(LocalMode.REJECT, _mode_of(LocalMode))
    per_user: LimitConfig | None = section(LimitConfig(2.0, 60), nullable=True)
    exempt_users: tuple[str, ...] = option((), user_globs)

    def exempts_user(self) -> Callable[[str], bool]:
        """A function that tells whether per_user does not apply to a user."""
        return user_matcher(self.exempt_users)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class ExtremitiesConfig:
    """Bringing down forward extremities that old sticky events leave (F2).

    enabled: whether this is done faster than Synapse does it.
    per_minute: how many dummy events may be sent at most, to all rooms together, 12 to 6000.
    """

    enabled: bool = option(True, boolean)
    per_minute: int = option(60, integer(12, 6_000))


@attr.s(auto_attribs=True, frozen=True, slots=True)
class AdminConfig:
    """The API and the page for administrators (E3).

    enabled: whether there are any.
    path: what their paths begin with.
    """

    enabled: bool = option(True, boolean)
    path: str = option("/_synapse/sticky", url_path)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class StickyConfig:
    """The whole configuration. See the classes of the sections.

    strict: which misfits stop the start.
    native: duties that are left to Synapse, as it has them itself.
    state_events: whether state events can be sent as sticky as well (S3). MSC4354 has dropped that.
    """

    strict: Strict = option(Strict.NO, _strict)
    native: tuple[str, ...] = option((), _duties)
    index: DutyConfig = section(DutyConfig())
    delivery: DutyConfig = section(DutyConfig())
    sliding: DutyConfig = section(DutyConfig())
    visibility: VisibilityConfig = section(VisibilityConfig())
    joins: JoinsConfig = section(JoinsConfig())
    pruning: DutyConfig = section(DutyConfig())
    parking: DutyConfig = section(DutyConfig())
    staging: StagingConfig = section(StagingConfig())
    receipt: DutyConfig = section(DutyConfig())
    deferral: DutyConfig = section(DutyConfig())
    federation: FederationConfig = section(FederationConfig())
    sending: DutyConfig = section(DutyConfig())
    local: LocalConfig = section(LocalConfig())
    extremities: ExtremitiesConfig = section(ExtremitiesConfig())
    state_events: bool = option(False, boolean)
    admin: AdminConfig = section(AdminConfig())

    @property
    def limits_local_users(self) -> bool:
        """Is what local users send limited, or what would be refused counted?"""
        return self.local.per_user is not None and self.local.mode is not LocalMode.OFF

    def is_on(self, duty: str) -> bool:
        """Is the duty of this name to be done?"""
        section: DutyConfig = getattr(self, duty)
        if duty in ("pruning", "parking") and not self.staging.keep_sticky:
            return False
        if duty == "visibility" and not (self.visibility.servers or self.visibility.users):
            return False
        if duty == "receipt" and self.federation.applied().mode is Mode.OFF:
            return False
        return section.enabled

    def states_if_nothing_fits(self) -> dict[str, str]:
        """The state of each duty, and of ``access``, in a Synapse that lacks what all need."""
        states = {
            duty: "native" if duty in self.native else "unfit" if self.is_on(duty) else "off"
            for duty in DUTIES
        }
        return {**states, Strict.ACCESS.value: "unfit"}


_OLD_NAMES = {"dummy_events": "extremities"}
"""Sections by the names that they had once; both names are accepted."""


def parse(config: object) -> StickyConfig:
    """Checks what stands under ``config:`` in homeserver.yaml; None or nothing gives the defaults.

    Raises:
        ConfigError: an option is unknown or has a wrong value; names it and says what is allowed.
    """
    values = {} if config is None else config
    old_names: dict[str, str] = {}
    if isinstance(values, Mapping):
        values, old_names = _renamed(values)
    try:
        parsed: StickyConfig = parse_section(StickyConfig(), values, ())
    except ConfigError as e:
        raise _by_old_name(e, old_names) from None
    joins = parsed.joins
    if joins.retry_max_ms < joins.retry_min_ms:
        least = f"joins.retry_min: {joins.retry_max_ms} ms is less than {joins.retry_min_ms} ms"
        raise error(("joins", "retry_max"), f"must not be less than {least}")
    return parsed


def _renamed(config: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[str, str]]:
    """The configuration by today's names, and the old names that it has, by today's."""
    renamed = dict(config)
    old_names = {}
    for old, new in _OLD_NAMES.items():
        if old in renamed:
            if new in renamed:
                raise error((old,), f"is the old name of {new}, which is set as well")
            renamed[new] = renamed.pop(old)
            old_names[new] = old
    return renamed, old_names


def _by_old_name(e: ConfigError, old_names: Mapping[str, str]) -> ConfigError:
    """The error, with the option's name as the file has it."""
    path = tuple(e.path or ())
    if not path or path[0] not in old_names:
        return e
    problem = e.msg.removeprefix(".".join(path)).strip()
    return error((old_names[path[0]], *path[1:]), problem)
