"""Requests to the API: what they ask for, checked, and the errors that say what is wrong (E3)."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import attr
from synapse.module_api.errors import Codes, SynapseError

LONGEST_ID = 255
"""So long are the IDs of events, rooms and users, in bytes, and the names of servers, at most."""

_LONGEST_TOKEN = LONGEST_ID + 32  # characters

MOST_A_PAGE = 500
_USUAL_PAGE = 100


def wrong(problem: str) -> SynapseError:
    """The error for a parameter that is not as it must be."""
    return SynapseError(400, problem, Codes.INVALID_PARAM)


def not_found(problem: str) -> SynapseError:
    """The error for something that this server does not know."""
    return SynapseError(404, problem, Codes.NOT_FOUND)


def busy(problem: str, retry_after_ms: int) -> SynapseError:
    """The error for what may be asked again after this time (429)."""
    return SynapseError(
        429,
        problem,
        Codes.LIMIT_EXCEEDED,
        additional_fields={"retry_after_ms": retry_after_ms},
        headers={"Retry-After": str(math.ceil(retry_after_ms / 1000))},
    )


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Request:
    """A request of an administrator.

    method: GET, POST or DELETE.
    path: what follows the API's own path, a part each, decoded.
    query: the parameters of the query, all of their values.
    body: what is in it; empty if nothing is.
    admin: the user ID of who asks.
    """

    method: str
    path: Sequence[str]
    query: Mapping[str, Sequence[str]]
    body: Mapping[str, Any]
    admin: str

    def only(self, *names: str) -> None:
        """Raises ``SynapseError`` (400) if there is another parameter than these."""
        for name in self.query:
            if name not in names:
                known = ", ".join(names) or "none"
                raise wrong(f"{name!r} is no parameter of this; there are: {known}")

    def text(self, name: str) -> str | None:
        """The parameter, an ID or the name of a server; None if it is not there."""
        values = self.query.get(name, ())
        if not values:
            return None
        if len(values) > 1:
            raise wrong(f"{name!r} is there more than once")
        return identifier(name, values[0])

    def token(self) -> str | None:
        """The parameter ``from``: the ``next`` of an answer; None if it is not there.

        It has an ID in it, and more. Of what strangers may choose nothing keeps it from going on.
        """
        values = self.query.get("from", ())
        if not values:
            return None
        token = values[0]
        if len(values) > 1 or not 0 < len(token) <= _LONGEST_TOKEN or "\0" in token:
            raise wrong("'from' must be the 'next' of an answer")
        return token

    def integer(self, name: str, default: int, at_least: int, at_most: int) -> int:
        """The parameter, a whole number within bounds."""
        value = self.text(name)
        if value is None:
            return default
        digits = value.removeprefix("-")
        is_number = digits.isascii() and digits.isdecimal() and len(digits) <= 19
        if not is_number or not at_least <= int(value) <= at_most:
            raise wrong(f"{name!r} must be a whole number from {at_least} to {at_most}")
        return int(value)

    def choice(self, name: str, choices: Collection[str], default: str) -> str:
        """The parameter, one of a few words."""
        value = self.text(name)
        if value is None:
            return default
        if value not in choices:
            raise wrong(f"{name!r} must be one of: {', '.join(choices)}")
        return value

    def limit(self) -> int:
        """How many entries the page may have."""
        return self.integer("limit", _USUAL_PAGE, 1, MOST_A_PAGE)


def identifier(name: str, value: object) -> str:
    """The value, if it can be an ID or the name of a server. No database is asked for others."""
    if isinstance(value, str) and value and value.isprintable():
        try:
            if len(value.encode()) <= LONGEST_ID:
                return value
        except UnicodeEncodeError:
            pass
    raise wrong(f"{name!r} must be printable text of 1 to {LONGEST_ID} bytes")
