"""Which servers newly join which rooms."""
