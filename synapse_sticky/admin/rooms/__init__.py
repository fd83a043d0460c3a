"""What Synapse itself knows of sticky events, by room and in all."""
