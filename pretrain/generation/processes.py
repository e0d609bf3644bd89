"""Decoding in several processes of this machine: tensor-parallel ranks, each with its part of all weights.

Every rank runs the same command line. Layers communicate as in training, logits are gathered, and every rank
draws the same ids from them; rank 0 alone prints and writes. Importing this module imports no torch.
"""

import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from data_pipeline.files.toml_config import ConfigError
from parallel.exit_codes import ExitCode
from parallel.launch import LaunchError, RankFacts, rank_facts
from parallel.layout import ParallelConfig, check_layout
from parallel.rank_end import EndRecord, behind, kind_of_error
from parallel.spawn import spawn
from pretrain.models.config import ModelConfig

if TYPE_CHECKING:
    from parallel.world import World

Work = Callable[["World | None"], None]
"""What a verb does; None stands for one process that holds the whole model."""


def work_in_processes(verb: str, argv: Sequence[str], processes: int, work: Work) -> int:
    """Do the work in this process, or in `processes` ranks that run `python ARGV...`; returns the exit code.

    A rank comes here with the same arguments, and finds in its environment that it is one. Raises ConfigError
    for a mistake that this process finds; the first mistake of a rank is printed here as one line.
    """
    if processes < 1:
        raise ConfigError(f"--processes {processes}: at least 1")
    try:
        facts = rank_facts()
    except LaunchError as error:
        raise ConfigError(str(error)) from None
    if facts.launcher == "spawn":
        return _rank(verb, facts, work)
    if processes == 1:
        work(None)
        return ExitCode.DONE
    ended = spawn(argv, processes)
    if ended.cause is not None:
        print(f"motley {verb}: {ended.cause}", file=sys.stderr, flush=True)
    return ended.exit_code


def layout_of(processes: int) -> ParallelConfig:
    """The layout of ranks that decode: all of them along the tensor axis. A pass has any number of tokens, so
    ranks hold the whole stream."""
    return ParallelConfig(tp=processes, sequence_parallel=False)


def check_processes(model: ModelConfig, processes: int) -> None:
    """Raise ConfigError for a model that so many ranks cannot share."""
    try:
        check_layout(
            layout_of(processes), model, world_size=processes, sequences_per_step=1, precision="fp32"
        )
    except ValueError as error:
        raise ConfigError(f"--processes {processes}: {error}") from None


def _rank(verb: str, facts: RankFacts, work: Work) -> int:
    """One rank, up to its end record, by which the launcher tells the first failure."""
    end = EndRecord(facts.attempt_dir, facts.rank)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher forwards Ctrl-C; a rank has nothing to save
    try:
        from parallel.world import start

        world = start(layout_of(facts.world_size), facts)
        work(world)
        world.shutdown()
    except Exception as error:
        first, told = behind(error)[0]
        user = isinstance(error, ConfigError | LaunchError)
        kind = "user_error" if user else kind_of_error(first) or "error"
        code = ExitCode.USER_ERROR if user else ExitCode.FAILED
        message = str(told) if user else f"{type(told).__name__}: {told}"
        end.close(exit_code=code, kind=kind, message=message, step=None)
        if kind == "error":
            print(f"motley {verb}: rank {facts.rank}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        return code
    end.close(exit_code=ExitCode.DONE, kind="done", message="done", step=None)
    return ExitCode.DONE
