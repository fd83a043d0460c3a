"""What Synapse itself knows of one event."""
