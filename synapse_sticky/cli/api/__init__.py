"""The commands that ask the API for administrators of a running homeserver (E3).

``client`` asks it. ``options`` has what all of these commands share: where the API is, the token,
``--json``. Each command has a file of its own.
"""
