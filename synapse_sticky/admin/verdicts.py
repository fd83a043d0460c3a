"""Why an event has not been delivered, in one sentence, and what to do about it (E3)."""

from collections.abc import Iterator

from synapse_sticky.admin.asking import Absence
from synapse_sticky.admin.facts import Facts, PersistedEvent
from synapse_sticky.admin.receivers import lacking
from synapse_sticky.admin.way import NOT_RECORDED, Verdict, limit_of

_NOTHING = "Nothing."


def verdict(facts: Facts) -> Verdict:
    """Where an event is that this server has, or has acknowledged."""
    event = facts.event
    if event is None or facts.is_on_its_way:
        return _on_the_way(facts)
    return (
        _of_content(event)
        or _of_limits(facts)
        or _of_time(facts, event)
        or _of_stream(facts, event)
        or _of_receivers(facts, event)
        or _of_page(facts)
        or Verdict(
            "delivered",
            "It is delivered to the joined users of this server.",
            "If a client lacks it: is its user joined, and does the user ignore the sender?",
        )
    )


def _on_the_way(facts: Facts) -> Verdict:
    if facts.parked is not None:
        return Verdict(
            "parked",
            f"It was acknowledged and cannot be persisted yet: {facts.parked.why or NOT_RECORDED}.",
            "See whether this server reaches the servers of the room: what is missing is fetched"
            " from them. It is tried again until it expires.",
        )
    return Verdict(
        "staged",
        "It was acknowledged and waits to be processed.",
        "Wait. If that takes minutes, this server cannot keep up with the room.",
    )


def _of_content(event: PersistedEvent) -> Verdict | None:
    if event.is_redacted or event.is_censored:
        by = ", ".join(event.redacted_by) or "a ban or an erasure"
        text = f"It was redacted by {by}, and is not sticky any more."
        return Verdict("redacted", text, _NOTHING)
    if event.duration_ms is None:
        return Verdict("not_sticky", "It is not sticky: its sender did not ask for it.", _NOTHING)
    if event.is_outlier:
        return Verdict(
            "outlier",
            "This server fetched it as part of another event's history, and does not deliver it.",
            "It is delivered once the sender's server sends it, or what comes right after it.",
        )
    if event.is_erased:
        return Verdict("erased", "Its sender asked for the erasure of all data.", _NOTHING)
    return _of_checks(event)


def _of_checks(event: PersistedEvent) -> Verdict | None:
    if event.rejected is not None:
        return Verdict(
            "rejected",
            f"The rules of the room do not allow it: {event.rejected}.",
            "Ask the sender's server. No server of the room should have it.",
        )
    if event.refused_by is not None:
        text = f"The {event.refused_by} refused it, so it is not sticky here."
        return Verdict("refused", text, f"See the log of the {event.refused_by}.")
    if event.is_soft_failed:
        return Verdict(
            "soft_failed",
            "It was soft-failed: its sender was allowed to send it then, and is not by the state"
            " that the room has here.",
            "See whether the sender is in the room and may send such events. Once the state allows"
            " it, Synapse delivers it by itself.",
        )
    return None


def _of_limits(facts: Facts) -> Verdict | None:
    deferred = facts.deferred
    ends_ms = facts.event.ends_ms if facts.event else None
    if facts.discarded is not None and ends_ms is not None and facts.now_ms < ends_ms:
        text = f"It waited, and {facts.discarded[0]} has discarded what waited there."
        return Verdict("discarded", text, "Its sender has to send another one.")
    if deferred is None or facts.now_ms >= deferred.expires_at_ms:
        return None
    if facts.held_until_ms is not None:
        text = f"It waits, as an administrator has {deferred.server} held."
        return Verdict("held", text, "End the action, or wait until it is over.")
    limit = limit_of(deferred.limit)
    return Verdict(
        "deferred",
        f"It waits for its turn: it is past {limit}.",
        "Wait, raise the limit, or exempt the server or the user (docs/limits.md).",
    )


