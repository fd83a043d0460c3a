"""Reliable sticky events (MSC4354) for the Synapse Matrix homeserver.

Add ``synapse_sticky.StickyEventsModule`` under ``modules:`` in homeserver.yaml.
"""

from importlib.metadata import version

from synapse_sticky.module import StickyEventsModule

__version__ = version("synapse-sticky")

__all__ = ["StickyEventsModule", "__version__"]
