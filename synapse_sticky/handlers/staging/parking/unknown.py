"""How often what cannot be persisted is tried where nobody knows whether the cause passes (H2)."""

AFTER_MS = (15_000, 120_000)
"""The delays between the tries, in ms. It is given up after the last try."""
