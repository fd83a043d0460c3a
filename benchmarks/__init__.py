"""Measurements, each in one run beside what it is compared with."""
