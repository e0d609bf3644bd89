"""The tables of a ladder's report. This module imports no torch."""

from pretrain.comparison.caveats import Caveat, run_caveats
from pretrain.comparison.ladder_config import Cell
from pretrain.comparison.ladder_findings import LadderFindings
from pretrain.comparison.ladder_words import share_text, tokens_per_parameter_text
from pretrain.comparison.published_shares import PUBLISHED, is_published_mot
from pretrain.comparison.report.tables import Table
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
            f"{run.planned.config.num_steps:,}",
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


def sizes_table(ladder: LadderFindings) -> Table:
    """The model and the rate of every size, as the baseline has them."""
    rows = []
    for size, cells in ladder.sizes.items():
        config = next(iter(cells.values())).runs(ladder.plan.config.baseline)[0].planned.config
        model, schedule = config.model, config.optimizer.schedule
        mup = f", by muP from width {model.base_width}" if model.width_ratio != 1 else ""
        shape = (
            count(next(iter(cells)).parameters),
            f"{model.num_layers}, {model.d_model}, {model.num_heads}, {model.ffn_width}",
            f"{config.optimizer.learning_rate:g}{mup}",
            f"{schedule.kind}, {percent(schedule.warmup_steps / config.num_steps)} warm-up",
            f"{config.tokens_per_step:,}",
            ", ".join(cell.budget for cell in cells),
        )
        rows.append((size, shape))
    columns = (
        "active parameters",
        "layers, width, heads, feed-forward",
        "learning rate",
        "schedule",
        "tokens a step",
        "budgets",
    )
    return Table(columns, tuple(rows), "size")


def ladder_caveats(ladder: LadderFindings) -> tuple[Caveat, ...]:
    """What a reader must know, grave caveats first; one that several cells share names them once."""
    by_text: dict[Caveat, list[str]] = {}
    for cell, findings in ladder.cells.items():
        for caveat in run_caveats(findings):
            by_text.setdefault(caveat, []).append(cell.name)
    out = [Caveat(f"{name} has no result yet: {why}", grave=True) for name, why in _missing(ladder)]
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


def _missing(ladder: LadderFindings) -> list[tuple[str, str]]:
    return [
        (cell.name, why.rpartition(": nothing to report on: ")[2]) for cell, why in ladder.missing.items()
    ]


def _names(names: list[str]) -> str:
    return join(names) if len(names) <= CELLS_NAMED else f"{len(names)} cells"
