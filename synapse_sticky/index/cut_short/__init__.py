"""What a crash left out of such a redaction is done at the start (S5, E4)."""
