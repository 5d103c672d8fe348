"""Errors that a user can fix. The message says what was found, where, what was expected and what to do next."""


class UserError(ValueError):
    """Raised for bad input; the command line prints the message without a traceback and exits with 2."""


def at_least_one(arguments: object, *names: str) -> None:
    """Raise UserError for command line options, named by attribute, that are given and smaller than 1."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
