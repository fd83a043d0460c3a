"""Sticky events of users who are not ignored any more (D6, H7)."""
