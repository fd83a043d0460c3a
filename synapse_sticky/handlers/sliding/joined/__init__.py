"""Which rooms became a user's, and when: what is older in them is new to the user (D5)."""
