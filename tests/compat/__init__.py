"""Which Synapse the module fits: its check and a short story, on each version; ``make compat``."""

from packaging.version import Version

FIRST = Version("1.163")
"""The first Synapse that the module fits."""

LISTED = ("1.162.0", "1.163.0", "1.163.1", "1.163.2")
"""Tried each time, beside the newest. The first of them is one that does not fit, and says so."""


def is_expected_to_fit(version: str) -> bool:
    """Should the module work on this Synapse?"""
    return Version(version) >= FIRST
