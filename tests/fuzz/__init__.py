"""Whatever comes from outside, in every shape: briefly in ``make test``, long in ``make fuzz``."""
