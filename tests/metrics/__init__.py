"""The metrics on a live lab: what moves each of them, and a real Prometheus that reads them."""
