"""Origins: whether the servers that PDUs came from answer."""
