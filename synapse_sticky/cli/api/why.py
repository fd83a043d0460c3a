"""The command ``why``: the way of one event, and why it has not been delivered."""

from typing import TYPE_CHECKING, Any

from synapse_sticky.cli.api.options import asking
from synapse_sticky.cli.api.printing import say, show_next, show_rows, time_of

if TYPE_CHECKING:
    import click

    from synapse_sticky.cli.api.client import Client

_HELP = """
Says where an event is, and why it has not been delivered. For an event that this server does not
have, say which room it is of (--room) and who sent it (--sender) as well.
"""
_EXAMPLES = (
    "synapse-sticky why '$event_id' --token-file admin.token",
    "synapse-sticky why '$event_id' --room '!room:example.org' --sender '@user:example.org'",
)


def command() -> "click.Command":
    """The command, for click."""
    import click

    params: list[click.Parameter] = [
        click.Argument(["event_id"], callback=_check_event_id),
        click.Option(["--room"], metavar="ROOM_ID", help="The room that it is said to be of."),
        click.Option(["--sender"], metavar="USER_ID", help="Who is said to have sent it."),
        click.Option(["--server"], metavar="NAME", help="The sender's server, if that is all."),
        click.Option(
            ["--from", "after"],
            metavar="NAME",
            help="Go on with the receivers after this server.",
        ),
    ]
    return asking("why", _HELP, _EXAMPLES, _ask, _show, params)


def _check_event_id(ctx: "click.Context", param: "click.Parameter", value: str) -> str:
    import click

    if not value.startswith("$"):
        raise click.BadParameter(
            f"{value!r} is no event ID, which begins with $. Put it in single quotes: the shell"
            " takes what follows a $ for the name of a variable."
        )
    return value


def _ask(
    client: "Client",
    event_id: str,
    room: str | None,
    sender: str | None,
    server: str | None,
    after: str | None,
) -> Any:
    more = {"room_id": room, "sender": sender, "server": server, "from": after}
    return client.get("events", event_id, **more)


def _show(event: Any) -> None:
    known = [f"{name} {event[name]}" for name in ("type", "sender", "room_id") if event[name]]
    say(f"{event['event_id']}{': ' if known else ''}{', '.join(known)}")
    said: set[str] = set()  # the verdict is one of the reasons, or asks for the same as one
    for reason in (event["verdict"], *event["reasons"]):
        for text in (f"{reason['code']}: {reason['text']}", f"  {reason['to_do']}"):
            if text.strip() and text not in said:
                say(text)
                said.add(text)
    steps = ((s["name"], s["state"], time_of(s["at_ms"]), _text_of(s)) for s in event["steps"])
    show_rows(("step", "state", "when", "what"), steps)
    if event["receivers"]:
        receivers = (
            (r["server"], r["state"], time_of(r["failing_since_ms"]), time_of(r["next_try_ms"]))
            for r in event["receivers"]
        )
        say(f"These are of {event['receivers_total']} other servers in the room:")
        show_rows(("server", "state", "fails since", "next try"), receivers)
        show_next(event)


def _text_of(step: Any) -> str:
    """What is said of a step; of one that waits, also until about when."""
    about_ms = step["details"].get("about_ms")
    text: str = step["text"]
    return f"{text}, about until {time_of(about_ms)}" if isinstance(about_ms, int) else text
