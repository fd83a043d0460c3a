"""The index of unexpired sticky events in memory, and Synapse's stream that it follows."""

from synapse_sticky.homeserver.position import Position
from synapse_sticky.index.follower import IndexFollower
from synapse_sticky.index.senders import EventsOfSenders
from synapse_sticky.index.stream import StickyRow, Stream

__all__ = ["EventsOfSenders", "IndexFollower", "Position", "StickyRow", "Stream"]
