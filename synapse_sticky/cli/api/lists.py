"""The commands ``rooms`` and ``servers``: where something is sticky or waits, page by page."""

from typing import TYPE_CHECKING, Any

from synapse_sticky.cli.api.options import asking
from synapse_sticky.cli.api.printing import say, show_next, show_rows, time_of

if TYPE_CHECKING:
    import click

    from synapse_sticky.cli.api.client import Client

_ROOMS = ("active", "deferred", "parked", "name")
_SERVERS = ("active", "deferred", "parked", "lacking", "newcomer", "name")


def rooms() -> "click.Command":
    """The command, for click."""
    import click

    return asking(
        "rooms",
        "Lists the rooms in which something is sticky or waits; or, with ROOM_ID, what that is.",
        (
            "synapse-sticky rooms --order-by deferred --token-file admin.token",
            "synapse-sticky rooms '!room:example.org' --token-file admin.token",
        ),
        _ask_rooms,
        _show_rooms,
        [click.Argument(["room_id"], required=False), *_of_page(_ROOMS)],
    )


def servers() -> "click.Command":
    """The command, for click."""
    return asking(
        "servers",
        "Lists the servers that something sticky is of, or that lack something.",
        ("synapse-sticky servers --order-by deferred --token-file admin.token",),
        _ask_servers,
        _show_servers,
        _of_page(_SERVERS),
    )


def _of_page(orders: tuple[str, ...]) -> "list[click.Parameter]":
    import click

    return [
        click.Option(["--order-by"], type=click.Choice(orders), help="The largest come first."),
        click.Option(["--reverse"], is_flag=True, help="The smallest come first."),
        click.Option(
            ["--limit"],
            type=click.IntRange(1, 500),
            default=100,
            show_default=True,
            help="How many at most.",
        ),
        click.Option(["--from", "after"], metavar="NEXT", help="Go on where a page has ended."),
    ]


def _page(order_by: str | None, reverse: bool, limit: int, after: str | None) -> dict[str, Any]:
    # By name, `f` is what one expects.
    is_forward = reverse != (order_by == "name")
    return {
        "order_by": order_by,
        "dir": "f" if is_forward else "b",
        "limit": limit,
        "from": after,
    }


def _ask_rooms(client: "Client", room_id: str | None, **page: Any) -> Any:
    if room_id is None:
        return client.get("rooms", **_page(**page))
    return client.get("rooms", room_id, "events", limit=page["limit"], **{"from": page["after"]})


def _show_rooms(answer: Any) -> None:
    if "events" in answer:
        show_rows(
            ("event", "sender", "type", "state", "why", "since", "ends"),
            (
                (
                    *(e["event_id"], e["sender"], e["type"], e["state"], e["why"]),
                    *(time_of(e["since_ms"]), time_of(e["ends_ms"])),
                )
                for e in answer["events"]
            ),
        )
    else:
        show_rows(
            ("room", "name", "sticky", "deferred", "parked"),
            (
                (r["room_id"], r["alias"] or r["name"], r["active"], r["deferred"], r["parked"])
                for r in answer["rooms"]
            ),
        )
    show_next(answer)


def _ask_servers(client: "Client", **page: Any) -> Any:
    return client.get("servers", **_page(**page))


def _show_servers(answer: Any) -> None:
    titles = ("server", "sticky", "deferred", "parked", "lacks of rooms", "newcomer in")
    show_rows(
        (*titles, "refused", "fails since", "next try"),
        (
            (
                *(s["server"], s["active"], s["deferred"], s["parked"], s["lacking"]),
                *(s["newcomer"], "429" if s["is_refused"] else ""),
                *(time_of(s["failing_since_ms"]), time_of(s["next_try_ms"])),
            )
            for s in answer["servers"]
        ),
    )
    _show_lately(answer["lately"], answer["servers"])
    show_next(answer)


def _show_lately(lately: Any, servers: Any) -> None:
    """What limits did: of the servers of the page, and who was refused most."""
    say(f"Since {time_of(lately['since_ms'])}, as far as the process {lately['process']} knows:")
    if isinstance(lately["most_refused"], str):
        say("Refused: not recorded. Ask a process that other servers send their events to.")
    else:
        most = (f"{one['server']} ({one['events']})" for one in lately["most_refused"])
        say(f"Refused most: {', '.join(most) or 'nobody'}")
    for server in servers:
        parts = [
            f"{what} {count} ({limit})"
            for what in ("refused", "deferred")
            if not isinstance(server[f"{what}_lately"], str)
            for limit, count in server[f"{what}_lately"].items()
        ]
        if parts:
            say(f"{server['server']}: {', '.join(parts)}")
