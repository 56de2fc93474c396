"""Errors for the person at the keyboard: one clear line and an exit code, no traceback."""


class UserError(Exception):
    """Something outside the code is wrong (data, files, weights): says what, where and what to do. Exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """The command line or the config is wrong. Exit code 2."""

    exit_code = 2
