"""What the module writes in one of Synapse's own transactions, without a risk to that (H1)."""

from collections.abc import Callable

from synapse_sticky.homeserver.causes import is_locked, is_outage
from synapse_sticky.homeserver.process import Cursor, Homeserver

_SAVEPOINT = "synapse_sticky_attempt"


def attempt_txn(
    homeserver: Homeserver, txn: Cursor, change: Callable[[], None]
) -> Exception | None:
    """Makes the change or, if it fails, undoes it alone, and gives why.

    Fails only with what Synapse's own statements would fail with, too.
    """
    txn.execute(f"SAVEPOINT {_SAVEPOINT}")
    try:
        # Synapse may wait for as long as it likes in the statements that follow.
        with homeserver.brief_waits_txn(txn):
            change()
    except Exception as e:
        if is_outage(e) and not is_locked(e):
            raise  # Synapse may try its transaction again
        txn.execute(f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}")
        return e
    txn.execute(f"RELEASE SAVEPOINT {_SAVEPOINT}")
    return None
