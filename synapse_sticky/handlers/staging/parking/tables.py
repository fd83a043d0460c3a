"""The table of parked PDUs."""

import json
from collections.abc import Collection, Mapping, Sequence

from synapse_sticky.handlers.staging.parking.pdus import (
    LONGEST_MS,
    Outcome,
    ParkedPdu,
    ScheduledPdu,
    StageTxn,
)
from synapse_sticky.handlers.staging.parking.places import Evicted, make_place_txn
from synapse_sticky.handlers.staging.parking.reasons import LONGEST, counts_by_name
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.database import portions
from synapse_sticky.homeserver.layout import Migrations, Waiting, migrate

_COLUMNS = (
    "origin, event_id, room_id, event_json, internal_metadata, prev_event_ids, auth_event_ids"
)

_ROOMS_AT_ONCE = 50
"""How many pairs of origin and room are tried in one go. The others follow a second later."""


class ParkedTable:
    """Parked PDUs (L3). Every method is one transaction.

    The table has the name that version 0.1.0 of this module gave it: processes of that version may
    use it at the same time.
    """

    duty = "parking"
    contents = "parked PDUs. They were acknowledged, and never arrive"
    waiting: Waiting = (
        "parked PDUs",
        "SELECT COUNT(*) FROM synapse_sticky_incomplete WHERE ? < until_ms",
    )
    migrations: Migrations = (
        (
            """
            CREATE TABLE IF NOT EXISTS synapse_sticky_incomplete (
                origin TEXT NOT NULL,
                event_id TEXT NOT NULL,
                room_id TEXT NOT NULL,
                event_json TEXT NOT NULL,
                internal_metadata TEXT NOT NULL,
                prev_event_ids TEXT NOT NULL,
                received_ts_ms BIGINT NOT NULL,
                until_ms BIGINT NOT NULL,
                due_ms BIGINT NOT NULL,
                PRIMARY KEY (origin, event_id)
            )
            """,
            """
            CREATE INDEX IF NOT EXISTS synapse_sticky_incomplete_due
                ON synapse_sticky_incomplete (due_ms)
            """,
            """
            CREATE INDEX IF NOT EXISTS synapse_sticky_incomplete_room
                ON synapse_sticky_incomplete (origin, room_id, received_ts_ms)
            """,
        ),
        (
            "ALTER TABLE synapse_sticky_incomplete"
            " ADD COLUMN IF NOT EXISTS tries BIGINT NOT NULL DEFAULT 0",
        ),
        (
            "ALTER TABLE synapse_sticky_incomplete"
            " ADD COLUMN IF NOT EXISTS auth_event_ids TEXT NOT NULL DEFAULT '[]'",
            """
            CREATE INDEX IF NOT EXISTS synapse_sticky_incomplete_event
                ON synapse_sticky_incomplete (event_id)
            """,
        ),
        (
            "ALTER TABLE synapse_sticky_incomplete"
            " ADD COLUMN IF NOT EXISTS outside BIGINT NOT NULL DEFAULT 0",
        ),
        # For administrators. Rows of before have none.
        (
            "ALTER TABLE synapse_sticky_incomplete ADD COLUMN IF NOT EXISTS reason TEXT",
            """
            CREATE INDEX IF NOT EXISTS synapse_sticky_incomplete_reason
                ON synapse_sticky_incomplete (room_id, reason, event_id)
            """,
        ),
        (
            """
            CREATE INDEX IF NOT EXISTS synapse_sticky_incomplete_outside
                ON synapse_sticky_incomplete (outside, room_id, origin)
            """,
        ),
    )

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._is_there = False

    async def prepare(self) -> None:
        """Makes the table, or brings it to this version's layout.

        Raises:
            NewerLayoutError: a later version of the module made it.
        """
        await migrate(self._homeserver, self)
        self._is_there = True

    async def park(
        self,
        pdu: ParkedPdu,
        until_ms: int,
        due_ms: int,
        counted_due_ms: Sequence[int] = (),
        *,
        received_ts_ms: int | None = None,
        why: str | None = None,
    ) -> tuple[Outcome, Evicted | None]:
        """Parks a PDU until it expires. Does not wait long for a table that is locked. Gives the
        PDU that had its place, too, if one had.

        Args:
            until_ms: when it expires, in ms since the epoch.
            due_ms: when it is tried again first, likewise. One that is parked already stays due
                when it is.
            counted_due_ms: given if this failure counts. When the PDU is due, in place of
                ``due_ms``, after each failure that counts; after one more it is given up.
            received_ts_ms: when it was received, likewise; now if it is None.
            why: for the administrator; the first 200 characters of it are stored.
        """
        now_ms = self._homeserver.now_ms()
        at_ms = now_ms if received_ts_ms is None else min(received_ts_ms, now_ms)

        def write_txn(txn: Cursor) -> tuple[Outcome, Evicted | None]:
            key = (pdu.origin, pdu.event_id)
            where = "synapse_sticky_incomplete WHERE origin = ? AND event_id = ?"
            txn.execute(f"SELECT tries FROM {where}", key)
            row = txn.fetchone()
            if row is not None and not counted_due_ms:
                return Outcome.STILL_PARKED, None
            tries = (row[0] if row else 0) + (1 if counted_due_ms else 0)
            if tries > len(counted_due_ms):
                txn.execute(f"DELETE FROM {where}", key)
                return Outcome.GIVEN_UP, None
            first_due_ms = counted_due_ms[tries - 1] if tries else due_ms
            if row is not None:
                txn.execute(
                    "UPDATE synapse_sticky_incomplete SET tries = ?, due_ms = ?"
                    " WHERE origin = ? AND event_id = ?",
                    (tries, first_due_ms, *key),
                )
                return Outcome.STILL_PARKED, None
            place = make_place_txn(txn, pdu)
            if place is None:
                return Outcome.FULL, None
            txn.execute(
                "INSERT INTO synapse_sticky_incomplete"
                f" ({_COLUMNS}, received_ts_ms, until_ms, due_ms, tries, outside, reason)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (origin, event_id) DO NOTHING",
                (
                    *(*key, pdu.room_id, pdu.event_json, pdu.internal_metadata),
                    *(json.dumps(pdu.prev_event_ids), json.dumps(pdu.auth_event_ids)),
                    *(at_ms, until_ms, first_due_ms, tries, int(pdu.is_outside)),
                    why and _storable(why),
                ),
            )
            return Outcome.PARKED, place.evicted

        return await self._homeserver.transact_briefly("park", write_txn)

    def received_txn(self, txn: Cursor, event_ids: Collection[str]) -> dict[str, int]:
        """When those of the events that are parked, whoever sent them, were received first, in ms
        since the epoch. None while the table is not there."""
        found: dict[str, int] = {}
        for portion in portions(event_ids) if self._is_there else ():
            clause, args = self._homeserver.in_list("event_id", portion)
            txn.execute(
                "SELECT event_id, MIN(received_ts_ms) FROM synapse_sticky_incomplete"
                f" WHERE {clause} GROUP BY event_id",
                args,
            )
            found.update(txn.fetchall())
        return found

    async def remove(self, origin: str, event_id: str) -> None:
        """The PDU is not parked any more, if it was.

        Does not wait long for a table that is locked.
        """

        def write_txn(txn: Cursor) -> None:
            txn.execute(
                "DELETE FROM synapse_sticky_incomplete WHERE origin = ? AND event_id = ?",
                (origin, event_id),
            )

        await self._homeserver.transact_briefly("remove_parked", write_txn)

    async def due(self, without: Collection[tuple[str, str]] = ()) -> list[tuple[str, str]]:
        """The origins and rooms that have PDUs to be tried now: ``(origin, room_id)``, at most 50,
        the longest overdue first.

        Args:
            without: pairs that are left out.
        """

        def read_txn(txn: Cursor) -> list[tuple[str, str]]:
            now_ms = self._homeserver.now_ms()
            txn.execute(
                "SELECT origin, room_id FROM synapse_sticky_incomplete"
                " WHERE due_ms <= ? OR due_ms > ?"
                " GROUP BY origin, room_id ORDER BY MIN(due_ms) LIMIT ?",
                (now_ms, now_ms + LONGEST_MS, _ROOMS_AT_ONCE + len(without)),
            )
            pairs = [(origin, room_id) for origin, room_id in txn.fetchall()]
            return [pair for pair in pairs if pair not in without][:_ROOMS_AT_ONCE]

        return await self._homeserver.transact("due_parked", read_txn)

    async def postpone(self, origin: str, room_id: str, by_ms: int) -> int:
        """Puts all PDUs of the origin for the room off by this time, and deletes expired ones.
        Gives how many these were."""

        def write_txn(txn: Cursor) -> int:
            where = "WHERE origin = ? AND room_id = ?"
            now_ms = self._homeserver.now_ms()
            expired = f"FROM synapse_sticky_incomplete {where} AND until_ms <= ?"
            txn.execute(f"SELECT COUNT(*) {expired}", (origin, room_id, now_ms))
            ((count,),) = txn.fetchall()
            txn.execute(f"DELETE {expired}", (origin, room_id, now_ms))
            txn.execute(
                f"UPDATE synapse_sticky_incomplete SET due_ms = ? {where}",
                (now_ms + by_ms, origin, room_id),
            )
            return int(count)

        return await self._homeserver.transact("postpone_parked", write_txn)

    async def ahead(self) -> tuple[int | None, Mapping[str, int]]:
        """When the next parked PDU is to be tried, None if none is parked; and how many are, by the
        name of the reason (``metrics.REASONS``)."""

        def read_txn(txn: Cursor) -> tuple[int | None, Mapping[str, int]]:
            txn.execute("SELECT MIN(due_ms) FROM synapse_sticky_incomplete")
            ((due_ms,),) = txn.fetchall()
            # There is an index with it: the PDUs are not read.
            txn.execute(
                f"SELECT substr(reason, 1, {LONGEST}) AS words, COUNT(*)"
                " FROM synapse_sticky_incomplete GROUP BY words"
            )
            return due_ms, counts_by_name(txn.fetchall())

        return await self._homeserver.transact("next_parked_ms", read_txn)

    async def of_room(self, origin: str, room_id: str) -> list[ScheduledPdu]:
        """The parked PDUs of the origin for the room, those received first in front."""

        def read_txn(txn: Cursor) -> list[ScheduledPdu]:
            txn.execute(
                "SELECT event_id, prev_event_ids, received_ts_ms, until_ms, due_ms, tries,"
                " auth_event_ids FROM synapse_sticky_incomplete WHERE origin = ? AND room_id = ?"
                " ORDER BY received_ts_ms, event_id",
                (origin, room_id),
            )
            return [
                ScheduledPdu(event_id, _event_ids(prevs), at, until, due, tries, _event_ids(auths))
                for event_id, prevs, at, until, due, tries, auths in txn.fetchall()
            ]

        return await self._homeserver.transact("parked", read_txn)

    async def stage_again(
        self,
        origin: str,
        room_id: str,
        to_stage: Sequence[ScheduledPdu],
        *,
        ended: Sequence[ScheduledPdu],
        due_ms: Mapping[ScheduledPdu, int],
        stage_txn: StageTxn,
    ) -> set[str]:
        """Stages these PDUs again, in this order. They stay parked, in case they fail again. Gives
        the IDs of those that this has deleted, and no other process before.

        A PDU that is not due any more when it was due is left as it is: another process has just
        staged it.

        Args:
            to_stage: PDUs as ``of_room`` gave them.
            ended: those that are persisted or expired; they are deleted.
            due_ms: when PDUs are tried next, in ms since the epoch.
            stage_txn: puts PDUs of the room into Synapse's staging area.
        """

        def write_txn(txn: Cursor) -> set[str]:
            deleted = {pdu.event_id for pdu in ended}
            if deleted:
                where = "WHERE origin = ? AND room_id = ?"
                sql = f"SELECT event_id FROM synapse_sticky_incomplete {where}"
                txn.execute(sql, (origin, room_id))
                deleted &= {event_id for (event_id,) in txn.fetchall()}
            txn.execute_batch(
                "DELETE FROM synapse_sticky_incomplete WHERE origin = ? AND event_id = ?",
                [(origin, event_id) for event_id in deleted],
            )
            pdus = []
            for scheduled in to_stage:
                txn.execute(
                    f"SELECT {_COLUMNS} FROM synapse_sticky_incomplete"
                    " WHERE origin = ? AND event_id = ? AND due_ms = ?",
                    (origin, scheduled.event_id, scheduled.due_ms),
                )
                if (row := txn.fetchone()) is not None:
                    of, event, room, event_json, metadata, *ids = row
                    prevs, auths = map(_event_ids, ids)
                    pdus.append(ParkedPdu(of, event, room, event_json, metadata, prevs, auths))
            txn.execute_batch(
                "UPDATE synapse_sticky_incomplete SET due_ms = ?"
                " WHERE origin = ? AND event_id = ? AND due_ms = ?",
                [(then_ms, origin, pdu.event_id, pdu.due_ms) for pdu, then_ms in due_ms.items()],
            )
            stage_txn(txn, room_id, pdus)
            return deleted

        return await self._homeserver.transact("stage_again", write_txn)


def _event_ids(of_json: str) -> tuple[str, ...]:
    return tuple(json.loads(of_json))


def _storable(why: str) -> str:
    """A database's own words may be in it."""
    return why[:200].replace("\0", "").encode(errors="replace").decode()
