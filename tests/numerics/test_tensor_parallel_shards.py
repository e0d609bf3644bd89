"""The whole decoder over tensor-parallel ranks: losses are those of one process, and the gradient of every
tower's shard is its slice of the whole gradient."""

from dataclasses import replace

import pytest
import torch

from parallel import world
from parallel.collectives import ONE_RANK
from parallel.layout import ParallelConfig
from parallel.logical import logical_of
from parallel.testing import run_on_ranks
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.dropout import DropoutDraw
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from tests.pretrain.models.precision import PRECISIONS, assert_close
from tests.pretrain.models.random_batch import DENSE, ELEMENTS, MOT, random_batch, tiny_config

PRESENT = {"all": (0, 1, 2), "no speech": (0, 1), "speech alone": (2,)}
MODELS = {
    "dense, pre norm": tiny_config(DENSE, norm_placement="pre", qk_norm=False),
    "mot, post norm": tiny_config(MOT, z_loss=1e-3),
    "mot, tied attention": tiny_config(MOT, untied=("feed_forward", "norm")),
    "elements": tiny_config(MOT, **ELEMENTS),
}


def _pass(
    config: ModelConfig,
    layout: ParallelConfig | None,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict:
    """Objective, stats and gradients by name, for micro-batches with all, some and one modality."""
    tp = world.start(layout).tensor_parallel if layout else ONE_RANK
    module = Pretraining(Decoder(config, seed=3, tp=tp, activation_checkpointing=checkpointing))
    with torch.no_grad():  # towers that differ, as after some steps; whole, then cut
        for name, parameter in module.named_parameters():
            logical = logical_of(parameter)
            generator = torch.Generator().manual_seed(sum(name.encode()))
            noise = torch.randn(logical.shape, generator=generator) * 0.1
            parameter += logical.cut(noise, tp.rank, tp.size)
    module, found = module.to(dtype), {}
    for name, present in PRESENT.items():
        batch = random_batch(config, sequences=2, seed=4, present=present, padding_tokens=3)
        module.zero_grad(set_to_none=True)
        inputs = build_inputs(batch, config)
        draw = DropoutDraw(seed=1, step=2, sequences=range(2))
        inputs = replace(inputs, loss_weights=inputs.loss_weights.to(dtype), dropout=draw)
        objective, stats, _ = module(inputs)
        objective.backward()
        grads = {n: (p.grad, logical_of(p)) for n, p in module.named_parameters()}
        found[name] = (objective.detach(), stats, grads)
    return found


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("layout", [(2, False), (2, True), (4, True)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_every_shard_is_its_slice(model: str, layout: tuple[int, bool], dtype: torch.dtype) -> None:
    tp, sequence_parallel = layout
    config = MODELS[model].model_copy(update={"num_kv_heads": max(2, tp)})
    whole = _pass(config, None, dtype=dtype)
    parallel = ParallelConfig(tp=tp, sequence_parallel=sequence_parallel)
    ranks = run_on_ranks(_pass, tp, config, parallel, False, dtype)
    for rank, found in enumerate(ranks):
        for name, (objective, stats, grads) in found.items():
            expected_objective, expected_stats, expected_grads = whole[name]
            assert_close(objective, expected_objective, "objective")
            assert_close(stats, expected_stats, "stats")
            assert grads.keys() == expected_grads.keys()
            for parameter, (grad, logical) in grads.items():
                expected = logical.cut(expected_grads[parameter][0], rank, tp)
                largest = float(expected_grads[parameter][0].abs().max())
                assert_close(grad, expected, f"{name}: {parameter}", floor=largest, fp32=5e-5)


@pytest.mark.parametrize("model", ["mot, post norm", "elements"])
def test_recomputed_activations_change_nothing(model: str) -> None:
    layout = ParallelConfig(tp=2)
    kept, again = (run_on_ranks(_pass, 2, MODELS[model], layout, c)[1] for c in (False, True))
    for name in PRESENT:
        for parameter, (grad, _) in kept[name][2].items():
            assert torch.equal(grad, again[name][2][parameter][0]), parameter
