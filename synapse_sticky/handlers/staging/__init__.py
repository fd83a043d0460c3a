"""Staging: acknowledged sticky PDUs that are not processed yet are neither pruned nor dropped."""
