"""`motley compare --from`: the analysis and the report of runs that were made elsewhere, from their logs.

This module imports no torch.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from data_pipeline.files.toml_config import ConfigError
from parallel.exit_codes import ExitCode
from pretrain.comparison.foreign.question import ForeignPlan
from pretrain.comparison.plan_file import PLAN
from pretrain.comparison.run import print_verdict


def compare_logs(
    words: Sequence[str], question: str | None = None, overrides: Sequence[str] = (), to: TextIO | None = None
) -> int:
    """Write the report on foreign runs and print the verdict; returns the exit code.

    `words`: paths of logs, and `key=value` for keys of the question file, which `overrides` hold too. Raises
    ConfigError, before anything is written, for logs that cannot be compared.
    """
    # SciPy, Matplotlib and Jinja take seconds to import, so a refused word does not import them.
    from pretrain.comparison.findings import find
    from pretrain.comparison.foreign.logs import read_logs
    from pretrain.comparison.foreign.plan import make_foreign_plan
    from pretrain.comparison.report.page import write_report

    if question is not None and _is_override(question):
        question, overrides = None, [question, *overrides]
    own = [word for word in words if _is_override(word)]
    sources = [Path(word) for word in words if not _is_override(word)]
    if not sources:
        raise ConfigError(
            "--from: no log is named; give CSV files or run directories, such as --from runs.csv"
        )
    plan, results = make_foreign_plan(
        sources, read_logs(sources), Path(question) if question else None, [*overrides, *own]
    )
    _check_own_directory(plan)
    page = write_report(find(plan, results), plan.directory / "report")
    print_verdict(plan, page, to or sys.stderr)
    return ExitCode.DONE


def _is_override(word: str) -> bool:
    return "=" in word and not Path(word).exists()


def _check_own_directory(plan: ForeignPlan) -> None:
    """Raise ConfigError if the report would replace that of a comparison that Motley ran."""
    if (plan.directory / PLAN).exists():
        raise ConfigError(
            f"{plan.directory}: the directory of a comparison, whose report would be replaced; give this one "
            f"another name, such as name={plan.config.name}-logs"
        )
