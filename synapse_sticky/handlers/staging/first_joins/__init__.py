"""Rooms that this server joins for the first time."""
