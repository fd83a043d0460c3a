"""Who may ask, and where."""
