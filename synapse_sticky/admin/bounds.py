"""How many events of a server may wait before its transactions are refused, as it is shown (E3)."""

from collections.abc import Callable

import attr

from synapse_sticky.admin.facts import Holds
from synapse_sticky.config import StickyConfig
from synapse_sticky.homeserver import Cursor
from synapse_sticky.limits import most_deferred


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Bounds:
    """By what is configured.

    most: of one server; None if no transaction is refused.
    most_held: of one that an administrator holds.
    is_exempt: tells whether the configuration exempts a server.
    """

    most: int | None
    most_held: int
    is_exempt: Callable[[str], bool]

    @classmethod
    def of(cls, config: StickyConfig) -> "Bounds":
        """Those of this configuration."""
        federation = config.federation
        most = most_deferred(federation, is_held=False) if config.is_on("receipt") else None
        return cls(most, most_deferred(federation, is_held=True), federation.exempts())

    def now_txn(self, txn: Cursor, holds: Holds | None) -> Callable[[str], int | None]:
        """Gives the bound of a server as it is now; None if there is none.

        Args:
            holds: what administrators have ordered; None if that cannot be read.
        """
        held, exempt = holds.spared_txn(txn) if holds is not None else ((), ())

        def bound_of(server: str) -> int | None:
            # A hold comes before an exemption.
            if self.most is not None and server in held:
                return self.most_held
            return None if server in exempt or self.is_exempt(server) else self.most

        return bound_of
