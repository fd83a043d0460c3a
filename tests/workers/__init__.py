"""Many processes: run by ``make test-workers``."""
