"""The command line's own error: one line for the user, never a traceback."""


class UserError(Exception):
    """What was found, what was expected, what to do; `main` prints it and exits with status 1."""
