"""`motley compare`: it runs all arms and seeds of a comparison and writes the report.

This module imports no torch.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from data_pipeline.files.json_file import read_object
from data_pipeline.files.toml_config import ConfigError
from parallel.exit_codes import ExitCode
from pretrain.comparison.config import make_plan
from pretrain.comparison.first_runs import check_first_runs, check_startable, run_first
from pretrain.comparison.foreign.question import Plan
from pretrain.comparison.pending_runs import command_of, unfinished
from pretrain.comparison.plan import ComparisonPlan, PlannedRun
from pretrain.comparison.plan_file import additions, check_same_plan, write_plan
from pretrain.comparison.planned_cost import RunSpeed, cost_text, solved_lines
from pretrain.comparison.rate_grid import rate_lines
from pretrain.comparison.report.digest import SUMMARY_FORMAT, digest_line
from pretrain.comparison.run_queue import Outcome, lock_comparison, run_commands
from pretrain.comparison.step_timing import timed_lines
from pretrain.comparison.units import units_of


def run_comparison(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    concurrent_runs: int | None = None,
    report_only: bool = False,
    speed: RunSpeed | None = None,
    dry_run: bool = False,
    first_only: bool = False,
    to: TextIO | None = None,
) -> int:
    """Run the unfinished runs, write the report and print the verdict; returns the exit code.

    It is 0 if all runs are done, 85 if a signal stopped them after a checkpoint (the same command continues),
    and 1 if a run failed; the report then covers the finished seeds. `dry_run` prints every run and its cost
    instead, in hours too where the `speed` of a run is known. `first_only` ends behind the runs that come
    first. Raises ConfigError, before any run starts, for
    a comparison that cannot be run.
    """
    out = to or sys.stderr
    plan = make_plan(path, overrides)
    if report_only:
        check_first_runs(plan)
        check_same_plan(plan)
        report(plan, out)
        return ExitCode.DONE
    if concurrent_runs is None:
        concurrent_runs = plan.config.concurrent_runs
    if concurrent_runs < 1:
        raise ConfigError(f"--concurrent-runs {concurrent_runs}: at least one run at a time")
    if dry_run:
        print(f"{cost_text(plan, speed, concurrent_runs)}\n{detectable_line(plan)}", file=out, flush=True)
        return ExitCode.DONE
    while plan.first:  # timing rounds, then a grid of rates
        if (code := run_first(plan, concurrent_runs, out)) is not None:
            return code
        plan = make_plan(path, overrides)
    if first_only:
        print("\n".join([*timed_lines(plan), *rate_lines(plan)]), file=out, flush=True)
        return ExitCode.DONE
    todo = unfinished(plan)
    check_startable(plan, todo)
    with lock_comparison(plan.directory):
        write_plan(plan)
        print(_announcement(plan, todo, concurrent_runs), file=out, flush=True)
        print(detectable_line(plan), file=out, flush=True)
        commands = [command_of(plan, run, concurrent_runs) for run in todo]
        outcomes = run_commands(commands, concurrent_runs=concurrent_runs, out=out)
    failed = [outcome for outcome in outcomes if not outcome.done and not outcome.stopped]
    if any(outcome.stopped for outcome in outcomes):
        print(
            f"Stopped. To go on: motley compare {path} {' '.join(overrides)}".rstrip(), file=out, flush=True
        )
        return ExitCode.FAILED if failed else ExitCode.REQUEUE
    _report_finished(plan, todo, failed, out)
    for outcome in failed:
        print(f"{outcome.name} failed ({outcome.log}); the same command tries it again", file=out, flush=True)
    return ExitCode.FAILED if failed else ExitCode.DONE


def report(plan: ComparisonPlan, out: TextIO) -> Path:
    """Write the report, print its verdict and return its page. Raises ConfigError if nothing has run."""
    # Matplotlib, Jinja and SciPy take seconds to import, so a refused comparison does not import them.
    from pretrain.comparison.findings import find
    from pretrain.comparison.ladder_findings import find_ladder
    from pretrain.comparison.report.ladder_page import write_ladder_report
    from pretrain.comparison.report.page import write_report
    from pretrain.comparison.results import load_results

    results, added, folder = load_results(plan), additions(plan), plan.directory / "report"
    if plan.cells:
        page = write_ladder_report(find_ladder(plan, results, added), folder)
    else:
        page = write_report(find(plan, results, added), folder)
    print_verdict(plan, page, out)
    return page


def print_verdict(plan: Plan, page: Path, out: TextIO) -> None:
    """Print how many runs finished, headlines, a sentence per modality, grave caveats and the page's path."""
    if isinstance(plan, ComparisonPlan) and plan.cells:
        return print(_ladder_verdict(plan, page), file=out, flush=True)
    stated = read_object(
        page.parent / "summary.json",
        {"runs": str, "headlines": dict, "contrasts": list, "named_contrasts": list, "caveats": list},
        advice=f"remove {page.parent}, and the same command writes it again",
    )
    modalities = plan.modalities
    lines = ["", f"{plan.config.name}: {stated['runs']}"]
    for arm, headline in stated["headlines"].items():
        sentences = [
            c["sentence"] for c in stated["contrasts"] if c["arm"] == arm and c["modality"] in modalities
        ]
        lines += [headline, *(f"  {sentence}" for sentence in sentences), ""]
    lines += [c["sentence"] for c in stated["named_contrasts"] if c["modality"] in modalities]
    lines += [f"  Mind: {caveat['text']}" for caveat in stated["caveats"] if caveat["grave"]]
    lines.append(f"Report: {page.resolve()}")
    print("\n".join(lines), file=out, flush=True)


