"""Servers that the federation whitelist allows since this start."""
