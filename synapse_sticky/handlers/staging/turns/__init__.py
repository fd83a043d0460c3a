"""Turns: in which order the PDUs that are staged for a room are processed."""
