"""How long an event is still sticky, as clients are told."""
