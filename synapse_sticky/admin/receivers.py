"""How far each server is that should get an event of this server (E3, P3, P7)."""

from collections.abc import Iterator

from synapse_sticky.admin.facts import Facts, PersistedEvent, Receiver

HAS_IT = ("confirmed", "acknowledged")


def shown(facts: Facts) -> Iterator[tuple[Receiver, str]]:
    """The receivers of the page, each with how far it is."""
    event = facts.event
    if event is None:
        return
    for receiver in facts.receivers:
        yield receiver, _state(receiver, event, facts.is_own_server_allowed)


def lacking(facts: Facts) -> list[tuple[Receiver, str]]:
    """Those of the page that are known to lack it."""
    return [(r, state) for r, state in shown(facts) if state not in (*HAS_IT, "not recorded")]


def _state(receiver: Receiver, event: PersistedEvent, is_own_server_allowed: bool) -> str:
    if not receiver.is_allowed:
        return "denied by ACL"
    if not is_own_server_allowed:
        return "denies this server by ACL"
    newcomer, at = receiver.newcomer, event.stream_id
    if at is not None and newcomer is not None and newcomer.position > at:
        return "confirmed"
    owes = at is not None and receiver.backlog is not None and receiver.backlog <= at
    if owes or (at is not None and newcomer is not None):
        return "unreachable" if receiver.reachability.failing_since_ms else "waiting"
    up_to = receiver.reachability.acknowledged_up_to
    if up_to is not None and up_to >= event.stream_ordering:
        return "acknowledged"
    return "unreachable" if receiver.reachability.failing_since_ms else "not recorded"
