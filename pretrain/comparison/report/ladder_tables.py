"""The tables of a ladder's report. This module imports no torch."""

import math
from collections.abc import Iterator

import numpy as np

from pretrain.comparison.caveat import Caveat
from pretrain.comparison.caveats import run_caveats
from pretrain.comparison.ladder_config import Cell
from pretrain.comparison.ladder_findings import LadderFindings
from pretrain.comparison.ladder_laws import law_share
from pretrain.comparison.ladder_words import runs_text, share_text, tokens_per_parameter_text
from pretrain.comparison.published_shares import PUBLISHED, is_published_mot
from pretrain.comparison.report.tables import Table
from pretrain.comparison.results import RunResult
from pretrain.comparison.verdict import outcome_text
from pretrain.quantities import count, flops, join, percent, signed

CELLS_NAMED = 6
"""Number of cells that a caveat names; of more it gives the number."""


def cells_table(ladder: LadderFindings, arm: str) -> Table:
    """Every cell: its runs, and by modality the difference of an arm to the baseline with its interval."""
    rows = []
    for cell, findings in ladder.cells.items():
        run = findings.runs(ladder.plan.config.baseline)[0]
        spent = run.curve("compute/train_flops").values
        cells = [
            tokens_per_parameter_text(cell.tokens_per_parameter),
            count(cell.tokens),
            f"{run.planned.num_steps:,}",
            flops(float(spent[-1])) if len(spent) else "n/a",
            str(len(findings.runs(arm))) if arm in findings.plan.arms else "0",
        ]
        cells += [_difference(ladder, cell, arm, modality) for modality in ladder.modalities]
        rows.append((cell.name, tuple(cells)))
    columns = ("tokens per parameter", "tokens", "steps", "FLOPs of a run", "seeds", *ladder.modalities)
    return Table(columns, tuple(rows), "cell")


def _difference(ladder: LadderFindings, cell: Cell, arm: str, modality: str) -> str:
    """The difference in per cent, its joint interval and its outcome; words where there is none."""
    contrast = ladder.contrast(cell, arm, modality)
    if contrast is None:
        return f"every run of {arm} failed"
    if not contrast.same_data:
        return "not decided: different data"
    final = contrast.final
    text = f"{signed(100 * final.relative, 1)} %"
    if final.interval is not None:
        low, high = (100 * end / contrast.base_loss for end in (final.interval.low, final.interval.high))
        text += f" [{signed(low, 1)}, {signed(high, 1)}]"
    return f"{text} {outcome_text(ladder.cells[cell], final)}"


def shares_table(ladder: LadderFindings, arm: str) -> Table | None:
    """s at every budget from the second on, by modality; None if no size has two budgets."""
    cells = [c for c in ladder.cells if any(c in by_cell for by_cell in ladder.shares.values())]
    rows = [
        (
            cell.name,
            (
                tokens_per_parameter_text(cell.tokens_per_parameter),
                *(
                    share_text(by_cell[cell])
                    if cell in (by_cell := ladder.shares.get((cell.size, arm, m), {}))
                    else "n/a"
                    for m in ladder.modalities
                ),
            ),
        )
        for cell in cells
    ]
    columns = ("tokens per parameter", *ladder.modalities)
    return Table(columns, tuple(rows), f"s of {arm}") if rows else None


def published_table(ladder: LadderFindings, arm: str) -> Table | None:
    """The published s of MoT; None where the arm is not what the paper calls MoT."""
    if not is_published_mot(ladder.plan, arm):
        return None
    rows = [(f"{p.size}, {p.modality}", (count(p.parameters), f"{p.s:.3f}", p.what)) for p in PUBLISHED]
    return Table(("active parameters", "s", "what"), tuple(rows), "MoT paper")


def laws_table(ladder: LadderFindings) -> Table | None:
    """The numbers of every law with their intervals, and how far it is off; None if there is no law."""
    confidence = ladder.plan.config.confidence
    rows = []
    for (arm, modality), law in ladder.laws.items():
        if isinstance(law, str):
            continue
        numbers = law.fit.law.named()
        intervals = {name: law.fit.interval(name, confidence) for name in ("alpha", "beta", "E")}
        cells = [f"{numbers[n]:.3g} [{i.low:.3g}, {i.high:.3g}]" for n, i in intervals.items()]
        cells.append(f"{100 * float(np.sqrt(np.mean(law.fit.residuals**2))):.1f} %")
        off = 100 * law.largest_left_out
        cells.append(f"{signed(off, 1)} %" if math.isfinite(off) else "too few cells")
        rows.append((f"{arm}, {modality}", tuple(cells)))
    columns = ("alpha (parameters)", "beta (tokens)", "E, nats", "residuals", "off at the most tokens")
    return Table(columns, tuple(rows), "law") if rows else None


def minima_table(ladder: LadderFindings) -> Table | None:
    """The size of least loss at every budget of FLOPs; None where budgets are not FLOPs."""
    rows = []
    for (arm, modality, budget), found in ladder.minima.items():
        text = found if isinstance(found, str) else count(found.parameters)
        if not isinstance(found, str) and found.interval is not None:
            ends = (found.interval.low, found.interval.high)
            beyond = ("below all sizes", "beyond all sizes")
            told = [count(end) if 0 < end < math.inf else beyond[end > 0] for end in ends]
            text += f" [{told[0]}, {told[1]}]"
        rows.append((f"{arm}, {modality}, {budget}", (text,)))
    return Table(("active parameters of least loss",), tuple(rows), "budget") if rows else None


