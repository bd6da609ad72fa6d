"""The one exception a user is meant to see: one line naming field, value and remedy."""


class UserError(ValueError):
    """A mistake in the input (configuration, data, paths, devices), not a bug in es2fast.

    The command line prints the message as a single line and exits with code 2; library users
    catch it like any ValueError.
    """


STOPPED = 3  # exit code of a training that a safeguard ended


class RunStopped(UserError):
    """A safeguard ended the training, on every rank together; exit code `STOPPED`."""


class RunInterrupted(Exception):
    """The training was asked to stop, and can go on; exit code 0. The message says how."""
