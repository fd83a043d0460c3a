"""Why a PDU could not be persisted, and whether that passes (H2)."""

import asyncio
import sqlite3
from types import SimpleNamespace
from typing import Any

import psycopg2
import pytest
from canonicaljson import encode_canonical_json
from synapse.api.errors import FederationError, HttpResponseException, SynapseError
from twisted.enterprise.adbapi import ConnectionLost

from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.parking import synapse
from synapse_sticky.handlers.staging.parking.synapse import SynapseStaging
from synapse_sticky.homeserver.causes import Cause, Verdict, is_outage
from synapse_sticky.homeserver.received import Received

PASSES, REFUSED, UNKNOWN = Verdict.PASSES, Verdict.REFUSED, Verdict.UNKNOWN

PASSING = ["08000", "08006", "40001", "40P01", "53100", "53200", "53300", "55P03"]
PASSING += ["57P01", "57P02", "57P03", "58030", "25006"]
REFUSING = ["54000", "22001", "22021", "22P05", "23502", "23505", "42703", "42P01"]
OTHER = ["57014", "25P02", "55000", "XX000", "P0001", "0A000"]


class ErrorOfPostgres(psycopg2.OperationalError):
    """By its class it may be anything."""

    pgcode: Any = None


def of_postgres(sqlstate: str | None) -> Exception:
    error = ErrorOfPostgres("the text")
    error.pgcode = sqlstate
    return error


def of_sqlite(name: str) -> Exception:
    error = sqlite3.OperationalError("the text")
    setattr(error, "sqlite_errorname", name)  # noqa: B010  Python 3.10 has no such attribute
    return error


def raised_from(cause: Exception, error: Exception) -> Exception:
    error.__cause__ = cause
    return error


def answered(error: Exception) -> Exception:
    """What the receiving process gets of an error in an event persister with the module."""
    persister = staging_of()
    servlet = SimpleNamespace(
        federation_event_handler=SimpleNamespace(**{synapse._READS_CAUSE: persister._cause_of})
    )

    async def persist(*_: Any) -> None:
        raise error

    with pytest.raises(SynapseError) as caught:
        asyncio.run(synapse._handing_on(persist)(servlet, None, None))
    body = encode_canonical_json(caught.value.error_dict(None))
    assert b"the text" not in body
    response = HttpResponseException(caught.value.code, "Internal Server Error", body)
    return response.unsafe_to_verbatim_synapse_error()


def staging_of(**of_handler: Any) -> SynapseStaging:
    """With these functions of Synapse's handler."""
    store = SimpleNamespace(remove_received_event_from_staging=removed)
    handler = SimpleNamespace(room_queues={}, **of_handler)
    homeserver: Any = SimpleNamespace(
        hs=SimpleNamespace(get_federation_event_handler=lambda: handler),
        store=store,
        place=SimpleNamespace(serves=lambda resource: True),
        server_name="test",
        now_ms=lambda: 0,
        steady_ms=lambda: 0,
        replace=lambda owner, name, make: setattr(owner, name, make(getattr(owner, name))),
        enter=setattr,
    )
    return SynapseStaging(homeserver, Held(), Received(homeserver))


async def removed(origin: str, event_id: str) -> int:
    """When the staged PDU that is removed was received."""
    return 5


@pytest.mark.requirement("H2")
@pytest.mark.parametrize(
    ("verdict", "sqlstate"),
    [
        *((PASSES, sqlstate) for sqlstate in (*PASSING, None)),
        *((REFUSED, sqlstate) for sqlstate in REFUSING),
        *((UNKNOWN, sqlstate) for sqlstate in OTHER),
    ],
)
def test_the_sqlstate_tells_whatever_the_class(verdict: Verdict, sqlstate: str | None) -> None:
    staging, error = staging_of(), of_postgres(sqlstate)
    assert staging.verdict_of(error) is verdict
    assert staging.verdict_of(raised_from(error, Exception("while fetching"))) is verdict
    # In the process that received the PDU, too.
    assert staging.verdict_of(answered(error)) is verdict


