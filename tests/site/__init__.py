"""The documentation site: its generated page, and what a build of it must be like."""
