"""Synapse's backlog of sticky events: what each destination lacks of which rooms."""
