"""``GET events/{event_id}``: the way of one event, and why it has not been delivered (E3)."""

from typing import Any

import attr

from synapse_sticky.admin.asking import Asking
from synapse_sticky.admin.facts import Facts
from synapse_sticky.admin.receivers import shown
from synapse_sticky.admin.requests import Request, identifier, wrong
from synapse_sticky.admin.verdicts import reasons, verdict
from synapse_sticky.admin.way import Verdict, way


class Why:
    """Answers for one event."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking

    async def get(self, request: Request) -> dict[str, Any]:
        """The answer. Raises ``SynapseError`` (400) if a parameter is not as it must be."""
        request.only("room_id", "sender", "server", "from", "limit")
        event_id = identifier("event_id", request.path[1])
        if not event_id.startswith("$"):
            raise wrong("'event_id' must begin with '$'")
        room_id, server = request.text("room_id"), _server_of(request)
        after, limit = request.token() or "", request.limit()
        facts = await self._asking.facts(event_id, after, limit)
        if not facts.is_here:
            return await self._not_here(facts, room_id, server)
        said = verdict(facts)
        return {
            **_head(facts, said),
            "reasons": [attr.asdict(said)],
            "receivers": [
                {
                    "server": receiver.server,
                    "state": state,
                    "newcomer_since_ms": receiver.newcomer.joined_ms if receiver.newcomer else None,
                    "failing_since_ms": receiver.reachability.failing_since_ms,
                    "next_try_ms": receiver.reachability.next_try_ms,
                }
                for receiver, state in shown(facts)
            ],
            "receivers_total": facts.receivers_count,
            **({"next": facts.receivers_next} if facts.receivers_next is not None else {}),
        }

    async def _not_here(
        self, facts: Facts, room_id: str | None, server: str | None
    ) -> dict[str, Any]:
        absence = await self._asking.absence(room_id, server, facts)
        found = list(reasons(absence, facts))
        said = Verdict("not_here", "This server does not have the event.", found[0].to_do)
        answer = _head(facts, said)
        answer["room_id"] = room_id
        answer["reasons"] = [attr.asdict(reason) for reason in found]
        return {**answer, "receivers": [], "receivers_total": 0}


def _head(facts: Facts, said: Verdict) -> dict[str, Any]:
    event, waiting = facts.event, facts.staged or facts.parked
    return {
        "event_id": facts.event_id,
        "room_id": event.room_id if event else waiting.room_id if waiting else None,
        "sender": event.sender if event else None,
        "type": event.type if event else None,
        "now_ms": facts.now_ms,
        "verdict": attr.asdict(said),
        "steps": [attr.asdict(step) for step in way(facts)],
    }


def _server_of(request: Request) -> str | None:
    """The server that the event is said to be of."""
    server, sender = request.text("server"), request.text("sender")
    if sender is not None:
        name = sender.partition(":")[2]
        if not sender.startswith("@") or not name:
            raise wrong("'sender' must be a user ID")
        if server is not None and server != name:
            raise wrong("'server' is not that of 'sender'")
        return name
    return server
