"""`motley plan`: a layout plan, or a ranking of layouts, as text. This module imports no torch."""

import math
from collections.abc import Sequence

from data_pipeline.files.toml_config import ConfigError
from pretrain.config import RunConfig, check_run_layout
from pretrain.models.accounting import TRAIN_FACTOR, aligned
from pretrain.planning.layout_plan import LayoutPlan, Machine, StagePlan, plan, ranked

_GIB = 2**30
SHOWN = 12
"""Number of layouts that a ranking prints."""
HEADROOM_FRAC = 0.08
"""Share of a GPU's memory that is left for the CUDA context, NCCL and fragments of the allocator."""

_STATE = ("parameters", "gradients", "optimizer")


def report(config: RunConfig, gpus: int, memory_gib: float | None, *, layouts: bool) -> str:
    """The output of `motley plan`. Raises ConfigError for an illegal layout, or if no layout is legal."""
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: at least 1")
    if memory_gib is not None and not 0 < memory_gib < math.inf:
        raise ConfigError(f"--gpu-memory-gib {memory_gib}: more than 0; leave it out to have no limit")
    usable = None if memory_gib is None else memory_gib * _GIB * (1 - HEADROOM_FRAC)
    if layouts:
        plans = ranked(config, gpus, usable)
        if not plans:
            raise ConfigError(
                f"no layout of {gpus} GPUs is legal for {config.sequences_per_step} sequences per step; "
                "take another number of GPUs, or change tokens_per_step"
            )
        return "\n".join([*_ranking(plans, usable), "", *_detail(plans[0], config, gpus, usable)])
    try:
        check_run_layout(config, gpus)
    except ConfigError as error:
        raise ConfigError(f"with --gpus {gpus}: {error}\n`--layouts` shows the legal ones") from None
    return "\n".join(_detail(plan(config, gpus), config, gpus, usable))


def _ranking(plans: Sequence[LayoutPlan], usable: float | None) -> list[str]:
    """The lines of a table of the best layouts."""
    fitting = [option for option in plans if usable is None or option.peak_bytes <= usable]
    count = f"{len(plans)} legal layouts"
    if usable is not None:
        count += f", {len(fitting)} of them within {_gib(usable)} GiB a GPU"
    rows = [
        ["tp", "pp", "dp", "zero", "sequences", "recompute", "GiB", "bubble", "max/mean", "GB sent", "est. s"]
    ]
    for option in (fitting or plans)[:SHOWN]:
        layout = option.layout
        numbers = [layout.tp, layout.pp, option.dp, layout.zero_stage, layout.micro_batch_sequences]
        rows.append(
            [
                *map(str, numbers),
                "yes" if layout.activation_checkpointing else "no",
                _gib(option.peak_bytes),
                f"{option.bubble_frac:.3f}",
                f"{option.imbalance:.3f}",
                "/".join(f"{sent / 1e9:.0f}" for sent in option.sent.values()),
                f"{option.seconds:.2f}",
            ]
        )
    lines = [count, "", *aligned(rows), ""]
    lines += _legend()
    if not fitting:
        lines += ["", _no_fit(plans[0])]
    return lines


def _legend() -> list[str]:
    machine = Machine()
    node, network = machine.node_bytes / 1e9, machine.network_bytes / 1e9
    return [
        "sequences: of a micro-batch. recompute: activation checkpointing. max/mean: FLOPs of the costliest",
        "stage over the mean stage. GB sent: by the busiest rank in a step, tp/dp/pp. est. s: of a step, to",
        f"rank layouts, not to predict: {machine.flops / 1e12:.0f} TFLOP/s a GPU, {node:.0f} GB/s "
        f"inside nodes of {machine.node_gpus} GPUs,",
        f"{network:.0f} GB/s between them, nothing overlapped.",
    ]


def _no_fit(least: LayoutPlan) -> str:
    layout = least.layout
    return (
        f"None fits. The least takes {_gib(least.peak_bytes)} GiB: parallel.tp={layout.tp} "
        f"parallel.pp={layout.pp} parallel.zero_stage={layout.zero_stage} "
        f"parallel.micro_batch_sequences={layout.micro_batch_sequences} parallel.activation_checkpointing="
        f"{str(layout.activation_checkpointing).lower()}. Take more GPUs, or GPUs with more memory, or make "
        "model.context_tokens or the model smaller."
    )


