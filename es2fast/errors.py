"""The one exception a user is meant to see: one line naming field, value and remedy."""

import errno


class UserError(ValueError):
    """A mistake in the input (configuration, data, paths, devices), not a bug in es2fast.

    The command line prints the message as a single line and exits with code 2; library users
    catch it like any ValueError.
    """


_DISK = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
         errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)  # fmt: skip


def disk_message(error: OSError) -> str | None:
    """One line on a file that the system refuses to read or write; None where that is a bug."""
    if error.errno not in _DISK:
        return None
    place = f"{str(error.filename)!r}: " if error.filename else ""
    return f"{place}{error.strerror}; choose another place, or free this one"


STOPPED = 3  # exit code of a training that a safeguard ended


class RunStopped(UserError):
    """A safeguard ended the training, on every rank together; exit code `STOPPED`."""


class RunInterrupted(Exception):
    """The training was asked to stop, and can go on; exit code 0. The message says how."""
