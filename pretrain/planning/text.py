"""A LayoutPlan, and a ranking of them, as text for a person. Imports no torch."""

import math
from collections.abc import Sequence

from data_pipeline.files.toml_config import ConfigError
from pretrain.config import RunConfig, check_run_layout
from pretrain.models.accounting import TRAIN_FACTOR, aligned
from pretrain.planning.layout_plan import LayoutPlan, Machine, plan, ranked

_GIB = 2**30
SHOWN = 12
"""Layouts of a ranking that are printed."""
HEADROOM_FRAC = 0.08
"""Of a GPU's memory left for what is not counted: the CUDA context, NCCL, fragments of the allocator."""


def report(config: RunConfig, gpus: int, memory_gib: float | None, *, layouts: bool) -> str:
    """What `motley plan` prints. Raises ConfigError for a layout that is not legal, or if there is none."""
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
        raise ConfigError(f"with --gpus {gpus}: {error}\n`--layouts` shows those that are legal") from None
    return "\n".join(_detail(plan(config, gpus), config, gpus, usable))


def _ranking(plans: Sequence[LayoutPlan], usable: float | None) -> list[str]:
    fitting = [found for found in plans if usable is None or found.peak_bytes <= usable]
    count = f"{len(plans)} legal layouts"
    if usable is not None:
        count += f", {len(fitting)} of them within {_gib(usable)} GiB a GPU"
    rows = [
        ["tp", "pp", "dp", "zero", "sequences", "again", "GiB", "bubble", "max/mean", "GB sent", "est. s"]
    ]
    for found in (fitting or plans)[:SHOWN]:
        layout = found.layout
        numbers = [layout.tp, layout.pp, found.dp, layout.zero_stage, layout.micro_batch_sequences]
        rows.append(
            [
                *map(str, numbers),
                "yes" if layout.activation_checkpointing else "no",
                _gib(found.peak_bytes),
                f"{found.bubble_frac:.3f}",
                f"{found.imbalance:.3f}",
                "/".join(f"{sent / 1e9:.0f}" for sent in found.sent.values()),
                f"{found.seconds:.2f}",
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
        "sequences: of a micro-batch. again: activation checkpointing. max/mean: FLOPs of the costliest",
        "stage over the mean stage. GB sent: by the busiest rank in a step, tp/dp/pp. est. s: of a step, to",
        f"put layouts in order, not to predict: {machine.flops / 1e12:.0f} TFLOP/s a GPU, {node:.0f} GB/s "
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


def _detail(found: LayoutPlan, config: RunConfig, gpus: int, usable: float | None) -> list[str]:
    layout = found.layout
    again = "on" if layout.activation_checkpointing else "off"
    lines = [
        f"{config.name} on {gpus} GPUs: tp {layout.tp} x pp {layout.pp} x dp {found.dp}, "
        f"ZeRO-{layout.zero_stage}, {config.precision}; sequence parallel "
        f"{'on' if layout.sequence_parallel and layout.tp > 1 else 'off'}, activation checkpointing {again}",
        f"{found.micro_batches} micro-batches of {layout.micro_batch_sequences} x "
        f"{config.model.context_tokens} tokens a step",
        "",
    ]
    columns = ["parameters", "gradients", "optimizer", "activations", "workspace", "buffers"]
    rows = [["stage", "blocks", "FLOPs share", *columns, "all, GiB"]]
    flops, end = sum(stage.flops for stage in found.stages), 2 * config.model.num_layers
    for index, stage in enumerate(found.stages):
        held = stage.held
        parts = [held.parameters, held.gradients, held.optimizer]
        parts += [stage.activations, stage.workspace, stage.buffers, stage.total]
        rows.append(
            [
                str(index),
                f"{(max(stage.sublayers.start, 1) - 1) / 2:g}-{min(stage.sublayers.stop - 1, end) / 2:g}",
                f"{stage.flops / flops:.3f}",
                *map(_gib, parts),
            ]
        )
    lines += [*aligned(rows), ""]
    fullest = max(found.stages, key=lambda stage: stage.total)
    rows = [[f"stage {found.stages.index(fullest)}", *columns[:3], "all, GiB"]]
    for tower, held in fullest.towers.items():
        rows.append([tower, *map(_gib, (held.parameters, held.gradients, held.optimizer, held.total))])
    lines += [*aligned(rows), ""]
    lines += [
        f"FLOPs of a step: {TRAIN_FACTOR * flops * found.micro_batches * found.dp:.3e} (forward and "
        f"backward, without recomputation); costliest over mean stage {found.imbalance:.3f}",
        f"pipeline bubble {found.bubble_frac:.3f} of a step",
        *(f"{axis}: {sent / 1e9:.2f} GB sent by a rank in a step" for axis, sent in found.sent.items()),
        "blocks: 0-8.5 is 8 and the attention of the next; embedding comes before the first, final norm and",
        "head behind the last. A rank's GiB are 2**30 bytes.",
        "parameters, gradients and optimizer are what DeepSpeed holds; workspace and buffers are bounds.",
    ]
    if config.model.depth:
        lines.append(
            "activations are those of micro-batches in which no token skips, as in depth routing's warm-up; "
            f"{_gib(fullest.activations_after_warm_up)} GiB on the fullest stage once as many do as wanted"
        )
    if usable is not None:
        fits = found.peak_bytes <= usable
        lines.append(
            f"{_gib(found.peak_bytes)} GiB on the fullest rank {'fits' if fits else 'does not fit'} into the "
            f"{_gib(usable)} GiB left of a GPU after {HEADROOM_FRAC:.0%} for CUDA, NCCL and fragments"
            + ("" if fits else "; `--layouts` shows layouts that do")
        )
    return lines


def _gib(number: float) -> str:
    return f"{number / _GIB:.2f}"
