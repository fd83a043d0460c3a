"""Why something could not be done in the database, and whether that passes: one table of causes
(L3, H2).

psycopg2's classes do not tell: ``ProgramLimitExceeded``, which is for ever, and ``QueryCanceled``
are ``OperationalError``s, and so is a lost connection. The SQLSTATE tells.
"""

import enum
import sqlite3
from typing import Any

import attr
from twisted.enterprise.adbapi import ConnectionLost


class Verdict(enum.Enum):
    """What is to become of what could not be done, such as of a PDU that was to be persisted."""

    PASSES = "passes"
    """It may well be done later, unchanged."""
    REFUSED = "refused"
    """The database will never do it."""
    UNKNOWN = "unknown"
    """Nobody can tell. A few tries are worth it."""


_LOCKED = "55P03"
_PASSES = ("08", "40", "53", _LOCKED, "57P", "58", "25006")
"""How SQLSTATEs begin: the connection, a transaction that lost against another, no resources, a
lock, a shutdown, the machine, a server that is read-only after a failover."""

_REFUSED = ("54000", "22", "23", "42")
"""Likewise: a limit of the program, the data, a constraint, the statement."""

_SQLITE_PASSES = ("BUSY", "LOCKED", "FULL", "IOERR", "READONLY", "CANTOPEN")
_SQLITE_REFUSED = ("TOOBIG", "CONSTRAINT", "MISMATCH")

_SQLITE_NAMES = {
    "is busy": "BUSY",
    "is locked": "LOCKED",
    "is full": "FULL",
    "disk i/o": "IOERR",
    "readonly": "READONLY",
    "unable to open": "CANTOPEN",
    "too big": "TOOBIG",
    "constraint": "CONSTRAINT",
    "mismatch": "MISMATCH",
}
"""SQLite's names of its errors by what their messages say. Python has them from 3.11 on."""

_LOST = ("08", "57P02")
"""Likewise: the connection has ended, or the server process at its other end has died."""

_WITHOUT_CODE = frozenset({"OperationalError", "InterfaceError", "ConnectionLost"})
"""These come without an SQLSTATE if the connection was lost, or refused. The last one is Twisted's:
Synapse raises it in place of the driver's if the connection is lost in a transaction."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Cause:
    """An exception, as far as the table looks at it.

    classes: the names of the classes of a database driver's exception, its bases included; none
        for any other exception.
    sqlstate: what Postgres says, five characters; None if there is none.
    sqlite_name: SQLite's name of its error, such as ``SQLITE_BUSY``; None if there is none.
    status: the HTTP status that an event persister answered with; None if it did not answer.
    is_unreachable: the event persister could not be reached.
    text: what the exception says, for the log.
    """

    classes: frozenset[str] = frozenset()
    sqlstate: str | None = None
    sqlite_name: str | None = None
    status: int | None = None
    is_unreachable: bool = False
    text: str = ""

    def verdict(self) -> Verdict | None:
        """None if it is neither the database's error nor an event persister's."""
        if self.is_unreachable:
            return Verdict.PASSES
        if self.sqlstate:
            return _of_code(self.sqlstate, _PASSES, _REFUSED)
        if self.sqlite_name:
            name = self.sqlite_name.removeprefix("SQLITE_")
            return _of_code(name, _SQLITE_PASSES, _SQLITE_REFUSED)
        if self.classes & _WITHOUT_CODE:
            return Verdict.PASSES
        if self.classes or (self.status is not None and self.status >= 500):
            return Verdict.UNKNOWN
        return None

    def is_lost_connection(self) -> bool:
        """Has the connection to the database ended? What was asked may be what ended it."""
        if self.sqlstate:
            return self.sqlstate.startswith(_LOST)
        return self.sqlite_name is None and bool(self.classes & _WITHOUT_CODE)

    def __str__(self) -> str:
        # The others say where in the database.
        line = next(iter(self.text.strip().splitlines()), "")
        code = self.sqlstate or self.sqlite_name
        return f"{line} ({code})" if code else line

    @classmethod
    def of_database(cls, error: BaseException) -> "Cause | None":
        """The cause of an error of either database driver; None if it is another error."""
        bases = type(error).__mro__
        drivers = {base.__module__.partition(".")[0] for base in bases}
        if not isinstance(error, sqlite3.Error | ConnectionLost) and "psycopg2" not in drivers:
            return None
        return cls(
            frozenset(base.__name__ for base in bases),
            sqlstate=getattr(error, "pgcode", None),
            sqlite_name=_sqlite_name(error) if isinstance(error, sqlite3.Error) else None,
            text=str(error),
        )

    def to_json(self) -> dict[str, Any]:
        """What an event persister hands on to the process that received the PDU: not the text."""
        return {
            "classes": sorted(self.classes),
            "sqlstate": self.sqlstate,
            "sqlite_name": self.sqlite_name,
        }

    @classmethod
    def from_json(cls, handed_on: object) -> "Cause | None":
        """The same, read; None if it is something else (another version's)."""
        match handed_on:
            case {
                "classes": list(classes),
                "sqlstate": str() | None as sqlstate,
                "sqlite_name": str() | None as sqlite_name,
            }:
                names = frozenset(map(str, classes))
                return cls(
                    names, sqlstate, sqlite_name, text="an event persister's database failed"
                )
            case _:
                return None


def _of_code(code: str, passes: tuple[str, ...], refused: tuple[str, ...]) -> Verdict:
    if code.startswith(passes):
        return Verdict.PASSES
    return Verdict.REFUSED if code.startswith(refused) else Verdict.UNKNOWN


def _sqlite_name(error: sqlite3.Error) -> str:
    if name := getattr(error, "sqlite_errorname", None):
        return str(name)
    message = str(error).lower()
    return "SQLITE_" + next((n for part, n in _SQLITE_NAMES.items() if part in message), "ERROR")


def is_locked(error: BaseException) -> bool:
    """Has another transaction locked what it would take, for longer than may be waited?"""
    cause = Cause.of_database(error)
    return cause is not None and cause.sqlstate == _LOCKED


def is_outage(error: BaseException) -> bool:
    """Would anything else that is asked of the database fail now, too?

    While a cause lasts that passes, trying something smaller is of no use. What else fails is about
    its rows.
    """
    cause = Cause.of_database(error)
    return cause is not None and cause.verdict() is Verdict.PASSES