@pytest.mark.requirement("H2")
@pytest.mark.parametrize(
    ("verdict", "error"),
    [
        (PASSES, psycopg2.InterfaceError("connection already closed")),
        (PASSES, ConnectionLost()),
        (UNKNOWN, psycopg2.ProgrammingError("no results to fetch")),
        (PASSES, raised_from(OSError("refused"), SynapseError(502, "Failed to talk to it"))),
        (UNKNOWN, SynapseError(502, "Bad Gateway")),
        (UNKNOWN, SynapseError(500, "Internal server error")),
        (UNKNOWN, SynapseError(500, "", additional_fields={synapse._CAUSE: {"new": 1}})),
        (None, SynapseError(403, "Not allowed")),
        (None, FederationError("ERROR", 403, "No prev_events", affected="$e")),
        (None, KeyError("anything")),
    ],
    ids=repr,
)
def test_other_errors(verdict: Verdict | None, error: Exception) -> None:
    assert staging_of().verdict_of(error) is verdict


@pytest.mark.requirement("H2")
@pytest.mark.parametrize(
    ("verdict", "name"),
    [
        *((PASSES, f"SQLITE_{name}") for name in ("LOCKED", "BUSY", "BUSY_SNAPSHOT", "FULL")),
        *((PASSES, f"SQLITE_{name}") for name in ("IOERR", "IOERR_WRITE", "READONLY")),
        *((REFUSED, f"SQLITE_{name}") for name in ("TOOBIG", "CONSTRAINT_UNIQUE")),
        *((UNKNOWN, f"SQLITE_{name}") for name in ("ERROR", "INTERRUPT")),
    ],
)
def test_errors_of_sqlite(verdict: Verdict, name: str) -> None:
    assert staging_of().verdict_of(of_sqlite(name)) is verdict


# As Python before 3.11 raises them, too: without SQLite's name.
PASSING_OF_SQLITE = [
    *(f"database is {what}" for what in ("locked", "busy")),
    *("database or disk is full", "disk I/O error", "attempt to write a readonly database"),
    "unable to open database file",
]


@pytest.mark.requirement("H1", "H2")
@pytest.mark.parametrize(
    "error",
    [
        *map(sqlite3.OperationalError, PASSING_OF_SQLITE),
        *map(of_sqlite, ("SQLITE_BUSY", "SQLITE_FULL")),
        psycopg2.OperationalError("connection refused"),
        psycopg2.InterfaceError("connection already closed"),
        ConnectionLost(),
        *map(of_postgres, PASSING),
        of_postgres(None),
    ],
    ids=repr,
)
def test_an_outage(error: Exception) -> None:
    assert is_outage(error)
    assert staging_of().verdict_of(error) is PASSES


@pytest.mark.requirement("H1", "H2")
@pytest.mark.parametrize(
    "error",
    [
        sqlite3.OperationalError("no such column"),
        sqlite3.IntegrityError("UNIQUE constraint failed: full"),
        sqlite3.ProgrammingError("Cannot operate on a closed database."),
        *map(of_postgres, (*REFUSING, *OTHER)),
        psycopg2.ProgrammingError("can't adapt type"),
        ValueError("A string literal cannot contain NUL (0x00) characters."),
        OSError("connection lost"),
    ],
    ids=repr,
)
def test_no_outage(error: Exception) -> None:
    """It is about what was asked, or nobody knows: others may have more luck."""
    assert not is_outage(error)


@pytest.mark.requirement("H2")
@pytest.mark.parametrize(
    ("is_lost", "error"),
    [
        *((True, of_postgres(sqlstate)) for sqlstate in (None, "08006", "57P02")),
        (True, psycopg2.InterfaceError("connection already closed")),
        (True, ConnectionLost()),
        *((False, of_postgres(sqlstate)) for sqlstate in ("40001", "53100", "57P01", "57014")),
        (False, psycopg2.ProgrammingError("no results to fetch")),
        *((False, of_sqlite(name)) for name in ("SQLITE_BUSY", "SQLITE_IOERR")),
    ],
    ids=repr,
)
def test_whether_the_connection_was_lost(is_lost: bool, error: Exception) -> None:
    cause = Cause.of_database(error)
    assert cause is not None
    assert cause.is_lost_connection() is is_lost


def test_a_cause_is_handed_on_as_json() -> None:
    cause = Cause(frozenset({"OperationalError"}), "54000")
    read = Cause.from_json(cause.to_json())
    assert read is not None
    assert (read.classes, read.sqlstate) == (cause.classes, "54000")
    for other in (None, "54000", {}, {**cause.to_json(), "sqlstate": 54000}):
        assert Cause.from_json(other) is None
