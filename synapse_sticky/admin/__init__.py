"""The API for administrators: what waits, why, and what to do about it (E3)."""
