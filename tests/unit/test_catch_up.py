"""What Synapse skips in catch-up is in its backlog, all of it (P2): on a real store."""

from pathlib import Path
from typing import Any

import pytest

from synapse_sticky.handlers.joins.synapse import SynapseFederation
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.rooms import Rooms
from tests.unit.test_limits_in_synapse import done, make_homeserver

ROOM = "!room:here"
END_MS = 2**53


def caught_up(homeserver: Homeserver, sent: set[int]) -> list[tuple[Any, ...]]:
    """The backlog after Synapse, which was at 5, has caught up to its own event at 7."""
    marked = homeserver.store.mark_backlogged_sticky_events_after_catchup_transaction(
        "there",
        old_last_successfully_sent_stream_ordering=5,
        new_last_successfully_sent_stream_ordering=7,
        event_stream_orderings_sent_in_transaction=sent,
    )
    done(marked)

    def read_txn(txn: Cursor) -> list[tuple[Any, ...]]:
        txn.execute("SELECT * FROM destination_rooms_sticky_events_backlog")
        found = txn.fetchall()
        txn.execute("DELETE FROM destination_rooms_sticky_events_backlog")
        return found

    return done(homeserver.transact("read", read_txn))  # type: ignore[no-any-return]


@pytest.mark.requirement("P2", "E4")
def test_the_event_that_it_caught_up_to_is_not_forgotten(tmp_path: Path) -> None:
    hs = make_homeserver(tmp_path)
    homeserver = Homeserver(hs.get_module_api())
    skipped: list[str] = []
    SynapseFederation(homeserver, Rooms(homeserver)).on_skipped(skipped.append)

    def write_txn(txn: Cursor) -> None:
        txn.execute("INSERT INTO rooms (room_id, is_public) VALUES (?, ?)", (ROOM, False))
        txn.execute("INSERT INTO destinations (destination) VALUES (?)", ("there",))
        txn.execute("INSERT INTO destination_rooms VALUES (?, ?, ?)", ("there", ROOM, 7))
        for stream_id, ordering in ((3, 6), (4, 7), (5, 8)):
            txn.execute(
                "INSERT INTO sticky_events (stream_id, instance_name, event_id, room_id, sender,"
                " expires_at, event_stream_ordering) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (stream_id, "master", f"${ordering}", ROOM, "@alice:here", END_MS, ordering),
            )

    done(homeserver.transact("write", write_txn))
    # It sent a later event of the room in the place of the one at 7.
    assert caught_up(homeserver, {8}) == [("there", ROOM, 3)]
    done(
        homeserver.transact(
            "delete", lambda txn: txn.execute("DELETE FROM sticky_events WHERE stream_id = 3")
        )
    )
    assert caught_up(homeserver, {8}) == [("there", ROOM, 4)]
    # It sent the very event.
    assert caught_up(homeserver, {7}) == []
    assert skipped == ["there"] * 3
    homeserver.close()


@pytest.mark.requirement("P2", "H5")
@pytest.mark.parametrize("by_name", [True, False])
def test_however_a_later_synapse_says_up_to_where(tmp_path: Path, by_name: bool) -> None:
    """It may take by position what it takes by name only today."""
    homeserver = Homeserver(make_homeserver(tmp_path).get_module_api())
    asked: list[tuple[str, int, int]] = []

    async def mark(
        destination: str,
        old_last_successfully_sent_stream_ordering: int,
        new_last_successfully_sent_stream_ordering: int,
    ) -> None:
        old = old_last_successfully_sent_stream_ordering
        asked.append((destination, old, new_last_successfully_sent_stream_ordering))

    name = "mark_backlogged_sticky_events_after_catchup_transaction"
    setattr(homeserver.store, name, mark)
    SynapseFederation(homeserver, Rooms(homeserver)).on_skipped(lambda _: None)
    replaced = getattr(homeserver.store, name)
    if by_name:
        done(replaced("there", 5, new_last_successfully_sent_stream_ordering=7))
    else:
        done(replaced("there", 5, 7))
    assert asked == [("there", 5, 8)]
    homeserver.close()
