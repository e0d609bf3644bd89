"""The decoder trained on any layout of ranks, and by one process in plain torch: three steps, comparable.

Layouts without ZeRO train in fp64, where a mistake cannot hide in rounding. DeepSpeed 0.19.8 keeps the
weights of ZeRO 1-3 in fp32 whatever the model's dtype (runtime/base_optimizer.py, _configure_master_weights),
so layouts with ZeRO train in fp32.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import pytest
import torch

from data_pipeline.stream.batch import Batch
from parallel import world
from parallel.engine import ParameterGroup, StepResult
from parallel.layout import ParallelConfig
from parallel.optimizer import OptimizerSpec
from parallel.partition import partition
from parallel.pipeline_engine import PipelineEngine
from parallel.testing import run_on_ranks
from parallel.zero_engine import ZeroEngine
from pretrain.models.accounting import sublayer_costs
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.dropout import DropoutDraw
from pretrain.models.inputs import ModelInputs, build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.models.routing_state import RoutingState
from pretrain.optimizer_config import OptimizerConfig
from pretrain.train.optimizer import parameter_groups
from tests.numerics.choice_margin import LEAST_MARGIN, choice_margin
from tests.numerics.image_batches import image_micro_batches
from tests.numerics.plain_loop import EPS, MAX_GRAD_NORM, OPTIMIZER, assert_same, deviation, plain_steps
from tests.one_world import run_cases
from tests.pretrain.models.random_batch import DENSE, ELEMENTS, MOT, depth_tables, random_batch, tiny_config
from tests.pretrain.models.vector_batch import vector_config

Towers = Literal[
    "dense", "mot", "moe", "experts", "auxiliary", "depth", "pmod", "depth_feed_forward", "top_k",
    "depth_experts", "grouped", "wide", "muon", "untied", "tied_embeddings", "elements", "untied_elements",
    "depth_elements", "weighted", "masked", "vectors",
]  # fmt: skip
TOWERS: tuple[Towers, ...] = ("dense", "mot")
_TOKEN_CHOICE = {"num_experts": 3, "routing": "token_choice", "top_k": 2}
_EXPERTS: dict[str, dict[str, Any]] = {
    "moe": {"all": {"num_experts": 2}},
    "experts": {"text": {"num_experts": 4}, "image": {**_TOKEN_CHOICE, "ffn_hidden": 16}},
    "auxiliary": {"image": {**_TOKEN_CHOICE, "load_balance": 0.1, "router_z": 0.01}},
    "depth_experts": {
        "image": {**_TOKEN_CHOICE, "load_balance": 0.1, "router_z": 0.01},
        "text": {"num_experts": 2},
    },
}
_EXPERTS["grouped"] = _EXPERTS["wide"] = _EXPERTS["auxiliary"]
_EXPERTS["muon"] = _EXPERTS["auxiliary"]
_OPTIMIZER: dict[str, dict[str, Any]] = {
    "grouped": {
        "groups": [
            {"match": "*.weight.image", "lr_scale": 0.5, "weight_decay": 0.3},
            {"match": "blocks.1.*.weight.image", "lr_scale": 2.0},
            {"match": "embedding.*", "frozen": True},
            {"match": "*.router.*", "frozen": True},
            {"match": "*norm.weight.text", "frozen": True},
            {"match": "blocks.0.*.down.*", "frozen": True},
        ]
    },
    "muon": {"kind": "muon", "muon": {"qkv": "heads", "weight_decay": 0.2}},
}
"""Settings of the optimizer beside learning rate and weight decay, where a variant has its own."""
_DEPTH: dict[str, dict[str, Any]] = {
    "depth": {"schedule": "constant", "mean_ratio": 0.5, "rule": "threshold"},
    "pmod": {
        "schedule": "cosine", "mean_ratio": 0.7, "rule": "top_k", "scale": "all_as_released",
        "keys": "selected",
    },
    "depth_feed_forward": {
        "schedule": "alternating", "mean_ratio": 0.8, "rule": "top_k", "gate": "softmax",
        "parts": "feed_forward",
    },
    "top_k": {"schedule": "constant", "mean_ratio": 0.5, "rule": "top_k"},
}  # fmt: skip
"""Of text and image. The first is causal; it and the last are of three towers and in all blocks, the others
dense ones."""
_WEIGHTS: dict[str, dict[str, Any]] = {
    "untied": {
        "untied": ["embedding", "qkv", "attention_out", "feed_forward", "block_norm", "head"],
        "towers_start": "independent",
    },
    "tied_embeddings": {"untied": ["embedding", "qkv", "head"], "tied_embeddings": True},
}
"""Of three towers: which weights exist. The first leaves two kinds of norms tied, the second has one table a
tower for embedding and head."""
LOSS_WEIGHTS: dict[Towers, tuple[float, ...]] = {"weighted": (0.5, 2.0, 0.0)}
"""Weights of text, image and speech in the objective; all others have 1 for all."""
_IMAGE = {"prediction": "v", "condition_max_time": 0.5}
_THRESHOLDS = {f"blocks.{layer}.depth.{m}": -0.02 for layer in range(3) for m in ("text", "image")}
Case = tuple[dict[str, Any], tuple[Towers, ...]]
"""What differs from the standard ParallelConfig, and what trains on that layout."""
STEPS = 3
RTOL = {torch.float64: 1e-10, torch.float32: 2e-5}
"""How far a layout may be from one process, relative to a loss or norm. fp64: 4e-15 measured; fp32: 1.2e-6,
in the norm of a tower (docs/results/numerics.md)."""
SEED = 4000
"""Of the batches. With it no choice is so close that rounding turns it (choice_margin.py), and rounding stays
small in the norms of towers, where another seed makes 5e-6 of it."""
MICRO_BATCHES = 4
PRESENT: Sequence[Sequence[tuple[int, ...]]] = (
    [(0, 1, 2)] * 4,
    [(1,)] * 4,
    [(0, 1), (0, 1), (0, 1, 2), (0, 1, 2)],
)
"""Modalities in the micro-batches of a step, in turn: all; nothing but images; no speech on the first of two
data-parallel ranks, which takes the first two. The last step shows what the second made of absent towers."""


def dtype_of(layout: ParallelConfig, precision: str = "fp32") -> torch.dtype:
    """The dtype in which the decoder trains on a layout; bf16 is fp32 here, because DeepSpeed casts."""
    return torch.float64 if layout.zero_stage == 0 and precision == "fp32" else torch.float32


def learning_rate_at(step: int) -> float:
    return 1e-3 / (1 + step)


def model_config(towers: Towers) -> ModelConfig:
    """Cut into 2 stages inside a block, into 4 inside each; with depth routing between blocks."""
    if towers == "vectors":
        return vector_config(MOT, num_layers=3, z_loss=1e-3, experts=_EXPERTS["auxiliary"], image=_IMAGE)
    modalities = DENSE if towers in ("dense", "moe", "pmod", "depth_feed_forward") else MOT
    elements = ELEMENTS if towers.endswith("elements") else {}
    weights = _WEIGHTS.get(towers.removesuffix("_elements"), {})
    table = _DEPTH.get(towers.removesuffix("_experts").removesuffix("_elements"))
    depth = depth_tables(("text", "image"), **table) if table else {}
    base_width = 8 if towers == "wide" else None
    others = {"experts": _EXPERTS.get(towers, {}), **weights, **elements}
    return tiny_config(modalities, num_layers=3, z_loss=1e-3, mup_base_width=base_width, **others, **depth)


def micro_batches(
    config: ModelConfig,
    step: int,
    dtype: torch.dtype = torch.float32,
    modality_weights: tuple[float, ...] | None = None,
    masked: bool = False,
) -> list[ModelInputs]:
    """The inputs of a step, of different loss weights. `dtype`: that in which losses are summed. `masked`: in
    most slots of the first two micro-batches, and in some of the others, targets do not count."""
    if config.vectors:
        return image_micro_batches(config, step, SEED, dtype)
    inputs = [
        build_inputs(
            _with_context(
                random_batch(
                    config,
                    sequences=1,
                    seed=SEED + 10 * step + number,
                    present=present,
                    padding_tokens=2 * number if len(present) > 1 else 0,  # padding counts as text
                ),
                frac=(0.8 if number < 2 else 0.3) if masked else 0.0,
            ),
            config,
            routing_state=RoutingState(thresholds=_THRESHOLDS),
            modality_weights=modality_weights,
        )
        for number, present in enumerate(PRESENT[step % len(PRESENT)])
    ]
    draws = [DropoutDraw(SEED, step, (number,)) for number in range(len(inputs))]
    return [
        replace(each, loss_weights=each.loss_weights.to(dtype), dropout=draw)
        for each, draw in zip(inputs, draws, strict=True)
    ]


def _with_context(batch: Batch, frac: float) -> Batch:
    """The batch with a share of its targets left out of the loss."""
    counts = np.random.default_rng(7).random(batch.loss_weights.shape) >= frac
    return replace(batch, loss_weights=batch.loss_weights * counts.astype(np.float32))


def groups_of(module: Pretraining, towers: Towers = "mot") -> list[ParameterGroup]:
    return parameter_groups(module.named_parameters(), optimizer_config(towers), module.decoder.config)


def optimizer_config(towers: Towers) -> OptimizerConfig:
    values = {"learning_rate": 1.0, "weight_decay": 0.1, "eps": EPS, **_OPTIMIZER.get(towers, {})}
    return OptimizerConfig.model_validate(values)


def optimizer_of(towers: Towers) -> OptimizerSpec:
    return optimizer_config(towers).spec if towers == "muon" else OPTIMIZER


def engine_of(w: world.World, towers: Towers, layout: ParallelConfig, **options: Any) -> ZeroEngine:
    options.setdefault("optimizer", optimizer_of(towers))
    config = model_config(towers)
    bounds = partition(sublayer_costs(config), w.pp_size, config.whole_blocks)
    decoder = Decoder(
        config,
        seed=5,
        tp=w.tensor_parallel,
        activation_checkpointing=layout.activation_checkpointing,
        sublayers=range(bounds[w.pp_rank], bounds[w.pp_rank + 1]),
    )
    dtype = dtype_of(layout, options.get("precision", "fp32"))
    module = Pretraining(decoder).to(dtype)
    engine = (ZeroEngine if w.pp_size == 1 else PipelineEngine)(
        module,
        groups_of(module, towers),
        w,
        max_grad_norm=MAX_GRAD_NORM,
        learning_rate_at=learning_rate_at,
        zero_stage=layout.zero_stage,
        accumulation_steps=MICRO_BATCHES // w.dp_size,
        persistent_elements=0,  # else ZeRO-3 would keep so small a module whole
        **options,
    )
    if dtype == torch.float64:
        _reduce_in_fp64(engine)
    return engine


def _reduce_in_fp64(engine: ZeroEngine) -> None:
    """Let DeepSpeed sum gradients over data-parallel ranks in fp64. Unless told so it sums them in fp32, and
    its list of what a CPU can sum leaves fp64 out."""
    from deepspeed.accelerator import get_accelerator

    engine.deepspeed.communication_data_type = torch.float64
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float64]


def share(w: world.World, batches: Sequence[ModelInputs]) -> Sequence[ModelInputs]:
    """Of this rank's data-parallel coordinate."""
    count = len(batches) // w.dp_size
    return batches[count * w.dp_rank : count * (w.dp_rank + 1)]


