"""Many processes. ``make test`` runs some of it, ``make test-workers`` everything."""