def _detail(layout_plan: LayoutPlan, config: RunConfig, gpus: int, usable: float | None) -> list[str]:
    """The lines about one layout: its shape, a table of its stages, one of the fullest stage, and notes."""
    layout = layout_plan.layout
    return [
        f"{config.name} on {gpus} GPUs: tp {layout.tp} x pp {layout.pp} x dp {layout_plan.dp}, "
        f"ZeRO-{layout.zero_stage}, {config.precision}; sequence parallel "
        f"{'on' if layout.sequence_parallel and layout.tp > 1 else 'off'}, activation checkpointing "
        f"{'on' if layout.activation_checkpointing else 'off'}",
        f"{layout_plan.micro_batches} micro-batches of {layout.micro_batch_sequences} x "
        f"{config.model.context_tokens} tokens a step",
        "",
        *aligned(_stage_rows(layout_plan, 2 * config.model.num_layers)),
        "",
        *aligned(_tower_rows(layout_plan)),
        "",
        *_notes(layout_plan, config, usable),
    ]


def _stage_rows(layout_plan: LayoutPlan, last: int) -> list[list[str]]:
    """A table of the stages; `last` is the number of the last sublayer of a block."""
    columns = [*_STATE, "activations", "workspace", "buffers"]
    rows = [["stage", "blocks", "FLOPs share", *columns, "all, GiB"]]
    flops = sum(stage.flops for stage in layout_plan.stages)
    for index, stage in enumerate(layout_plan.stages):
        memory, sublayers = stage.parameter_memory, stage.sublayers
        parts = [memory.parameters, memory.gradients, memory.optimizer]
        parts += [stage.activations, stage.workspace, stage.buffers, stage.total]
        rows.append(
            [
                str(index),
                f"{(max(sublayers.start, 1) - 1) / 2:g}-{min(sublayers.stop - 1, last) / 2:g}",
                f"{stage.flops / flops:.3f}",
                *map(_gib, parts),
            ]
        )
    return rows


def _tower_rows(layout_plan: LayoutPlan) -> list[list[str]]:
    """A table of the weight shards of the fullest stage."""
    fullest = _fullest(layout_plan)
    rows = [[f"stage {layout_plan.stages.index(fullest)}", *_STATE, "all, GiB"]]
    for tower, memory in fullest.towers.items():
        parts = (memory.parameters, memory.gradients, memory.optimizer, memory.total)
        rows.append([tower, *map(_gib, parts)])
    return rows


def _fullest(layout_plan: LayoutPlan) -> StagePlan:
    return max(layout_plan.stages, key=lambda stage: stage.total)


def _notes(layout_plan: LayoutPlan, config: RunConfig, usable: float | None) -> list[str]:
    """FLOPs, bubble and traffic of a step, what the tables count, and whether the layout fits."""
    flops = sum(stage.flops for stage in layout_plan.stages) * layout_plan.micro_batches * layout_plan.dp
    lines = [
        f"FLOPs of a step: {TRAIN_FACTOR * flops:.3e} (forward and "
        f"backward, without recomputation); costliest over mean stage {layout_plan.imbalance:.3f}",
        f"pipeline bubble {layout_plan.bubble_frac:.3f} of a step",
        *(f"{axis}: {sent / 1e9:.2f} GB sent by a rank in a step" for axis, sent in layout_plan.sent.items()),
        "blocks: 0-8.5 is 8 and the attention of the next; embedding comes before the first, final norm and",
        "head behind the last. A rank's GiB are 2**30 bytes.",
        "parameters, gradients and optimizer are what DeepSpeed holds; workspace and buffers are bounds.",
    ]
    if config.model.depth:
        lines.append(
            "activations are those of micro-batches in which no token skips, as in depth routing's warm-up; "
            f"{_gib(_fullest(layout_plan).activations_after_warm_up)} GiB on the fullest stage once as many "
            "do as wanted"
        )
    if usable is not None:
        fits = layout_plan.peak_bytes <= usable
        lines.append(
            f"{_gib(layout_plan.peak_bytes)} GiB on the fullest rank {'fits' if fits else 'does not fit'} "
            f"into the {_gib(usable)} GiB left of a GPU after {HEADROOM_FRAC:.0%} for CUDA, NCCL and "
            "fragments" + ("" if fits else "; `--layouts` shows layouts that do")
        )
    return lines


def _gib(number: float) -> str:
    return f"{number / _GIB:.2f}"