def train(
    layout: ParallelConfig,
    towers: Sequence[Towers] = TOWERS,
    precision: str = "fp32",
    tamper: Callable[[ZeroEngine], None] | None = None,
) -> dict[Towers, list[StepResult]]:
    """On this rank. `tamper` breaks the engine, for negative controls."""
    return _train_in(world.start(layout), layout, towers, precision, tamper)


def _train_in(
    w: world.World,
    layout: ParallelConfig,
    towers: Sequence[Towers],
    precision: str = "fp32",
    tamper: Callable[[ZeroEngine], None] | None = None,
) -> dict[Towers, list[StepResult]]:
    dtype, results = dtype_of(layout, precision), {}
    for name in towers:
        engine = engine_of(w, name, layout, precision=precision)
        if tamper is not None:
            tamper(engine)
        batches = partial(
            micro_batches,
            model_config(name),
            dtype=dtype,
            modality_weights=LOSS_WEIGHTS.get(name),
            masked=name == "masked",
        )
        results[name] = [engine.train_step(share(w, batches(step)), step) for step in range(STEPS)]
    return results


def train_on(ranks: int, layout: dict[str, Any], *args: Any) -> dict[Towers, list[StepResult]]:
    """What all ranks agree on."""
    found = run_on_ranks(train, ranks, ParallelConfig(**layout), *args, timeout_s=180)
    assert all(rank == found[0] for rank in found)
    return found[0]


