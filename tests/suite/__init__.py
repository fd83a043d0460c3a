"""Synapse's own tests of sticky events, with the module in each homeserver that they make."""
