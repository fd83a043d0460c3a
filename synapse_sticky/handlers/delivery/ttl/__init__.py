"""Ttl: how much of an event's stickiness is left, as clients are told."""
