"""Received: an event's stickiness counts from when this server first had it."""
