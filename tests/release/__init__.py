"""What a release says, and whether it would work."""
