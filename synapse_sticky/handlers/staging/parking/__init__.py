"""Parking: sticky PDUs that cannot be persisted yet."""
