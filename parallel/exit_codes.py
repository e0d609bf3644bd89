"""The exit codes of every Motley process: ranks, launchers, supervisors and commands. Imports no torch."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a process ended. Every other code is a failure that Motley did not choose, such as 128 +
    a signal."""

    DONE = 0
    FAILED = 1
    USER_ERROR = 2
    """A mistake in what was asked, told in one message. Starting again cannot help."""
    REQUEUE = 85
    """Stopped by a signal after a checkpoint: the same command goes on from there."""
