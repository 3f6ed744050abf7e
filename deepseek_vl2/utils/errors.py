"""Errors that a command line tells apart."""


class UsageError(ValueError):
    """Options that do not go together: the command ends with exit code 2."""
