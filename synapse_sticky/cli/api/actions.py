"""The commands that order something: ``release``, ``discard``, ``exempt``, ``hold``, ``push``;
``actions``, ``end``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from synapse_sticky.cli.api.options import asking
from synapse_sticky.cli.api.printing import say, show_next, show_rows, time_of
from synapse_sticky.cli.durations import duration_of
from synapse_sticky.cli.texts import printable

if TYPE_CHECKING:
    import click

    from synapse_sticky.cli.api.client import Client

_WHO = {
    "server": ("--server", "NAME", "What is of users of this server."),
    "room_id": ("--room", "ROOM_ID", "What is in this room."),
    "sender": ("--sender", "USER_ID", "What is of this user."),
}
_ALL_KNOW = "All processes know of it within ten seconds. Administrators see who ordered it."


def release() -> "click.Command":
    """The command, for click."""
    return _ordering(
        "release",
        "Delivers at once what waits now: of a server, in a room, of a user; of several, what is"
        " all of it. Whatever the limits say, and also what is held.",
        ("synapse-sticky release --server example.org --room '!room:example.org'",),
        ("server", "room_id", "sender"),
    )


def discard() -> "click.Command":
    """The command, for click."""
    return _ordering(
        "discard",
        "Has what waits now never be sticky: of a server, in a room, of a user; of several, what is"
        " all of it. It stays in the timeline. Nobody can undo that, so it asks first.",
        ("synapse-sticky discard --sender '@spam:example.org' --reason spam",),
        ("server", "room_id", "sender"),
        is_final=True,
    )


def push() -> "click.Command":
    """The command, for click."""
    import click

    return asking(
        "push",
        "Sends this server's own sticky events of a room once more to a server that is in it, also"
        " those that it has confirmed: it may have lost them. A room is pushed to a server once a"
        f" minute at most. `why` says which servers have an event. {_ALL_KNOW}",
        ("synapse-sticky push '!room:example.org' other.example --reason 'it was restored'",),
        lambda client, **values: client.post("actions", kind="push", **values),
        _show_action,
        [click.Argument(["room_id"]), click.Argument(["server"]), _reason()],
    )


def exempt() -> "click.Command":
    """The command, for click."""
    return _ordering(
        "exempt",
        "Has a server be without limits for a time, or a user without per_sender. What waits"
        " already waits on.",
        ("synapse-sticky exempt --server example.org --for 2h --reason 'a conference'",),
        ("server", "sender"),
        lasts=True,
    )


def hold() -> "click.Command":
    """The command, for click."""
    return _ordering(
        "hold",
        "Has the sticky events of a server wait for a time. They are persisted, and its"
        " transactions are not refused. When it is over, they are delivered within the limits.",
        ("synapse-sticky hold --server flood.example --for 10m",),
        ("server",),
        lasts=True,
    )


def actions() -> "click.Command":
    """The command, for click."""
    import click

    return asking(
        "actions",
        "Lists what administrators have ordered, in force or over, the latest first.",
        ("synapse-sticky actions --token-file admin.token",),
        lambda client, limit, after: client.get("actions", limit=limit, **{"from": after}),
        _show_actions,
        [
            click.Option(["--limit"], type=click.IntRange(1, 500), default=20, show_default=True),
            click.Option(["--from", "after"], metavar="NEXT", help="Go on where a page has ended."),
        ],
    )


def end() -> "click.Command":
    """The command, for click."""
    import click

    return asking(
        "end",
        "Ends what an administrator has ordered, before its time. `actions` lists it.",
        ("synapse-sticky end ACTION_ID --token-file admin.token",),
        lambda client, action_id: client.delete("actions", action_id),
        _show_action,
        [click.Argument(["action_id"])],
    )


def _reason() -> "click.Parameter":
    import click

    return click.Option(["--reason"], help="Why, for other administrators.")


def _ordering(
    kind: str,
    description: str,
    lines: Sequence[str],
    whom: Sequence[str],
    *,
    lasts: bool = False,
    is_final: bool = False,
) -> "click.Command":
    """A command that orders something of this kind, of those who are given.

    Args:
        lasts: whether it is in force for as long as is said.
        is_final: whether it asks first, as nobody can undo it.
    """
    import click

    params: list[click.Parameter] = []
    for name in whom:
        flag, metavar, text = _WHO[name]
        is_needed = len(whom) == 1
        option = click.Option([flag, name], metavar=metavar, help=text, required=is_needed)
        params.append(option)
    if lasts:
        params.append(
            click.Option(
                ["--for", "for_ms"],
                metavar="DURATION",
                default="1h",
                show_default=True,
                callback=duration_of,
                help="For how long, from 1m to 7d.",
            )
        )
    params.append(_reason())
    if is_final:
        params.append(click.Option(["--yes"], is_flag=True, help="Do not ask first."))

    def order(client: "Client", *, yes: bool = False, **values: Any) -> Any:
        if not any(values[name] for name in whom):
            flags = [_WHO[name][0] for name in whom]
            raise click.UsageError(f"Say of whom: {' or '.join(flags)}.")
        if is_final and not yes:
            question = f"{kind.capitalize()} what waits of {_whom(values)}?"
            click.confirm(printable(question), abort=True, err=True)
        return client.post("actions", kind=kind, **values)

    return asking(kind, f"{description} {_ALL_KNOW}", lines, order, _show_action, params)


def _show_action(action: Any) -> None:
    state = "is in force" if action["in_force"] else "is over"
    lasts = action["kind"] in ("hold", "exempt")
    until = f", until {time_of(action['until_ms'])}" if lasts else ""
    say(f"{action['kind']} of {_whom(action)} {state}{until} ({action['action_id']})")


def _show_actions(answer: Any) -> None:
    show_rows(
        ("ID", "what", "of", "in force", "by", "at", "until", "why", "ended by"),
        (
            (
                *(a["action_id"], a["kind"], _whom(a), "yes" if a["in_force"] else "no"),
                *(a["made_by"], time_of(a["made_ms"]), time_of(a["until_ms"])),
                *(a["reason"], a["ended_by"]),
            )
            for a in answer["actions"]
        ),
    )
    show_next(answer)


def _whom(action: Any) -> str:
    return ", ".join(action[name] for name in _WHO if action[name])
