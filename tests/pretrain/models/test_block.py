import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.testing import run_on_ranks
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import ModelInputs, build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.models.query_key import rotary_table
from tests.pretrain.models.random_batch import MOT, random_batch, tiny_config


def objective_and_gradients(module: Pretraining, inputs: ModelInputs) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    objective, *_ = module(inputs)
    objective.backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return objective.detach(), gradients  # type: ignore[return-value]


@pytest.mark.parametrize("placement", ["post", "pre"])
def test_activation_checkpointing_changes_no_bit(placement: str) -> None:
    config = tiny_config(MOT, norm_placement=placement)
    inputs = build_inputs(random_batch(config), config)
    kept = objective_and_gradients(Pretraining(Decoder(config)), inputs)
    recomputed = objective_and_gradients(Pretraining(Decoder(config, activation_checkpointing=True)), inputs)
    assert torch.equal(kept[0], recomputed[0])
    for name, gradient in kept[1].items():
        assert torch.equal(gradient, recomputed[1][name]), name


class Recorder(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_and_backward_ask_the_device_nothing(checkpointing: bool) -> None:
    """No value or shape that only the device knows: what would make a GPU wait."""
    config = tiny_config(MOT, z_loss=0.1)
    inputs = build_inputs(random_batch(config), config)
    module = Pretraining(Decoder(config, activation_checkpointing=checkpointing))
    with Recorder() as recorder:
        objective, *_ = module(inputs)
        objective.backward()
    asking = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "aten.equal",
        "is_nonzero",
        "index.Tensor",
    )
    assert len(recorder.seen) > 100
    assert not [name for name in recorder.seen if any(word in name for word in asking)]


def explain_block(flex: bool) -> tuple[int, int, str]:
    config = tiny_config(MOT)
    inputs = build_inputs(random_batch(config), config)
    block = Decoder(config).blocks[0].requires_grad_(not flex)  # flex has no gradient on CPU
    mask = inputs.mask.with_blocks() if flex else inputs.mask
    rotary = rotary_table(inputs.positions, config.head_dim, config.rope_theta)
    x = torch.randn(inputs.num_tokens, config.d_model)
    explained = torch._dynamo.explain(block)(x, inputs.routing, mask, rotary)
    return explained.graph_count, explained.graph_break_count, str(explained.break_reasons)


@pytest.mark.parametrize("flex", [False, True])
def test_a_block_is_one_graph(flex: bool) -> None:
    """In a process whose annotations are not checked: the checks are no part of a graph."""
    (found,) = run_on_ranks(explain_block, 1, flex)
    assert found[:2] == (1, 0), found[2]


def compiled_and_eager() -> list[tuple[np.ndarray, np.ndarray]]:
    config, wide = tiny_config(MOT), torch.float64
    inputs = build_inputs(random_batch(config), config)
    block = Decoder(config).blocks[0].to(wide)
    rotary = rotary_table(inputs.positions, config.head_dim, config.rope_theta, wide)
    x = torch.randn(inputs.num_tokens, config.d_model, dtype=wide, requires_grad=True)
    grad = torch.randn(inputs.num_tokens, config.d_model, dtype=wide)
    results = []
    for run in (torch.compile(block, backend="aot_eager", fullgraph=True), block):
        out, _ = run(x, inputs.routing, inputs.mask, rotary)
        results.append((out, *torch.autograd.grad(out, (x, *block.parameters()), grad)))
    return [(ours.detach().numpy(), theirs.detach().numpy()) for ours, theirs in zip(*results, strict=True)]


def test_a_compiled_block_computes_the_same() -> None:
    (pairs,) = run_on_ranks(compiled_and_eager, 1)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10 * np.abs(theirs).max())
