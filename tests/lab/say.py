"""Telling how a long run gets on, for what needs the lab anyway."""

from tests.say import say

__all__ = ["say"]
