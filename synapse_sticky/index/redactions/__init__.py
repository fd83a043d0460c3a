"""Whose events are redacted all at once: each process hears of it (S5)."""
