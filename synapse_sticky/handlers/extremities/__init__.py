"""Dummy events bring down the forward extremities that old sticky events leave (F2)."""
