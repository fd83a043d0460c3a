"""The one table of seams: what each duty needs of Synapse's private parts."""

from collections.abc import Mapping, Sequence

from synapse_sticky.handlers.deferral import synapse as deferral
from synapse_sticky.handlers.delivery import synapse as delivery
from synapse_sticky.handlers.extremities import synapse as extremities
from synapse_sticky.handlers.joins import synapse as joins
from synapse_sticky.handlers.joins.detection import synapse as detection
from synapse_sticky.handlers.receipt import synapse as receipt
from synapse_sticky.handlers.sending import synapse as sending
from synapse_sticky.handlers.sliding import synapse as sliding
from synapse_sticky.handlers.staging import synapse as staging
from synapse_sticky.handlers.visibility import synapse as visibility
from synapse_sticky.homeserver import process, rooms, staged
from synapse_sticky.homeserver.seams import Seam
from synapse_sticky.index import synapse as index

SEAMS: Mapping[str, Sequence[Seam]] = {
    "all duties": (*process.SEAMS, *rooms.SEAMS),
    "index": index.SEAMS,
    "delivery": delivery.SEAMS,
    "sliding": sliding.SEAMS,
    "visibility": visibility.SEAMS,
    "joins": (*joins.SEAMS, *detection.SEAMS),
    "pruning": staging.SEAMS,
    "parking": (*staging.SEAMS, *staged.SEAMS),
    "receipt": (*receipt.SEAMS, *staged.SEAMS),
    "deferral": deferral.SEAMS,
    "sending": sending.SEAMS,
    "extremities": extremities.SEAMS,
}
"""By duty, the seams that it declares. Plain imports of private names are not repeated here."""
