"""A call as it happens: for how long clients show who has left, and lack who is there."""
