"""Transactions of other servers are refused while these are past a limit (L1, L2, L6)."""
