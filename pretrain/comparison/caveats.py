"""Caveats: what a reader must know before quoting a number of the report. This module imports no torch."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from pretrain.comparison.caveat import Caveat
from pretrain.comparison.costs import systems
from pretrain.comparison.curve_caveats import of_curves, of_matching
from pretrain.comparison.effects import ENOUGH_RUNS
from pretrain.comparison.findings import ALL, Findings
from pretrain.comparison.foreign.question import ForeignPlan
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.rate_caveats import of_rates
from pretrain.comparison.timing_caveats import of_timing
from pretrain.quantities import join, percent

ENOUGH_SEEDS = 5
PROGRESS = "progress"
"""The rule about runs that have not finished, which a ladder judges by itself."""
FLOPS_TOLERANCE = 0.01


def caveats(findings: Findings) -> tuple[Caveat, ...]:
    """All caveats that apply to the findings, grave ones first."""
    found = (*_by_rule(findings, (PROGRESS,)), *run_caveats(findings), *_by_rule(findings, OF_CURVES))
    return tuple(sorted(found, key=lambda caveat: not caveat.grave))


def run_caveats(findings: Findings) -> tuple[Caveat, ...]:
    """The caveats that apply to the runs and their final losses, and not to curves along a run, or to runs
    that have not finished."""
    return _by_rule(findings, tuple(rule for rule in RULES if rule not in (PROGRESS, *OF_CURVES)))


def _by_rule(findings: Findings, rules: Sequence[str]) -> tuple[Caveat, ...]:
    """The caveats of some rules, in their order."""
    return tuple(replace(caveat, rule=rule) for rule in rules for caveat in RULES[rule](findings))


def _of_progress(findings: Findings) -> Iterator[Caveat]:
    """A caveat about runs that have not finished."""
    scope = findings.scope
    if scope.interim:
        last = findings.plan.runs[0].num_steps
        yield Caveat(
            f"Interim: no seed has finished in all arms. Everything is cut at step {scope.until_step} of "
            f"{last}, in the middle of the learning-rate schedule. There is no interval: a level is that of "
            "one look, at the end.",
            grave=True,
        )
    elif scope.unfinished:
        yield Caveat(
            f"Not finished yet: {join(scope.unfinished)}. The intervals are those of the runs that "
            "finished; who looks now and again later claims more often than they say.",
            grave=True,
        )


def _of_scope(findings: Findings) -> Iterator[Caveat]:
    """Caveats about runs that were added or lost."""
    scope = findings.scope
    for addition in findings.added:
        yield Caveat(
            f"{join(addition.runs)} {'was' if len(addition.runs) == 1 else 'were'} added after "
            f"{addition.finished} runs had finished. Who adds runs after seeing results claims more often "
            "than the intervals say: their level is nominal.",
            grave=True,
        )
    if scope.failed:
        yield Caveat(
            f"Every run of {join(scope.failed)} failed: no figure and no table shows "
            f"{'it' if len(scope.failed) == 1 else 'them'}.",
            grave=True,
        )
    for name, end in scope.lost.items():
        yield Caveat(
            f"{name} {end.kind}{f': {end.why}' if end.why else ''}. It is left out of the means and counts "
            "against its arm: an arm that lost more of its runs than another is not called better than it, "
            "or equivalent.",
            grave=True,
        )


def _of_data(findings: Findings) -> Iterator[Caveat]:
    """Caveats about what the runs read."""
    prints = findings.fingerprints
    for text in prints.broken:
        yield Caveat(f"The arms did not read the same data: {text}. Nothing is decided.", True)
    if lost := {name: len(documents) for name, documents in prints.unreadable.items()}:
        counts = join([f"{count} in {name}" for name, count in lost.items()])
        yield Caveat(
            f"Documents of the training data could not be read, and were left out: {counts} (summary.json "
            "names them; data.max_unreadable_frac allowed it)."
        )
    unproven = [str(seed) for seed, steps in prints.compared.items() if steps == 0]
    if unproven and isinstance(findings.plan, ComparisonPlan):
        yield Caveat(
            f"That the arms read the same data is not proven for seed {join(unproven)}: no step with a "
            "fingerprint in all arms. Nothing is decided.",
            grave=True,
        )
    epochs = max((system.epochs for system in systems(findings).values()), default=0.0)
    if epochs > 1:
        yield Caveat(
            f"The training data was passed over {epochs:.1f} times: an arm with more parameters in all can "
            "remember more of it."
        )


def _of_records(findings: Findings) -> Iterator[Caveat]:
    """Caveats about runs of different programs or machines."""
    foreign = isinstance(findings.plan, ForeignPlan)
    ours = [run for run in findings.results if run.record.get("attempts") or not foreign]
    unsealed = [run.planned.name for run in ours if "metrics" not in run.record]
    if unsealed:
        yield Caveat(
            f"That the metrics of {join(unsealed)} are as they were written is not proven: the last attempt "
            "did not say how it ended, or an earlier version wrote them without a digest."
        )
    attempts = [attempt for run in findings.results for attempt in run.record.get("attempts", [])]
    # An attempt that was ended before it had a device made no step.
    attempts = [attempt for attempt in attempts if attempt.get("device") is not None]

    def kinds(*keys: str) -> int:
        return len({json.dumps([attempt.get(key) for key in keys], sort_keys=True) for attempt in attempts})

    if (programs := kinds("commit", "diff", "versions")) > 1:
        yield Caveat(
            f"The runs were made by {programs} versions of the code or its libraries (each run's record.json "
            "names its own): what differs may be the program.",
            grave=True,
        )
    if kinds("device", "layout") > 1:
        yield Caveat(
            "The runs differ in device or layout: their seconds and memory cannot be compared.", True
        )
    # records of earlier versions do not say
    known = [a for a in attempts if a.get("arithmetic")]
    paths = {(a.get("device"), a.get("processor"), a["arithmetic"]) for a in known}
    if len(paths) > 1:
        yield Caveat(
            f"The runs were computed by {len(paths)} kinds of processor or arithmetic path (they stand under "
            "Provenance). Sums round differently on another one, and from there a run is another draw, as "
            "with another seed: differences between arms then hold the difference between machines too.",
            grave=True,
        )


def _of_seeds(findings: Findings) -> Iterator[Caveat]:
    """Caveats about the number of seeds and of verdicts."""
    config, plan = findings.plan.config, findings.plan
    n = min(len(findings.runs(arm)) for arm in plan.arms)
    if n < ENOUGH_RUNS:
        few = [arm for arm in plan.arms if len(findings.runs(arm)) < ENOUGH_RUNS]
        whose = "" if config.baseline in few or len(few) == len(plan.others) else f"{join(few)}: "
        yield Caveat(
            f"{whose}{'One seed' if n == 1 else f'{n} seeds'}: there is no interval, and a difference of "
            f"this size may be chance. A verdict needs {ENOUGH_RUNS} seeds, better {ENOUGH_SEEDS}.",
            grave=True,
        )
        return
    if findings.scope.interim:
        return
    if n < ENOUGH_SEEDS:
        yield Caveat(f"{n} seeds: intervals are wide, and rest on losses being about normal.")
    yield Caveat(_what_intervals_hold(findings))
    if any(not effect.primary and effect.modality != ALL for effect in findings.effects.values()):
        yield Caveat(
            "Exploratory contrasts hold one by one. Of many, some will leave out zero where there is nothing."
        )
    if wide := sorted(
        {e.contrast for e in findings.effects.values() if e.spreads_differ and e.modality != ALL}
    ):
        yield Caveat(
            f"The arms spread differently over seeds in contrasts of {join(wide)}, whose intervals take "
            "Welch's error where it is larger. With few seeds they may still be too narrow: at "
            f"{percent(config.confidence)} a false claim is then up to twice as likely as stated with five "
            "seeds an arm, and up to four times with three."
        )


def _what_intervals_hold(findings: Findings) -> str:
    """A sentence on which variances are in the intervals."""
    if findings.num_documents is not None:
        return (
            f"Intervals hold what another seed, and {findings.num_documents:,} other held-out documents of "
            "this kind, would change at the last step. Curves and step matching are those of the smaller set "
            "that every evaluation takes."
        )
    text = (
        "Intervals hold what another seed would change, over one fixed set of held-out documents. Other "
        "documents would change the losses too"
    )
    kept = [run.planned.name for run in findings.results if run.documents is not None]
    if kept and not findings.scope.interim:
        return f"{text}: {join(kept)} kept losses per document, but not all runs have the same documents."
    return f"{text}."


def _of_logs(findings: Findings) -> Iterator[Caveat]:
    """Caveats about what logs of foreign runs cannot tell, or lack."""
    plan, prints = findings.plan, findings.fingerprints
    if not isinstance(plan, ForeignPlan):
        return
    if not prints.accepted:
        yield Caveat(
            "Nothing is decided: logs made elsewhere hold no hash of the data, and nobody has stated that "
            "the arms of a seed read the same data in the same order and were judged on the same held-out "
            "data. If it is so, same_data = true in the question file (or same_data=true) says it.",
            grave=True,
        )
    elif not prints.proven:
        yield Caveat(
            "That the arms read the same data, and were judged on the same held-out data, is stated "
            "(same_data) and not proven."
        )
    yield Caveat(
        "The runs were made elsewhere: that arms differ in nothing else, and how losses, FLOPs and seconds "
        "were counted, is the word of their makers."
    )
    yield from (Caveat(note) for note in plan.notes)
    unpaired = [arm for arm in plan.others if not findings.pairs(arm)]
    if unpaired:
        yield Caveat(
            f"{join(unpaired)} and {plan.config.baseline} have no seed in common: step matching and gaps are "
            "those of mean curves, without intervals."
        )
    cost = systems(findings)
    for arm in plan.others:
        ratio = cost[arm].tokens / cost[plan.config.baseline].tokens
        if plan.config.match == "tokens" and abs(ratio - 1) > FLOPS_TOLERANCE:
            yield Caveat(
                f"Budgets were to be equal and were not: {arm} had {ratio:.3f} times the tokens of "
                f"{plan.config.baseline}. Verdicts compare the ends of the runs.",
                grave=True,
            )


def _of_spikes(findings: Findings) -> Iterator[Caveat]:
    """A caveat about steps that runs left out, or took back."""
    lost = [
        f"{run.planned.name} {int(run.lost('train/lost_steps')):,} steps"
        for run in findings.results
        if run.lost("train/spikes")
    ]
    if lost:
        yield Caveat(
            f"Spikes of loss or gradient (on_spike) cost {join(lost)}. Training FLOPs and seconds hold what "
            "was lost; the training loss does not."
        )


def _of_compute(findings: Findings) -> Iterator[Caveat]:
    """Caveats about FLOPs, data, learning rates and runs that shared a machine."""
    plan, cost, configs = findings.plan, systems(findings), findings.plan.run_configs
    base = cost[plan.config.baseline].train_flops
    by_flops, by_seconds = (plan.config.match == unit for unit in ("train_flops", "seconds"))
    for arm in plan.others:
        ratio = cost[arm].train_flops / base if base else math.nan
        if abs(ratio - 1) > FLOPS_TOLERANCE and not by_seconds:
            equal = (
                "Budgets were to be equal and were not"
                if by_flops
                else "Equal tokens are not equal compute here"
            )
            yield Caveat(
                f"{equal}: {arm} spent {ratio:.3f} times the training FLOPs "
                f"of {plan.config.baseline}. Read the curves against FLOPs.",
                grave=True,
            )
        data = cost[arm].tokens / cost[plan.config.baseline].tokens
        if (by_flops or by_seconds) and abs(data - 1) > FLOPS_TOLERANCE:
            yield Caveat(
                f"Equal {'seconds are' if by_seconds else 'compute is'} not equal data here: {arm} saw "
                f"{data:.2f} times the tokens of {plan.config.baseline}; the longer runs go on in the same "
                f"order. Gaps stand beside the tokens of {plan.config.baseline}, at equal "
                f"{'seconds' if by_seconds else 'FLOPs'}."
            )
    if isinstance(plan, ComparisonPlan) and plan.rates:
        yield from of_rates(plan)
    elif plan.config.tuning is None:
        rates = {config.optimizer.learning_rate for config in configs.values()}
        what = {0: "Learning rates are not known", 1: "All arms use one learning rate"}.get(
            len(rates), "The arms have their own learning rates"
        )
        yield Caveat(
            f"{what}, and the comparison does not say how that was chosen. An arm whose best one lies "
            "elsewhere is at a disadvantage (`tuning` in the comparison file is the place to state it)."
        )
    if isinstance(plan, ComparisonPlan):
        yield from of_timing(plan, findings.results)


def _of_expert_choice(findings: Findings) -> Iterator[Caveat]:
    """Experts that choose take tokens of a whole sequence, and a sequence packs several documents."""
    arms = [
        arm
        for arm, config in findings.plan.run_configs.items()
        if any(
            experts.routing == "expert_choice" and experts.capacity_factor < experts.num_experts
            for experts in config.model.experts.values()
        )
    ]
    if arms:
        yield Caveat(
            f"Expert choice in {join(arms)}: documents that are packed into one sequence compete for "
            "experts, in training and in eval/loss, so the loss of a document depends on the others. Only "
            "eval/causal chooses by thresholds, token by token."
        )


def _of_vectors(findings: Findings) -> Iterator[Caveat]:
    """Losses of images that are vectors are no nats, and arms may measure them differently."""
    configs = findings.plan.run_configs
    weights = {arm: config.image_weights for arm, config in configs.items()}
    learned = list(dict.fromkeys(modality for of_arm in weights.values() for modality in of_arm))
    if not learned:
        return
    yield Caveat(
        f"The loss on {join(learned)} is the mean squared error per number of what is denoised, and no nats "
        "per token; the loss over all targets adds it, by loss_weights, to the mean over ids."
    )
    for modality in learned:
        keys = ("features", "objective", "predicted", "times", "shift", "condition_max_time")
        tables = {arm: config.model.vectors.get(modality) for arm, config in configs.items()}
        measures = {arm: [getattr(table, key, None) for key in keys] for arm, table in tables.items()}
        if apart := [arm for arm, of in measures.items() if of != measures[findings.plan.config.baseline]]:
            yield Caveat(
                f"{join(apart)} and {findings.plan.config.baseline} measure the loss on {modality} "
                f"differently, for model.vectors.{modality} differs in what is predicted or in how times are "
                f"drawn: nothing about {modality}, or about all targets, can be read off a difference.",
                grave=True,
            )
        elif len({of_arm.get(modality) for of_arm in weights.values()}) > 1:
            yield Caveat(
                f"The arms weigh {modality} differently (loss_weights), and the loss over all targets with "
                "it: compare the modalities one by one.",
                grave=True,
            )


RULES: dict[str, Callable[[Findings], Iterator[Caveat]]] = {
    PROGRESS: _of_progress,
    "runs": _of_scope,
    "logs": _of_logs,
    "data": _of_data,
    "programs and machines": _of_records,
    "seeds and multiplicity": _of_seeds,
    "spikes": _of_spikes,
    "compute and tuning": _of_compute,
    "expert choice": _of_expert_choice,
    "vectors": _of_vectors,
    "step matching": of_matching,
    "curves": of_curves,
}
"""What a caveat may be about, in the order of the report, and what finds it."""
OF_CURVES = ("step matching", "curves")
"""Rules about curves along a run, which a ladder does not read."""
