"""The page for administrators, as it is served, built and used."""
