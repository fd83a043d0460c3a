"""Reliable sticky events (MSC4354) for the Synapse Matrix homeserver.

Add ``synapse_sticky.StickyEventsModule`` under ``modules:`` in homeserver.yaml.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synapse_sticky.module import StickyEventsModule

__version__ = version("synapse-sticky")

__all__ = ["StickyEventsModule", "__version__"]

if not TYPE_CHECKING:  # else any name at all would do for type checkers

    def __getattr__(name: str) -> Any:
        """The module's class, imported once it is asked for.

        ``synapse-sticky check`` can say so then if this Synapse lacks what the class needs.
        """
        if name != "StickyEventsModule":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from synapse_sticky.module import StickyEventsModule

        return StickyEventsModule
