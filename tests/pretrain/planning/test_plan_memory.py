"""The bytes that `motley plan` names are those that real engines and real decoders hold."""

import gc
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch

from data_pipeline.files.toml_config import validate
from parallel import engine_memory, world
from parallel.deepspeed_config import BUCKET_ELEMENTS
from parallel.layout import ParallelConfig
from pretrain.config import RunConfig
from pretrain.models.inputs import build_inputs
from pretrain.planning import layout_plan
from pretrain.train import build
from tests.one_world import run_cases
from tests.pretrain.models.random_batch import MOT, random_batch

MODEL = {
    "num_layers": 3, "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden": 192, "context_tokens": 8,
    "vocab_tokens": 1600, "towers": MOT,
}  # fmt: skip
"""Embedding and head have more elements than ZeRO-3 keeps whole, the other parameters fewer."""


def run_config(parallel: dict[str, Any], precision: str = "fp32", **changes: Any) -> RunConfig:
    values = {
        "name": "planned", "total_tokens": 4096, "tokens_per_step": 4 * 8, "precision": precision,
        "model": MODEL | changes.pop("model", {}), "data": {"train": [{"path": "nowhere"}]},
        "optimizer": {"learning_rate": 1e-3}, "parallel": parallel,
    }  # fmt: skip
    return validate(RunConfig, values | changes, source="test")


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address -> bytes; views of one storage count once, tensors on "meta" (address 0) not at all."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.data_ptr()}


def all_tensors() -> list[torch.Tensor]:
    """Every tensor that Python holds: not what autograd keeps for a backward pass."""
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return found + [each.grad for each in found if each.is_leaf and each.grad is not None]


def measure(w: world.World, config: RunConfig) -> tuple[int, int, int, tuple[int, int]]:
    """(parameters, gradients at their most, optimizer) in bytes, and (stage, data-parallel rank).

    Gradients are all that is neither of the others nor was there before the engine; looked at when the last
    backward pass is about to end and before each update.
    """
    gc.collect()  # of an engine before this one nothing may be freed while this one is looked at
    before = storages(all_tensors()).keys()
    engine = build.engine(config, w)
    module = engine.deepspeed.module
    masters = [p for group in engine.torch_optimizer.param_groups for p in group["params"]]
    masters += getattr(engine.deepspeed.optimizer, "fp32_partitioned_groups_flat", [])  # ZeRO-3
    bucket = {4 * BUCKET_ELEMENTS, 2 * BUCKET_ELEMENTS}
    seen = {"backward": 0, "update": 0}

    def held() -> tuple[dict[int, int], dict[int, int]]:
        parameters = storages([p.data for p in module.parameters()])
        parameters |= storages([p.ds_tensor for p in module.parameters() if hasattr(p, "ds_tensor")])
        moments = [value for state in engine.torch_optimizer.state.values() for value in state.values()]
        optimizer = storages(masters + moments)
        return parameters, {at: n for at, n in optimizer.items() if at not in parameters}

    def others() -> int:
        known = set(before).union(*held())
        now = storages(all_tensors())
        return sum(n for at, n in now.items() if at not in known and n not in bucket)

    # One of the first parameters gets the last gradient of a backward pass: what it sees is kept.
    trained = [p for p in module.parameters() if getattr(p, "ds_numel", p.numel()) > 1]
    for parameter in trained[:4]:
        parameter.register_post_accumulate_grad_hook(lambda _: seen.update(backward=others()))
    engine.torch_optimizer.register_step_pre_hook(
        lambda *_: seen.update(update=max(seen["update"], others()))
    )
    passes = config.sequences_per_step // (w.dp_size * config.parallel.micro_batch_sequences)
    for step in range(2):
        seen.update(backward=0, update=0)  # the second step counts: the first makes the moments
        batches = [random_batch(config.model, sequences=1, seed=9 * step + k) for k in range(passes)]
        engine.train_step([build_inputs(batch, config.model) for batch in batches], step)
    parameters, optimizer = (sum(part.values()) for part in held())
    return parameters, max(seen.values()), optimizer, (w.pp_rank, w.dp_rank)