def _ladder_verdict(plan: ComparisonPlan, page: Path) -> str:
    """Tell how many runs of a ladder finished, headlines, a sentence per size and modality, and the page."""
    stated = read_object(
        page.parent / "summary.json",
        {"runs": str, "headlines": dict, "level": str, "turns": list, "caveats": list},
        advice=f"remove {page.parent}, and the same command writes it again",
    )
    lines = ["", f"{plan.config.name}: {stated['runs']}", *stated["headlines"].values(), stated["level"]]
    lines += [f"  {turn['sentence']}" for turn in stated["turns"]]
    lines += [f"  Mind: {caveat['text']}" for caveat in stated["caveats"] if caveat["grave"]]
    return "\n".join([*lines, f"Report: {page.resolve()}"])


def finished_page(plan: ComparisonPlan) -> Path | None:
    """The page of the report if it is newer than the rows of all runs and belongs to an unchanged
    summary.json of this version; None if it must be written."""
    page = plan.directory / "report" / "index.html"  # the page is the last file of a report
    summary = page.parent / "summary.json"
    metrics = [run.config.run_dir / "metrics.jsonl" for run in plan.runs]
    if not (page.is_file() and summary.is_file()):
        return None
    if any(path.stat().st_mtime_ns > page.stat().st_mtime_ns for path in metrics):
        return None
    if not page.read_bytes().endswith(digest_line(summary.read_bytes()).encode()):
        return None
    same = read_object(summary, {"format": int})["format"] == SUMMARY_FORMAT
    return page if same else None


def _report_finished(
    plan: ComparisonPlan, todo: Sequence[PlannedRun], failed: Sequence[Outcome], out: TextIO
) -> None:
    """Write the report, or print an up-to-date one again. If runs failed, there may be no finished seed."""
    if not todo and (page := finished_page(plan)):
        return print_verdict(plan, page, out)
    try:
        report(plan, out)
    except ConfigError as error:
        if not failed:  # all runs are done, so the report must be possible
            raise
        print(f"No report: {error}", file=out, flush=True)


def _announcement(plan: ComparisonPlan, todo: Sequence[PlannedRun], concurrent_runs: int) -> str:
    """The lines that are printed before runs start: the question, the arms and the budget."""
    config, first = plan.config, plan.runs[0].config
    more = (
        f" + {len(config.extra_baseline_seeds)} of {config.baseline}" if config.extra_baseline_seeds else ""
    )
    done = len(plan.runs) - len(todo)
    steps = {run.arm: run.config.num_steps for run in plan.runs}
    length = f"{first.num_steps} steps, {first.total_tokens:,} tokens each"
    if plan.cells:
        tokens = [cell.tokens for cell in plan.cells]
        length = f"{min(tokens):,} to {max(tokens):,} tokens"
        more += f" x {len(tokens)} cells ({', '.join(cell.name for cell in plan.cells)})"
    elif config.match != "tokens" and config.solve is None:
        unit = "FLOPs" if config.match == "train_flops" else "seconds"
        length = f"equal {unit} ({', '.join(f'{arm}: {count} steps' for arm, count in steps.items())})"
    return (
        f"{config.name}: {config.question}\n"
        f"{len(config.arms)} arms ({', '.join(plan.arms)}) x {len(config.seeds)} seed(s){more} = "
        f"{len(plan.runs)} runs of {length}; {concurrent_runs} at a time"
        + (f"; {done} done already" if done else "")
        + "".join(f"\nSolved {config.solve}: {line}" for line in solved_lines(plan))
        + "".join(f"\n{line}" for line in [*timed_lines(plan), *rate_lines(plan)])
        + f"\nPlan: {plan.directory / 'comparison.json'}"
    )


def detectable_line(plan: ComparisonPlan) -> str:
    """The line that says, before runs start, how small a difference the comparison is likely to see."""
    from pretrain.comparison.effects import ENOUGH_RUNS, PILOT_DEVIATION, detectable  # scipy
    from pretrain.comparison.ladder_effects import ladder_detectable

    effects, config = ladder_detectable(plan) if plan.cells else detectable(plan), plan.config
    if effects is None:
        return f"A verdict needs {ENOUGH_RUNS} seeds of each arm. With fewer this is an observation."
    count = len(config.verdicts) * len(plan.runs[0].config.model.modalities) * max(1, len(plan.cells))
    unknown = [m for m in plan.runs[0].config.model.modalities if m not in effects]
    listed = ", ".join(f"{m} {nats:.3f}" for m, nats in effects.items()) or "unknown"
    source = "pilot_deviation" if config.pilot_deviation else f"deviations over seeds {PILOT_DEVIATION}"
    more = f"; pilot_deviation tells those of {', '.join(unknown)}" if unknown else ""
    return (
        f"Likely to be seen (80 % chance, {count} verdicts jointly at {100 * config.confidence:g} %), "
        f"in {units_of(plan, effects)}: {listed} ({source}{more})"
    )
