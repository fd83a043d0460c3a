"""Sticky events of other servers that are past a limit are delivered later (L1, L4, L5, L7, D7)."""
