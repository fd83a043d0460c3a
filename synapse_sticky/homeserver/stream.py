"""The sticky events stream, as Synapse's processes name it to each other."""

from synapse.replication.tcp.streams._base import StickyEventsStream

NAME: str = StickyEventsStream.NAME
