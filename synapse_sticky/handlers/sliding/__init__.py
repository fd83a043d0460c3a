"""Sliding sync's section of sticky events, page by page (D2, D4, D5)."""
