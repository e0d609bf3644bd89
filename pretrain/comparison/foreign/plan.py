"""From logs of foreign runs and a question to what the analysis takes: a plan and results.

This module imports no torch.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files.toml_config import ConfigError, apply_override, load_toml, validate
from pretrain.comparison.effects import Run
from pretrain.comparison.foreign.logs import Log, RunKey
from pretrain.comparison.foreign.question import ForeignConfig, ForeignPlan, ForeignRun
from pretrain.comparison.results import RunResult
from pretrain.quantities import join

MEAN_LOSS = "eval/mean_loss"
"""Mean of the losses of a row over modalities, where a log has no loss over all targets."""
_ALL = "eval/loss"


def make_foreign_plan(
    sources: Sequence[Path],
    all_logs: Mapping[RunKey, Log],
    question: Path | None = None,
    overrides: Sequence[str] = (),
) -> tuple[ForeignPlan, tuple[RunResult, ...]]:
    """The plan and the results of foreign runs. Raises ConfigError for a question that they cannot answer."""
    config = _config(sources, all_logs, question, overrides)
    sizes, logs = _of_one_size(config, {key: log for key, log in all_logs.items() if key[0] in config.arms})
    modalities, notes = _modalities(logs)
    total = _ALL if _all_targets_known(logs) else MEAN_LOSS
    steps = {arm: max(log.num_steps for (a, _), log in logs.items() if a == arm) for arm in config.arms}
    results = []
    for (arm, seed), log in sorted(
        logs.items(), key=lambda item: (item[0][1], config.arms.index(item[0][0]))
    ):
        rows = log.rows if total == _ALL else tuple(_with_mean(row, modalities) for row in log.rows)
        results.append(
            RunResult(
                ForeignRun(arm, seed, steps[arm]), rows, log.record, total=total, documents=log.documents
            )
        )
    base = [run for run in results if run.arm == config.baseline and run.rows]
    if not base:
        raise ConfigError(f"{sources[0]}: no run of the baseline {config.baseline} has a finite loss")
    last = base[0].rows[-1]
    plan = ForeignPlan(
        path=question or sources[0],
        sources=tuple(sources),
        overrides=tuple(overrides),
        config=config,
        runs=tuple(run.planned for run in results),  # type: ignore[misc]
        modalities=modalities,
        tokens_per_step=last["tokens"] / last["step"] if last["step"] else last["tokens"],
        sizes=sizes,
        notes=(*notes, *(log.note for log in logs.values() if log.note)),
    )
    return plan, tuple(results)


def _config(
    sources: Sequence[Path], logs: Mapping[RunKey, Log], question: Path | None, overrides: Sequence[str]
) -> ForeignConfig:
    """The question, with arms and name taken from the logs where it does not say them."""
    values = load_toml(question) if question else {}
    for override in overrides:
        apply_override(values, override)
    found = list(dict.fromkeys(arm for arm, *_ in logs))
    source = str(question or "--from")
    if len(found) < 2:
        raise ConfigError(f"{sources[0]}: holds one arm, {found[0]}; a comparison needs two")
    if "baseline" not in values:
        raise ConfigError(
            f"{source}: baseline: required, but missing: the arm that others are compared with, such as "
            f"baseline={found[0]}; arms in the logs: {', '.join(found)}"
        )
    values.setdefault("arms", found)
    values.setdefault("name", re.sub(r"[^A-Za-z0-9_.-]+", "-", sources[0].stem))
    config = validate(ForeignConfig, values, source=source)
    if unknown := [arm for arm in config.arms if arm not in found]:
        raise ConfigError(f'{source}: arms: "{unknown[0]}" is in no log; arms there: {", ".join(found)}')
    if config.match == "train_flops":
        for (arm, seed, _), log in logs.items():
            if arm in config.arms and any("compute/train_flops" not in row for row in log.rows):
                raise ConfigError(
                    f'{log.place}: match = "train_flops", but seed {seed} of {arm} has no flops; add them'
                )
    return config


def _of_one_size(
    config: ForeignConfig, logs: Mapping[RunKey, Log]
) -> tuple[dict[str, float], dict[Run, Log]]:
    """(sizes by arm, logs by arm and seed) of the size that is asked for.

    Raises ConfigError where an arm has several sizes, or none of that.
    """
    sizes = sorted({size for _, _, size in logs if size is not None})
    listed = ", ".join(f"{size:g}" for size in sizes)
    chosen = {key: log for key, log in logs.items() if config.size is None or key[2] == config.size}
    for arm in config.arms:
        own = {size for name, _, size in chosen if name == arm}
        if not own:
            raise ConfigError(f"size = {config.size:g}: no run of {arm} has it; sizes: {listed or 'none'}")
        if len(own) > 1:
            raise ConfigError(
                f"{arm} has runs of several sizes, and a comparison is of one; add size=..., which may be "
                f"{listed}"
            )
    of_arm = {arm: size for arm, _, size in chosen if size is not None}
    return of_arm, {(arm, seed): log for (arm, seed, _), log in chosen.items()}


def _modalities(logs: Mapping[Run, Log]) -> tuple[tuple[str, ...], list[str]]:
    """The modalities that all runs with a loss have, and a sentence for every other one.

    Raises ConfigError if there is none, or if a run has a modality, but not in its last losses.
    """
    sound = {key: log for key, log in logs.items() if log.modalities and log.record.get("status") != "failed"}
    if not sound:
        raise ConfigError(f"{next(iter(logs.values())).place}: no run ends with a finite loss")
    lacking: dict[str, dict[str, None]] = {m: {} for log in sound.values() for m in log.modalities}
    for (arm, seed), log in sound.items():
        for modality in lacking:
            if modality not in log.modalities:
                lacking[modality][f"seed {seed} of {arm}"] = None
            elif f"eval/loss/{modality}" not in log.last_losses:
                raise ConfigError(
                    f"{log.place}: seed {seed} of {arm} has a loss on {modality}, but none at its last step, "
                    f"{log.last_losses['step']}; add it, or take {modality} out"
                )
    common = tuple(modality for modality, runs in lacking.items() if not runs)
    if not common:
        raise ConfigError(
            f"{next(iter(logs.values())).place}: no modality is in all runs: "
            + "; ".join(f"{modality} is not in {join(list(runs))}" for modality, runs in lacking.items())
        )
    return common, [
        f"{modality} is left out: {join(list(runs))} {'has' if len(runs) == 1 else 'have'} no loss on it."
        for modality, runs in lacking.items()
        if runs
    ]


def _all_targets_known(logs: Mapping[Run, Log]) -> bool:
    """Whether every row with a loss has that over all targets."""
    rows = [row for log in logs.values() for row in log.rows]
    return all(_ALL in row for row in rows if any(name.startswith("eval/loss") for name in row))


def _with_mean(row: Mapping[str, Any], modalities: Sequence[str]) -> dict[str, Any]:
    """The row with MEAN_LOSS in place of a loss over all targets, if it has all modalities."""
    losses = [row[name] for m in modalities if (name := f"eval/loss/{m}") in row]
    kept = {name: value for name, value in row.items() if name != _ALL}
    return kept | ({MEAN_LOSS: float(np.mean(losses))} if len(losses) == len(modalities) else {})
