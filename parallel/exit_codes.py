"""The exit codes of all processes: ranks, launchers, supervisors, commands. This module imports no torch."""

from enum import IntEnum


class ExitCode(IntEnum):
    """The code says how a process ended. Others are failures that nobody chose, as 128 + a signal."""

    DONE = 0
    FAILED = 1
    USER_ERROR = 2
    """A mistake of the user, or data that is missing or damaged, named in one message. Starting again cannot
    help before it is mended."""
    REQUEUE = 85
    """A signal stopped the process; the same command continues from the last checkpoint. That is of the last
    step, unless the process got nowhere (pretrain/train/stop_signal.py)."""
