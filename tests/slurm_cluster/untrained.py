"""A rank that trains nothing, for tests of what becomes of a job: a step is a short sleep. Imports no torch.

Its config, run directory, signals, records and exit code are those of a real rank (pretrain/train/rank.py).
"""

import json
import runpy
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from parallel.exit_codes import ExitCode
from parallel.launch import RankFacts
from pretrain.checkpoint.folder import checkpoint_path
from pretrain.config import RunConfig
from pretrain.run_dir import CHECKPOINTS, RunDir
from pretrain.train import rank
from pretrain.train.stop_signal import StopSignal, ignore_from_here_on
from slurm.records import saved_step

STEP_S = 0.05


def interpreter(folder: Path, python: str) -> Path:
    """A program for a profile's `python`: it runs modules as `python` does, but ranks train nothing."""
    program, script = folder / "python_of_untrained_ranks", folder / "python_of_untrained_ranks.py"
    repository = Path(__file__).parents[2]
    lines = (
        "import sys",
        f"sys.path.insert(0, {str(repository)!r})",
        "from tests.slurm_cluster.untrained import main",
        "main(sys.argv[1:])",
    )
    script.write_text("\n".join(lines) + "\n")
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(python)} {shlex.quote(str(script))} "$@"\n')
    program.chmod(0o755)
    return program


def main(argv: Sequence[str]) -> None:
    """`argv`: -m MODULE ARGUMENT, as Python is given it."""
    _, module, *arguments = argv
    if module != "pretrain.train":
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    rank._train = steps_without_training
    exit_code = rank.main(arguments)
    ignore_from_here_on()
    raise SystemExit(exit_code)


def steps_without_training(
    config: RunConfig, facts: RankFacts, run: RunDir | None, stop: StopSignal
) -> tuple[SimpleNamespace, ExitCode]:
    """Take steps as pretrain.train.loop.train does, leaving rows of metrics and names of checkpoints; returns
    a state of which a rank tells at its end, and the exit code."""
    step = saved_step(config.run_dir)
    if run is not None:
        run.started(step, device="none", processor=None, arithmetic="none", initial_weights=None)
    while step < config.num_steps and not stop.requested:
        time.sleep(STEP_S)
        step += 1
        if run is not None:
            with (config.run_dir / "metrics.jsonl").open("a") as rows:
                rows.write(json.dumps({"step": step}) + "\n")
            if step % config.every_steps.checkpoint == 0:
                checkpoint_path(config.run_dir / CHECKPOINTS, step).mkdir(exist_ok=True)
    if run is not None:
        checkpoint_path(config.run_dir / CHECKPOINTS, step).mkdir(exist_ok=True)
    state = SimpleNamespace(step=step, unreadable=())
    return state, ExitCode.DONE if step == config.num_steps else ExitCode.REQUEUE