WORLDS: dict[str, tuple[int, dict[str, int]]] = {
    "alone": (1, {}),
    "dp 2": (2, {}),
    "dp 4": (4, {}),
    "tp 2": (2, {"tp": 2}),
    "tp 2 x dp 2": (4, {"tp": 2}),
    "pp 2": (2, {"pp": 2}),
    "pp 2 x dp 2": (4, {"pp": 2}),
    "tp 2 x pp 2": (4, {"pp": 2, "tp": 2}),
}
"""Ranks and layout."""
ENGINES: dict[str, list[tuple[int, str]]] = {
    "alone": [(1, "bf16"), (3, "bf16")],
    "dp 2": [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")],
    "dp 4": [(2, "fp32")],
    "tp 2": [(1, "fp32")],
    "tp 2 x dp 2": [(3, "bf16")],
    "pp 2": [(1, "fp32")],
    "pp 2 x dp 2": [(1, "bf16")],
    "tp 2 x pp 2": [(1, "bf16")],
}
"""Stages and precisions of each of WORLDS."""
MUON = {"learning_rate": 1e-3, "kind": "muon"}
OTHERS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "muon, stage 0 fp32": (0, "fp32", {"optimizer": MUON}),
    "muon, stage 1 bf16": (1, "bf16", {"optimizer": MUON}),
    "one weight of embedding and head": (1, "bf16", {"model": {"tied_embeddings": True}}),
    "several of embedding and head": (1, "bf16", {"model": {"untied": ["qkv", "embedding", "head"]}}),
}
"""Engines on "dp 2" that differ in more: stage, precision, changes of the config."""
CASES: dict[str, tuple[str, RunConfig]] = {
    f"{name}, stage {stage} {precision}": (
        name,
        run_config(WORLDS[name][1] | {"zero_stage": stage}, precision),
    )
    for name, engines in ENGINES.items()
    for stage, precision in engines
} | {
    name: ("dp 2", run_config({"zero_stage": stage}, precision, **changes))
    for name, (stage, precision, changes) in OTHERS.items()
}
"""Name of one of WORLDS, and the config."""


@cache
def measured(name: str) -> dict[str, list[tuple[int, int, int, tuple[int, int]]]]:
    """Of each case of a world, what its ranks measure."""
    ranks, layout = WORLDS[name]
    cases = {case: config for case, (at, config) in CASES.items() if at == name}
    found = run_cases(measure, ranks, [(config,) for config in cases.values()], ParallelConfig(**layout))
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_what_an_engine_holds(case: str) -> None:
    name, config = CASES[case]
    ranks, _ = WORLDS[name]
    stage, precision = config.parallel.zero_stage, config.precision
    planned = layout_plan.plan(config, ranks)
    for parameters, gradients, optimizer, (pp_rank, dp_rank) in measured(name)[case]:
        groups, _ = layout_plan.weights(config, planned.stages[pp_rank].sublayers, config.parallel.tp)
        zero: dict[str, Any] = {"dp": planned.dp, "zero_stage": stage, "precision": precision}
        spec = config.optimizer.spec
        held = sum(
            (
                engine_memory.group_memory(
                    sizes, state_bytes=spec.state_bytes(matrices="+muon" in name), dp_rank=dp_rank, **zero
                )
                for name, sizes in groups.items()
            ),
            engine_memory.MemoryUse(),
        )
        expected = held.gradients + engine_memory.update_copy(groups, **zero, dp_rank=dp_rank)
        assert parameters == held.parameters
        # AdamW's counters, 4 bytes a group: at most 5e-5 here.
        assert optimizer == pytest.approx(held.optimizer, rel=1e-4)
        # The inputs of a step, at most 0.16 % here. A pipeline stage also keeps what it has sent and
        # received, 1.23 % at this size.
        assert gradients == pytest.approx(expected, rel=0.004 if config.parallel.pp == 1 else 0.02)