def train_together(ranks: int, cases: Sequence[Case]) -> list[dict[Towers, list[StepResult]]]:
    """For each case, what all ranks agree on. Layouts differ in their ZeRO stage and in recomputation alone:
    the ranks meet once."""
    arguments = [(ParallelConfig(**layout), towers) for layout, towers in cases]
    found = run_cases(_train_in, ranks, arguments, arguments[0][0])
    assert all(rank == of_ranks[0] for of_ranks in found for rank in of_ranks)
    return [of_ranks[0] for of_ranks in found]


@cache
def one_process(towers: Towers, dtype: torch.dtype) -> list[StepResult]:
    """Plain torch, no engine."""
    config = model_config(towers)
    module = Pretraining(Decoder(config, seed=5)).to(dtype)
    weights, masked = LOSS_WEIGHTS.get(towers), towers == "masked"
    batches = partial(micro_batches, config, dtype=dtype, modality_weights=weights, masked=masked)
    build = {"build": optimizer_of(towers).build} if towers == "muon" else {}
    with choice_margin(module) as margin:
        results = plain_steps(module, groups_of(module, towers), batches, STEPS, learning_rate_at, **build)
    assert margin.least > LEAST_MARGIN, f"a choice of {towers} is so close that rounding may turn it"
    return results


