"""Errors for the person at the keyboard: one clear line and an exit code, no traceback."""

import signal


class UserError(Exception):
    """Something outside the code is wrong (data, files, weights): says what, where and what to do. Exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """The command line or the config is wrong. Exit code 2."""

    exit_code = 2


class Stopped(Exception):
    """A signal ended the run, after a checkpoint: exit code 128 + signal, 143 for SIGTERM and 130 for SIGINT."""

    def __init__(self, number: signal.Signals, message: str):
        super().__init__(message)
        self.exit_code = 128 + number
