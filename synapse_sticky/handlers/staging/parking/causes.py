"""Why a PDU could not be persisted, and whether that passes: one table of causes (L3, H2).

psycopg2's classes do not tell: ``ProgramLimitExceeded``, which is for ever, and ``QueryCanceled``
are ``OperationalError``s, and so is a lost connection. The SQLSTATE tells.
"""

import enum
from typing import Any

import attr


class Verdict(enum.Enum):
    """What is to become of a PDU that could not be persisted."""

    PASSES = "passes"
    """It may well go in later, unchanged."""
    REFUSED = "refused"
    """The database will never take it."""
    UNKNOWN = "unknown"
    """Nobody can tell. A few tries are worth it."""


UNKNOWN_AFTER_MS = (15_000, 120_000)
"""The delays between the tries where nobody can tell. It is given up after the last try."""

_PASSES = ("08", "40", "53", "55P03", "57P", "58", "25006")
"""How SQLSTATEs begin: the connection, a transaction that lost against another, no resources, a
lock, a shutdown, the machine, a server that is read-only after a failover."""

_REFUSED = ("54000", "22", "23", "42")
"""Likewise: a limit of the program, the data, a constraint, the statement."""

_SQLITE_PASSES = ("BUSY", "LOCKED", "FULL", "IOERR", "READONLY", "CANTOPEN")
_SQLITE_REFUSED = ("TOOBIG", "CONSTRAINT", "MISMATCH")

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

    def __str__(self) -> str:
        # The others say where in the database.
        line = next(iter(self.text.strip().splitlines()), "")
        code = self.sqlstate or self.sqlite_name
        return f"{line} ({code})" if code else line

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
