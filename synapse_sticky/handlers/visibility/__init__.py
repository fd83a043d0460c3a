"""Joined users and servers see unexpired sticky events, whatever the history visibility (C1)."""
