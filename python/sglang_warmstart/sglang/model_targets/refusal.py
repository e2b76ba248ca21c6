"""Why there is no answer for a whole server."""


class RefusalError(Exception):
    """One line that says what the server has that cannot be answered for."""
