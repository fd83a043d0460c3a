"""What administrators have ordered for a time, as far as this process knows (E3).

The duties look here; whoever reads the orders from the database sets them (``admin.following``). A
process that cannot read them goes on as if there were none.
"""

from collections.abc import Callable, Collection

import attr

HELD = "hold"
"""In the place of a limit's name: the event waits, as its server is held."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Release:
    """What waits of a server, in a room, or of a sender is to be released now; all that are given
    must be so.

    is_discard: whether it is to be dropped instead: it stays in the timeline, and is never sticky.
    made_ms: what was deferred later, in ms since the epoch, is not meant; None if all is.
    """

    id: str
    server: str | None
    room_id: str | None
    sender: str | None
    is_discard: bool = False
    made_ms: int | None = None


@attr.s(auto_attribs=True, frozen=True, slots=True)
class PushAgain:
    """Own sticky events of this room are to be pushed once more to this server."""

    id: str
    server: str
    room_id: str


class Orders:
    """Those that are in force. Database threads look at them, too.

    exempt_servers: no limit applies to them.
    exempt_users: per_sender does not.
    held_servers: their sticky events are persisted, and wait.
    releases: in the order in which they were made.
    pushes: likewise; each is over once it is begun.
    """

    def __init__(self) -> None:
        self.exempt_servers: frozenset[str] = frozenset()
        self.exempt_users: frozenset[str] = frozenset()
        self.held_servers: frozenset[str] = frozenset()
        self.releases: tuple[Release, ...] = ()
        self.pushes: tuple[PushAgain, ...] = ()
        self._callbacks: list[Callable[[], None]] = []

    def on_read(self, callback: Callable[[], None]) -> None:
        """Calls back whenever the orders were read, changed or not."""
        self._callbacks.append(callback)

    def set(
        self,
        *,
        exempt_servers: Collection[str] = (),
        exempt_users: Collection[str] = (),
        held_servers: Collection[str] = (),
        releases: Collection[Release] = (),
        pushes: Collection[PushAgain] = (),
    ) -> None:
        """These are in force from now on, and no others."""
        self.exempt_servers = frozenset(exempt_servers)
        self.exempt_users = frozenset(exempt_users)
        self.held_servers = frozenset(held_servers)
        self.releases = tuple(releases)
        self.pushes = tuple(pushes)
        for callback in self._callbacks:
            callback()
