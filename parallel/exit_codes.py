"""The exit codes of all Motley processes: ranks, launchers, supervisors, commands. It imports no torch."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a process ended. Other codes are failures that Motley did not choose, such as 128 + a signal."""

    DONE = 0
    FAILED = 1
    USER_ERROR = 2
    """A mistake of the user, named in one message. Starting again cannot help."""
    REQUEUE = 85
    """A signal stopped the process after a checkpoint; the same command continues from there."""
