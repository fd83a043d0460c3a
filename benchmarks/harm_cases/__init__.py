"""The cases of ``benchmarks.harm``: each module here has a tuple ``CASES``."""
