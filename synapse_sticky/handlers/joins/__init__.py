"""Joins: servers that newly join a room are pushed this server's own sticky events."""
