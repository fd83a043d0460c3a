"""How local users send sticky events: the limit (E1), and the parameter (S3)."""
