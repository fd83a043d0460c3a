"""The ways to install the module, each tried with a wheel: ``make test-install``."""