def assert_equals_one_process(ranks: int, layout: dict[str, Any], towers: Sequence[Towers] = TOWERS) -> None:
    """Losses, weights, and norms of the gradient and of each tower's, in every step."""
    assert_all_equal_one_process(ranks, [(layout, tuple(towers))])


def assert_all_equal_one_process(ranks: int, cases: Sequence[Case]) -> None:
    """As assert_equals_one_process, of the cases of train_together."""
    for (layout, _), results in zip(cases, train_together(ranks, cases), strict=True):
        dtype = dtype_of(ParallelConfig(**layout))
        for name, found in results.items():
            assert_same(found, one_process(name, dtype), RTOL[dtype])


def assert_is_seen(results: Sequence[StepResult], layout: ParallelConfig, towers: Towers) -> None:
    """A fault moves some number of some step by a hundred times the tolerance of its layout."""
    dtype = dtype_of(layout)
    found = deviation(results, one_process(towers, dtype))
    assert found >= 100 * RTOL[dtype], f"{found:.3g} in {dtype}"


def assert_within_bf16(found: Sequence[StepResult]) -> None:
    """The results of a three-tower decoder in bf16 are those in fp32 but for what 8 bits of mantissa leave.

    Rounding makes 8e-4 of a loss and 1.8e-2 of the norm of the first step, on one process too. The norms of
    later steps are no measure, since weights moved by bf16's last place move them by a tenth. A lost factor
    of two is seen. The fp64 and fp32 comparisons hold what is finer.
    """
    expected = one_process("mot", torch.float32)
    for bf16, fp32 in zip(found, expected, strict=True):
        assert sum(bf16.stats[:3]) == pytest.approx(sum(fp32.stats[:3]), rel=1e-2)
    assert found[0].grad_norm == pytest.approx(expected[0].grad_norm, rel=0.2)
