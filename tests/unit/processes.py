"""Two processes of one homeserver, with stores, caches and an index each and one database, which
are real. What one of them tells the other by replication is handed on as it is.
"""

import json
import sqlite3
from pathlib import Path
from typing import Any, cast

import attr
from synapse.api.room_versions import RoomVersions
from synapse.app.homeserver import SynapseHomeServer
from synapse.config.homeserver import HomeServerConfig
from synapse.events import EventBase, make_event_from_dict

from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.clock import SetClock
from synapse_sticky.homeserver.stream import NAME as STREAM
from synapse_sticky.index import IndexFollower
from synapse_sticky.index.synapse import SynapseStickyStream
from tests.unit.configuration import configuration
from tests.unit.test_limits_in_synapse import (
    FIELD,
    HOUR_MS,
    Reactor,
    done,
    insert,
    run_sql,
    run_synchronously,
)

ROOM, ALICE, BOB, MALLORY = "!room:here", "@alice:here", "@bob:there", "@mallory:here"
FLAG = "org.matrix.msc4293.redact_events"


def make_homeserver(folder: Path) -> SynapseHomeServer:
    options = configuration(folder)
    options["experimental_features"]["msc4293_enabled"] = True
    config = HomeServerConfig()
    config.parse_config_dict(options, "", "")
    reactor: Any = Reactor()  # type: ignore[no-untyped-call]
    reactor.rightNow = 1_800_000_000
    hs = SynapseHomeServer("here", config=config, reactor=reactor)
    hs.setup()
    run_synchronously(hs)
    return hs


@attr.s(auto_attribs=True)
class Process:
    """A process with an index, and what it has told the others: a cache's name, and the entry."""

    hs: SynapseHomeServer
    homeserver: Homeserver = attr.ib(init=False)
    told: list[tuple[str, list[Any]]] = attr.Factory(list)
    failing: int = 0

    def __attrs_post_init__(self) -> None:
        api, reactor = self.hs.get_module_api(), cast("Any", self.hs.get_reactor())
        self.homeserver = Homeserver(api)
        self.homeserver._clock.close()
        # Time passes when a test says so.
        self.homeserver._clock = SetClock(
            api.get_current_time_msec,
            api.delayed_background_call,
            reactor.callFromThread,
            reactor.seconds,
        )
        send = self.store._send_invalidation_to_replication

        def note(txn: Cursor, cache_name: str, keys: Any) -> None:
            if self.failing:
                self.failing -= 1
                raise sqlite3.DatabaseError("for the test")
            send(txn, cache_name, keys)
            self.told.append((cache_name, list(keys)))

        self.homeserver.enter(self.store, "_send_invalidation_to_replication", note)

    @property
    def store(self) -> Any:
        return self.hs.get_datastores().main

    def start(self) -> IndexFollower:
        # Where it has persisted nothing itself, it hears of what others have.
        ids = self.store.get_sticky_events_stream_id_generator()
        ((last,),) = run_sql(self.homeserver, "SELECT MAX(stream_id) FROM sticky_events")
        if ids.get_current_token() < last:
            self.store.process_replication_position(STREAM, "master", last)
        self.follower = IndexFollower(self.homeserver, SynapseStickyStream(self.homeserver))
        self.follower.start()
        assert self.follower.in_step()
        return self.follower

    def hand_on_to(self, other: "Process") -> None:
        told, self.told = self.told, []
        for cache_name, keys in told:
            other.store._attempt_to_invalidate_cache(cache_name, keys)

    def shows(self, event: EventBase) -> bool:
        """Is it in the index, and is it whole in what Synapse loads?"""
        (loaded,) = done(self.store.get_events_as_list([event.event_id]))
        in_index = event.event_id in self.follower.index
        assert not self.follower.doubts([[event.event_id]])
        assert in_index is (loaded.sticky_duration() is not None)
        return in_index


class Room:
    """What the database has of a room."""

    def __init__(self, homeserver: Homeserver) -> None:
        self.homeserver = homeserver

    def make(self) -> None:
        sql = "INSERT INTO rooms (room_id, is_public, room_version) VALUES (?, FALSE, '11')"
        run_sql(self.homeserver, sql, ROOM)
        self.state("m.room.create", "", ALICE, {})
        levels = {ALICE: 100, BOB: 0}
        self.state("m.room.power_levels", "", ALICE, {"users": levels, "redact": 50})

    def event(self, sender: str, event_type: str, content: Any, **fields: Any) -> EventBase:
        ((number,),) = run_sql(
            self.homeserver, "SELECT 1 + COALESCE(MAX(stream_ordering), 0) FROM events"
        )
        event = make_event_from_dict(
            {
                "type": event_type,
                "room_id": ROOM,
                "sender": sender,
                "content": content,
                "origin_server_ts": self.homeserver.now_ms(),
                "depth": number,
                "auth_events": [],
                "prev_events": [],
                "hashes": {"sha256": "x"},
                "signatures": {},
                **fields,
            },
            RoomVersions.V11,
            {},
        )
        event.internal_metadata.stream_ordering = number
        event.internal_metadata.instance_name = "master"
        run_sql(
            self.homeserver,
            "INSERT INTO event_json (event_id, room_id, internal_metadata, json, format_version)"
            " VALUES (?, ?, '{}', ?, 3)",
            *(event.event_id, ROOM, json.dumps(event.get_dict())),
        )
        run_sql(
            self.homeserver,
            "INSERT INTO events (event_id, room_id, stream_ordering, topological_ordering, depth,"
            " type, processed, outlier, received_ts, sender, instance_name)"
            " VALUES (?, ?, ?, ?, ?, ?, TRUE, FALSE, ?, ?, 'master')",
            *(event.event_id, ROOM, number, number, number, event_type),
            *(self.homeserver.now_ms(), sender),
        )
        return event

    def sticky(self, sender: str) -> EventBase:
        event = self.event(sender, "m.room.message", {}, **{FIELD: {"duration_ms": HOUR_MS}})
        insert(self.homeserver, [event])
        return event

    def state(self, event_type: str, state_key: str, sender: str, content: Any) -> EventBase:
        event = self.event(sender, event_type, content, state_key=state_key)
        row = (event.event_id, ROOM, event_type, state_key)
        membership = content.get("membership")
        run_sql(
            self.homeserver,
            "INSERT OR REPLACE INTO current_state_events"
            " (event_id, room_id, type, state_key, membership) VALUES (?, ?, ?, ?, ?)",
            *(*row, membership),
        )
        run_sql(
            self.homeserver,
            "INSERT INTO current_state_delta_stream (event_id, room_id, type, state_key, stream_id,"
            " instance_name) VALUES (?, ?, ?, ?, ?, 'master')",
            *(*row, event.internal_metadata.stream_ordering),
        )
        if membership:
            run_sql(
                self.homeserver,
                "INSERT INTO room_memberships (event_id, room_id, user_id, sender, membership)"
                " VALUES (?, ?, ?, ?, ?)",
                *(event.event_id, ROOM, state_key, sender, membership),
            )
        return event

    def member(
        self, user_id: str, membership: str, sender: str, *, redacts: bool = False
    ) -> EventBase:
        content = {"membership": membership, **({FLAG: True} if redacts else {})}
        return self.state("m.room.member", user_id, sender, content)
