"""How a run is started on one machine: all checks first, then its ranks. Imports no torch."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.files.toml_config import ConfigError
from parallel.exit_codes import ExitCode
from parallel.launch import LaunchError, rank_facts
from parallel.spawn import spawn
from pretrain.config import RunConfig
from pretrain.lineage.begin import NOTHING_ELSE, Ask, beginning, is_done
from pretrain.run_dir import attempts, check_config, check_writable, record_cause
from pretrain.run_files import LOGS, rank_log
from pretrain.train.checks import check_run
from pretrain.train.rank import main


def launch(
    run: str | Path, overrides: Sequence[str] = (), *, processes: int = 1, ask: Ask = NOTHING_ELSE
) -> int:
    """Train the run of a file or directory on this machine, or continue it from its last good checkpoint, as
    `ask` says: the exit code.

    0 done, 85 stopped by a signal, 2 the user's mistake, others failed. What can be wrong
    with config, layout, data and run directory is raised as ConfigError before any rank is started.
    """
    begins = beginning(run, overrides, ask)
    config = begins.config
    if ask != NOTHING_ELSE:  # it changes a directory, which what cannot train must not
        check_run(config, _world_size(processes))
    begins.prepare_and_tell()
    check_config(config)
    if is_done(config):
        return ExitCode.DONE
    if ask == NOTHING_ELSE:
        check_run(config, _world_size(processes))
    check_writable(config)
    return main(begins.argv) if processes == 1 else _launch_ranks(config, begins.argv, processes)


def _world_size(processes: int) -> int:
    """The number of ranks. Raises ConfigError if there can be none."""
    if processes < 1:
        raise ConfigError(f"--processes {processes}: at least 1")
    try:
        return processes if processes > 1 else rank_facts().world_size
    except LaunchError as error:
        raise ConfigError(str(error)) from None


def _launch_ranks(config: RunConfig, argv: Sequence[str], processes: int) -> int:
    """Start the ranks and wait for them; returns the exit code. The rank that failed first is named on
    stderr and in record.json; the tracebacks of all ranks are in their logs."""
    before = len(attempts(config))
    ended = spawn(["-m", "pretrain.train", *argv], processes)
    if ended.cause is not None:
        where = "" if ended.rank is None else f"; see {config.run_dir / LOGS / rank_log(ended.rank)}"
        cause = f"{ended.cause}{where}"
        print(f"motley train: {cause}", file=sys.stderr, flush=True)
        with contextlib.suppress(ConfigError, OSError):  # of a full disk, or another process that has started
            if len(attempts(config)) > before:
                record_cause(config, cause, exit_code=ended.exit_code)
    return ended.exit_code