def law_shares_table(ladder: LadderFindings, arm: str) -> Table | None:
    """s by the laws at the largest budget of every size, beside the direct one; None without laws."""
    base, confidence = ladder.plan.config.baseline, ladder.plan.config.confidence
    rows = []
    for size, cells in ladder.sizes.items():
        cell = list(cells)[-1]
        texts = []
        for modality in ladder.modalities:
            laws = ladder.laws[base, modality], ladder.laws[arm, modality]
            if isinstance(laws[0], str) or isinstance(laws[1], str):
                return None
            found = law_share(laws[0], laws[1], cell, confidence)
            direct = ladder.shares.get((size, arm, modality), {}).get(cell)
            mark = " (extrapolated)" if found.extrapolated else ""
            beside = f"; direct {share_text(direct)}" if direct else ""
            texts.append(f"{share_text(found)}{mark}{beside}")
        rows.append((cell.name, tuple(texts)))
    return Table(ladder.modalities, tuple(rows), f"s of {arm} by the laws") if rows else None


def no_law_text(ladder: LadderFindings) -> str:
    """Say why there is no law; "" if all arms have one."""
    return "; ".join(dict.fromkeys(law for law in ladder.laws.values() if isinstance(law, str)))


def sizes_table(ladder: LadderFindings) -> Table:
    """The model and the rate of every size, as the baseline has them."""
    rows = []
    for size, cells in ladder.sizes.items():
        run = next(iter(cells.values())).runs(ladder.plan.config.baseline)[0]
        config = run.config
        model, schedule = config.model, config.optimizer.schedule
        mup = f", by muP from width {model.base_width}" if model.width_ratio != 1 else ""
        shape = (
            count(next(iter(cells)).parameters),
            f"{model.num_layers}, {model.d_model}, {model.num_heads}, {model.ffn_width}",
            f"{config.optimizer.learning_rate:g}{mup}",
            f"{schedule.kind}, {percent(schedule.warmup_steps / config.num_steps)} warm-up",
            f"{config.tokens_per_step:,}",
            _rarest_text(run),
            ", ".join(cell.budget for cell in cells),
        )
        rows.append((size, shape))
    columns = (
        "active parameters",
        "layers, width, heads, feed-forward",
        "learning rate",
        "schedule",
        "tokens a step",
        "targets a step of the rarest modality",
        "budgets",
    )
    return Table(columns, tuple(rows), "size")


def _rarest_text(run: RunResult) -> str:
    """The modality of the fewest targets a step in a run, with their number; a tower of it sees no more."""
    names = {name for row in run.rows for name in row if name.startswith("train/tokens/")}
    per_step = {
        name.rpartition("/")[2]: float(curve.values[-1] / curve.steps[-1])
        for name in sorted(names)
        if len(curve := run.curve(name))
    }
    if not per_step:
        return "n/a"
    rarest = min(per_step, key=lambda modality: per_step[modality])
    return f"{per_step[rarest]:,.0f} {rarest}"


def ladder_caveats(ladder: LadderFindings) -> tuple[Caveat, ...]:
    """Return what a reader must know, grave caveats first; one that several cells share names them once."""
    by_text: dict[Caveat, list[str]] = {}
    for cell, findings in ladder.cells.items():
        for caveat in run_caveats(findings):
            by_text.setdefault(caveat, []).append(cell.name)
    out = [*_of_progress(ladder), *_of_lost_cells(ladder)]
    out += [
        Caveat(
            f"{join(addition.runs) if len(addition.runs) <= CELLS_NAMED else f'{len(addition.runs)} runs'} "
            f"were added after {addition.finished} runs had finished. Who adds runs after seeing results "
            "claims more often than the intervals say: their level is nominal.",
            grave=True,
        )
        for addition in ladder.added
    ]
    for caveat, names in by_text.items():
        where = "" if len(names) == len(ladder.cells) else f"{_names(names)}: "
        out.append(Caveat(where + caveat.text, caveat.grave))
    return tuple(sorted(out, key=lambda caveat: not caveat.grave))


def _of_progress(ladder: LadderFindings) -> Iterator[Caveat]:
    """A caveat about runs that have not finished."""
    if not any(end.kind == "unfinished" for end in ladder.ends.values()):
        return
    missing = [cell.name for cell in ladder.missing]
    partial = [cell.name for cell, findings in ladder.cells.items() if findings.scope.interim]
    parts = [f"no result yet in {_names(missing)}"] if missing else []
    parts += [f"no seed of all arms in {_names(partial)}, which take no part"] if partial else []
    yield Caveat(
        f"Not finished: {'; '.join([runs_text(ladder), *parts])}. The intervals are those of the runs that "
        "finished; who looks now and again later claims more often than they say.",
        grave=True,
    )


def _of_lost_cells(ladder: LadderFindings) -> Iterator[Caveat]:
    """A caveat for every cell without a result in which runs failed or diverged."""
    for cell in ladder.missing:
        names = [run.name for run in ladder.plan.cells[cell].runs]
        if lost := {name: ladder.ends[name] for name in names if ladder.ends[name].lost}:
            told = join([f"{name} {end.kind}{f' ({end.why})' * bool(end.why)}" for name, end in lost.items()])
            yield Caveat(
                f"{cell.name} has no result, and no figure, table or sentence counts it, because no seed "
                f"was evaluated in all arms: {told}.",
                grave=True,
            )


def _names(names: list[str]) -> str:
    return join(names) if len(names) <= CELLS_NAMED else f"{len(names)} cells"
