"""Whether a newcomer has what it acknowledged."""
