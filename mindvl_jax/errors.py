"""Errors that a user can mend. The message says what was found, where, what was expected and what to do next."""


class UserError(ValueError):
    """Raised for bad input; the command line prints the message without a traceback and exits with 2."""