def _of_time(facts: Facts, event: PersistedEvent) -> Verdict | None:
    if event.ends_ms is None or facts.now_ms < event.ends_ms:
        return None
    if facts.deferred is not None:
        text = "It expired before its turn: it was deferred until then."
        return Verdict("expired", text, "Raise the limit (docs/limits.md).")
    was = (
        "It was delivered before"
        if event.stream_id is not None
        else ("Whether it was delivered before was not recorded")
    )
    text = f"It has expired: nothing is sticky for longer than an hour. {was}."
    return Verdict("expired", text, "Its sender has to send another one.")


def _of_stream(facts: Facts, event: PersistedEvent) -> Verdict | None:
    if event.stream_id is not None:
        return None
    why = "Why is not recorded."
    if "deferral" in facts.unread:
        why = "The table of deferred events is not there."
    text = f"It is not in the stream of sticky events, so nobody gets it as sticky. {why}"
    return Verdict("not_recorded", text, "See this server's log for the event ID and its room.")


def _of_receivers(facts: Facts, event: PersistedEvent) -> Verdict | None:
    if event.server != facts.own_server or not (lack := lacking(facts)):
        return None
    states = {state for _, state in lack}
    names = ", ".join(receiver.server for receiver, _ in lack[:5])
    text = f"This server's users get it, and other servers lack it: {names}."
    if "denies this server by ACL" in states:
        to_do = "The room's ACL denies this server. Ask the moderators of the room."
        return Verdict("denied_by_acl", text, to_do)
    if "unreachable" in states:
        to_do = "They cannot be reached. It is sent once they can be, unless it expires before."
        return Verdict("unreachable", text, to_do)
    if "waiting" in states:
        return Verdict("being_pushed", text, "Wait: it is being pushed.")
    return Verdict("denied_by_acl", text, "The room's ACL denies them. Ask its moderators.")


def _of_page(facts: Facts) -> Verdict | None:
    if len(facts.receivers) == facts.receivers_count:
        return None
    seen = f"{len(facts.receivers)} of {facts.receivers_count} other servers"
    text = f"This server's users get it. Of {seen}, those of this page, none is known to lack it."
    return Verdict("delivered", text, "Ask for the other pages of receivers as well.")


def reasons(absence: Absence, facts: Facts) -> Iterator[Verdict]:
    """Why an event may not be here; those that are certain first."""
    room_id, server = absence.room_id, absence.server
    if not absence.is_known or not absence.is_joined:
        where = f"This server is not in {room_id}, so other servers do not send it its events."
        yield Verdict("not_in_room", where, "Have a user of this server join the room.")
    if room_id is not None and not absence.is_allowed:
        yield Verdict(
            "denied_by_acl",
            f"The ACL of {room_id} denies {server}: this server drops what it sends to the room.",
            "Ask the moderators of the room to change m.room.server_acl. What is still sticky"
            " then has to be sent again.",
        )
    if absence.is_joined and room_id is not None and not absence.has_member:
        yield Verdict(
            "sender_not_in_room",
            f"No user of {server} is in {room_id}, as far as this server knows.",
            "If the room's state here is wrong, nothing of that server is accepted.",
        )
    if absence.too_many_deferred is not None:
        yield Verdict(
            "refused",
            f"{absence.too_many_deferred} events of {server} wait, so its transactions are refused"
            " (429) until there is room (federation.max_deferred_per_server).",
            "Its server sends it again. Raise the limits, exempt the server, or end its hold.",
        )
    if absence.reachability.failing_since_ms is not None:
        yield Verdict(
            "unreachable",
            f"This server does not reach {server}, which may not reach this one either.",
            "See whether the two servers reach each other.",
        )
    if server == facts.own_server:
        yield Verdict(
            "refused_locally",
            "A user of this server was refused (429, local.per_user), or another module refused"
            " the event. What is refused is not recorded.",
            "See the log of the process that the client talks to.",
        )
    if server is None or room_id is None:
        yield Verdict(
            "say_more",
            "An event ID does not say which server and room it is of.",
            "Ask again with `room_id` and `sender`: then the room's ACL, the members, and what"
            " waits of that server can be looked up.",
        )
    yield Verdict(
        "not_received",
        "This server never had it, or has deleted it with its room. What it was sent and dropped"
        " is not recorded.",
        "Ask the sender's server whether it sent it, and see this server's log for the event ID.",
    )
