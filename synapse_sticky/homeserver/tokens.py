"""Synapse's tokens of the sticky events stream, and this project's positions."""

from immutabledict import immutabledict
from synapse.types import MultiWriterStreamToken

from synapse_sticky.homeserver.position import NO_WRITERS, Position
from synapse_sticky.homeserver.seams import attributes

SEAMS = attributes("synapse.types.MultiWriterStreamToken", "stream", "instance_map")


def token_of(position: Position) -> MultiWriterStreamToken:
    """The position as Synapse's token."""
    ahead = {w: at for w, at in position.writers.items() if at > position.stream_id}
    return MultiWriterStreamToken(stream=position.stream_id, instance_map=immutabledict(ahead))


def position_of(token: MultiWriterStreamToken) -> Position:
    """Synapse's token in this project's words."""
    return Position(token.stream, token.instance_map or NO_WRITERS)
