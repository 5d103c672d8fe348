"""Errors that a user can fix. The message says what was found, where, what was expected and what to do next."""

import sys


class UserError(ValueError):
    """Raised for bad input; the command line prints the message without a traceback and exits with 2."""


def shortened(text: str, limit: int = 200) -> str:
    """Return a text with its middle left out where it is longer than `limit`."""
    return (
        text if len(text) <= limit else f"{text[: limit // 2]} ... ({len(text)} characters) ... {text[-limit // 4 :]}"
    )


def printable(text: str) -> str:
    """Return a text in which control characters are spelled out: names and paths must not steer the terminal that shows
    them.
    """
    return "".join(
        letter
        if letter in "\n\t" or (ord(letter) >= 32 and not 0x7F <= ord(letter) < 0xA0)
        else f"\\x{ord(letter):02x}"
        for letter in text
    )


def for_terminal(text: str) -> str:
    """Return a text as it is for a file or a pipe, and `printable` for a terminal: a model may write anything."""
    return printable(text) if sys.stdout.isatty() else text


def at_least_one(arguments: object, *names: str) -> None:
    """Raise UserError for command line options, named by attribute, that are given and smaller than 1."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
