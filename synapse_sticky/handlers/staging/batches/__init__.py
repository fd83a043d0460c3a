"""Batches: events that wait to be persisted together, and the one that fails them all."""
