"""The duties of the module, one a folder. No duty imports another's folder."""
