"""Whether an error is about the database itself, or about what it was asked to do."""

_SQLITE = ("locked", "busy", "full", "disk i/o", "readonly", "unable to open")
_LOST = ("OperationalError", "InterfaceError")
_CLASSES = ("08", "40", "53", "57P", "58")
_CODES = ("55P03", "25006")


def is_outage(error: BaseException) -> bool:
    """Would anything else that is asked of the database fail now, too?

    A connection that is lost or refused, a server that is shut down or has no room left, a lock
    that cannot be had: trying something smaller is of no use. What else fails is about its rows.
    """
    driver = type(error).__module__.partition(".")[0]
    if driver == "sqlite3":
        message = str(error).lower()
        return type(error).__name__ in _LOST and any(part in message for part in _SQLITE)
    if driver != "psycopg2":
        return False
    code = getattr(error, "pgcode", None)
    if code is None:
        # The server has not said anything, which it does of every statement that it refuses.
        return any(base.__name__ in _LOST for base in type(error).__mro__)
    return code in _CODES or code.startswith(_CLASSES)
