"""Four servers and everything at once, for minutes: ``make soak``."""
