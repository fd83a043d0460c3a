"""Pruning: what Synapse may not prune of the inbound staging area."""
