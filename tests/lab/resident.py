"""A room of a peer's own, which users of a homeserver join by the peer."""

import re
import secrets
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from synapse.api.room_versions import RoomVersions

from tests.lab.peer import Answer, Peer, PeerRoom, now_ms

_VERSION = RoomVersions.V11
_MAKE_JOIN = re.compile(r"/make_join/[^/]+/([^/?]+)")


class Resident:
    """``eve`` of the peer made the room, and anybody may join.

    Takes ``peer.override`` for itself; its own ``override`` is asked first. ``joining`` is called
    before a join is answered: to the homeserver the room is still unknown then. Who is in
    ``omitted`` is left out of the state that the answer has.
    """

    def __init__(self, peer: Peer, name: str | None = None) -> None:
        """
        Args:
            name: the part of the room ID before the server's name; any by default.
        """
        self.peer = peer
        self.eve = peer.user("eve")
        self.override: Callable[[str, str], Answer | None] = lambda method, path: None
        self.joining: Callable[[], None] = lambda: None
        self.omitted: set[str] = set()
        room_id = f"!{name or secrets.token_hex(9)}:{peer.name}"
        self.room = PeerRoom(room_id, _VERSION, {}, [], 0)
        peer.know(self.room)
        self._state("m.room.create", {"room_version": _VERSION.identifier})
        self.bring(self.eve)
        self._state("m.room.power_levels", {"users": {self.eve: 100}})
        self._state("m.room.join_rules", {"join_rule": "public"})
        peer.override = self._answer
        peer.joined = self._joined

    @property
    def room_id(self) -> str:
        return self.room.room_id

    def bring(self, user_id: str) -> None:
        """This user of the peer joins."""
        self._state("m.room.member", {"membership": "join"}, user_id, user_id)

    def _state(
        self, kind: str, content: Any, state_key: str = "", sender: str | None = None
    ) -> None:
        event_id, _ = self.peer.make(
            self.room, sender or self.eve, content, kind=kind, state_key=state_key
        )
        self.peer.advance(self.room, event_id)

    def _answer(self, method: str, path: str) -> Answer | None:
        if (overridden := self.override(method, path)) is not None:
            return overridden
        made = _MAKE_JOIN.search(path)
        return (200, self._template(unquote(made[1]))) if made else None

    def _template(self, user_id: str) -> Any:
        keys = ("m.room.create", "m.room.power_levels", "m.room.join_rules")
        event = {
            "room_id": self.room_id,
            "type": "m.room.member",
            "sender": user_id,
            "state_key": user_id,
            "content": {"membership": "join"},
            "origin_server_ts": now_ms(),
            "prev_events": self.room.extremities,
            "auth_events": [self.room.state[key, ""] for key in keys],
            "depth": self.room.depth + 1,
        }
        return {"room_version": _VERSION.identifier, "event": event}

    def _joined(self, join_id: str) -> Any:
        self.peer.advance(self.room, join_id)
        self.joining()
        known = [
            self.peer.events[event_id]
            for (_, state_key), event_id in self.room.state.items()
            if state_key not in self.omitted and event_id != join_id
        ]
        return {
            "state": known,
            "auth_chain": known,
            "members_omitted": bool(self.omitted),
            "servers_in_room": [self.peer.name],
        }
