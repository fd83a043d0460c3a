"""The sections of sticky events in /sync and sliding sync, out of the index (D1 to D8)."""
