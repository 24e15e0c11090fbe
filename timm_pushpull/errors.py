"""Errors that a user can fix, apart from those of bugs."""

__all__ = ['InputError', 'MissingExtraError', 'WorkerKilledError']


class InputError(ValueError):
    """An argument, a file or a setting is refused. The message says which one, what it was, and what to do.

    The command line prints the message in one line. Any other ``ValueError`` is a bug and keeps its traceback.
    """


class MissingExtraError(ModuleNotFoundError):
    """A package of an optional extra is not installed. The message says how to install it."""


class WorkerKilledError(RuntimeError):
    """The system killed a process that reads images. The message says what to do; finished work is kept."""
