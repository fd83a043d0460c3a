"""An installation of version 0.1.0, as a dump of its database, and what this version does on it."""
