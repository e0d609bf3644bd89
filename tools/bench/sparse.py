"""`motley bench sparse`: the time of depth routing and experts, compared with their FLOPs.

All tokens are of one modality and routed, so that only the routed path is measured. The ledger counts the
FLOPs that ran. If the time ratio over the FLOPs ratio is 1, a variant is as fast as its FLOPs promise; the
excess is the price of choosing, gathering and smaller products.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from pretrain.models.accounting import forward_flops, module_costs
from pretrain.models.config import ModelConfig
from pretrain.models.inputs import ModelInputs
from pretrain.models.router_report import RouterReport
from pretrain.models.routing_state import RoutingState
from pretrain.train import depth_steps, expert_steps
from tools.bench.model import (
    BASELINE,
    Case,
    ModelPass,
    Row,
    bound,
    measure,
    model_config,
    model_pass,
    prepare,
    random_batch,
)

CPU_CASES = (Case(None, 512, 8, 2, 1024, 512), Case(4, 512, 8, 2, 1024, 2816))
GPU_CASES = (
    Case(None, 1024, 16, 4, 4096, 512),
    Case(None, 4096, 32, 2, 4096, 512),
    Case(8, 1024, 16, 4, 4096, 65536),
)
RATIOS = (1.0, 0.75, 0.54, 0.25)
"""Ratios of depth routing. 0.54 is the mean of p-MoD."""


@dataclass(frozen=True)
class Promise:
    """The ledger's counts for a variant."""

    ran: float
    """Rows that blocks or experts computed, over tokens."""
    flops_ratio: float
    """Forward FLOPs over the baseline's; the ratio of training FLOPs is the same."""


def configs(case: Case) -> dict[str, ModelConfig]:
    """The models of all variants by name; the first is the baseline."""

    def depth(ratio: float, rule: str = "threshold", keys: str = "all") -> ModelConfig:
        table = {
            "schedule": "constant",
            "mean_ratio": ratio,
            "dense_above": 1.0,
            "rule": rule,
            "threshold_momentum": 0.0,
            "dense_frac": 0.0,
            "ramp_frac": 0.0,
        }
        return model_config(case, 1, depth={"text": table}, depth_block={"keys": keys})

    def experts(norm_placement: str = "post", **table: object) -> ModelConfig:
        return model_config(
            case, 1, experts={"all": {"num_experts": 4, **table}}, norm_placement=norm_placement
        )

    return {
        BASELINE: model_config(case, 1),
        **{f"depth {ratio:g}": depth(ratio) for ratio in RATIOS},
        **{f"depth {ratio:g}, selected keys": depth(ratio, keys="selected") for ratio in RATIOS[1:]},
        "depth 0.54, top_k": depth(0.54, rule="top_k"),
        "experts, 4 choose": experts(),
        # A norm after the experts would normalise a single gate away, so the config refuses that.
        "experts, 1 of 4, pre": experts("pre", routing="token_choice"),
        "experts, 2 of 4": experts(routing="token_choice", top_k=2),
    }


def variants(case: Case, device: torch.device) -> tuple[dict[str, Callable[[], None]], dict[str, Promise]]:
    """By variant, a function for a forward and backward pass, and its promise. All see the same tokens."""
    passes: dict[str, Callable[[], None]] = {}
    promises: dict[str, Promise] = {}
    batch, dense = random_batch(case, 1), 0
    for name, config in configs(case).items():
        module, inputs, run = model_pass(case, config, batch, device)
        inputs, report = settled(module, inputs, run, config)
        flops, ran = _ledger(case, config, inputs, report)
        dense = dense or flops
        promises[name] = Promise(ran, flops / dense)
        passes[name] = bound(module, inputs, run)
    return passes, promises


def settled(
    module: torch.nn.Module, inputs: ModelInputs, run: ModelPass, config: ModelConfig
) -> tuple[ModelInputs, RouterReport]:
    """(inputs with thresholds that reach the scheduled ratios on these tokens, the routers' report of a
    pass).

    The scores of a layer depend on the layers before, so every pass settles the thresholds of one more layer.
    """
    report = run(module, inputs).on_host()
    for _ in range(config.num_layers if config.depth else 0):
        thresholds, _ = depth_steps.thresholds_after({}, {}, report, config, step=1, num_steps=1)
        inputs = replace(inputs, routing_state=RoutingState(thresholds=thresholds))
        report = run(module, inputs).on_host()
    return inputs, report


def _ledger(case: Case, config: ModelConfig, inputs: ModelInputs, report: RouterReport) -> tuple[int, float]:
    """(forward FLOPs, rows that ran over tokens) of a pass."""
    tokens = dict(zip(config.modalities, inputs.input_tokens, strict=True))
    skipped = depth_steps.skipped(config, report, inputs.visible_pairs)
    taken = expert_steps.rows_taken(config, report)
    flops = forward_flops(config, tokens, inputs.visible_pairs, taken, skipped)
    if case.num_layers is None:  # a block has no head
        head = module_costs(config)["head"].flops
        flops -= sum(count * head[modality] for modality, count in tokens.items())
    total = sum(tokens.values())
    if skipped is not None:
        return flops, 1 - sum(skipped.tokens.values()) / (total * config.num_layers)
    return flops, sum(taken.values()) / (total * config.num_layers) if config.experts else 1.0


def table(rows: Sequence[Row], promises: dict[str, Promise]) -> str:
    """The rows as a table of text."""
    lines = [
        f"  {'':26}{'ms':>9}  {'ran':>6}  {'/ dense':>8}  {'p10 - p90':>13}  {'FLOPs':>6}  {'over FLOPs':>10}"
    ]
    for row in rows:
        promise, (low, high) = promises[row.variant], row.ratio_spread
        lines.append(
            f"  {row.variant:26}{row.median_ms:9.2f}  {promise.ran:6.3f}  {row.ratio:8.3f}"
            f"  {low:6.3f} -{high:5.3f}  {promise.flops_ratio:6.3f}  {row.ratio / promise.flops_ratio:10.3f}"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """Run `motley bench sparse`; returns the exit code. `options`: as parsed by tools/bench/options.py."""
    device, cases = prepare("sparse", options, CPU_CASES, GPU_CASES)
    for case in cases:
        passes, promises = variants(case, device)
        rows = measure(case.label, passes, device, options.rounds)
        print(f"{case.label}\n{table(rows, promises)}\n", flush=True)
    return 0
