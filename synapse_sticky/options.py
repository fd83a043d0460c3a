"""How options are declared, checked and refused: by name, with what is allowed."""

import difflib
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from re import Pattern
from typing import Any

import attr
from matrix_common.regex import glob_to_regex
from synapse.module_api.errors import ConfigError

_UNITS_MS = {
    "": 1,
    "s": 1_000,
    "m": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
}
_DURATION = re.compile(r"([0-9]{1,15})([smhd]?)", re.ASCII)
_USER_GLOB = re.compile(r"@[^:]+:[^*?\s]+")
_URL_PATH = re.compile(r"(/[A-Za-z0-9_-]+)+")
_TAKEN = re.compile(
    r"/(_matrix|health|\.well-known|_synapse/(admin|client|federation|mas|metrics|replication))\b"
)
HOUR_MS = 3_600_000

Check = Callable[[object], Any]
"""Takes the value as it is in the file; gives the value to use or raises ValueError with what is
allowed."""


def option(default: Any, check: Check) -> Any:
    """A field for an option with this default."""
    return attr.ib(default=default, metadata={"check": check})


def section(default: Any, *, nullable: bool = False) -> Any:
    """A field for a section of options; ``nullable`` if null is allowed in its place."""
    return attr.ib(default=default, metadata={"section": default, "nullable": nullable})


def boolean(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def integer(at_least: int, at_most: int) -> Check:
    """A whole number within bounds."""

    def check(value: object) -> int:
        # A bool is an int in Python, but not in a configuration.
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"a whole number from {at_least} to {at_most}")
        if not at_least <= value <= at_most:
            raise ValueError(f"a whole number from {at_least} to {at_most}")
        return value

    return check


def number(at_least: float, at_most: float) -> Check:
    """A number within bounds."""
    allowed = f"a number from {at_least:,.10g} to {at_most:,.10g}"

    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(allowed)
        if not at_least <= value <= at_most:
            raise ValueError(allowed)
        return float(value)

    return check


def url_path(value: object) -> str:
    """A path of Synapse's own that is none of its own resources."""
    if not isinstance(value, str) or not _URL_PATH.fullmatch(value) or _TAKEN.match(value):
        raise ValueError("a path such as '/_synapse/sticky', without a slash at its end")
    return value


def server_globs(value: object) -> tuple[str, ...]:
    """Server names with wildcards."""
    allowed = "a list of server names, in which * and ? stand for any characters or one"
    if not isinstance(value, list | tuple):
        raise ValueError(allowed)
    for glob in value:
        if not isinstance(glob, str) or not glob:
            raise ValueError(allowed)
    return tuple(value)


def user_globs(value: object) -> tuple[str, ...]:
    """User IDs with wildcards in the part before the server."""
    allowed = (
        "a list of user IDs such as '@gateway-*:example.org', in which * and ? before the server's "
        "name stand for any characters or one"
    )
    if not isinstance(value, list | tuple):
        raise ValueError(allowed)
    for glob in value:
        if not isinstance(glob, str) or not _USER_GLOB.fullmatch(glob):
            raise ValueError(allowed)
    return tuple(value)


def user_matcher(globs: Iterable[str]) -> Callable[[str], bool]:
    """A function that tells whether a user ID matches one of the globs of ``user_globs``."""
    by_server: dict[str, list[Pattern[str]]] = {}
    for glob in globs:
        local, _, server = glob.partition(":")
        by_server.setdefault(server, []).append(glob_to_regex(local))

    def matches(user_id: str) -> bool:
        local, _, server = user_id.partition(":")
        return any(pattern.match(local) for pattern in by_server.get(server, ()))

    return matches


def duration(at_least_ms: int, at_most_ms: int) -> Check:
    """A duration in ms, within bounds."""
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


def parse_section(default: Any, values: object, path: tuple[str, ...]) -> Any:
    """The section with what is set in ``values``; what is not stays as it is by default."""
    fields = {field.name.removesuffix("_ms"): field for field in attr.fields(type(default))}
    if not isinstance(values, Mapping):
        problem = f"must be a mapping of options, not {_shown(values)}; there are: "
        raise error(path, problem + ", ".join(fields))
    parsed: dict[str, Any] = {}
    for key, value in values.items():
        field = fields.get(key) if isinstance(key, str) else None
        if field is None:
            raise error((*path, str(key)), _unknown(str(key), list(fields)))
        if section := field.metadata.get("section"):
            if value is None and field.metadata["nullable"]:
                parsed[field.name] = None
            else:
                parsed[field.name] = parse_section(section, value, (*path, key))
            continue
        try:
            parsed[field.name] = field.metadata["check"](value)
        except ValueError as e:
            raise error((*path, key), f"must be {e}, not {_shown(value)}") from None
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


def error(path: tuple[str, ...], problem: str) -> ConfigError:
    """The error that names an option and says what is wrong with it."""
    name = ".".join(path) or "config"
    # Synapse puts the module's own path in front.
    return ConfigError(f"{name} {problem}", path=path)
